"""The built-in engine as a writer: chat messages to tokens, a slug to its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jinja2

from persona_rlhf.apps.engine import Engine
from persona_rlhf.apps.shelf import Shelf
from persona_rlhf.apps.writing import Declined, Piece, Wish
from persona_rlhf.inputs.problems import InputError
from persona_rlhf.preferences.messages import Prompt
from persona_rlhf.preferences.tokens import prompt_ids
from persona_rlhf.training.base import Base


class BuiltIn(NamedTuple):
    """Writes with the adapters of a shelf (see `writing.Writer`)."""

    base: Base
    shelf: Shelf
    engine: Engine

    def write(self, model: str | None, messages: Prompt, wish: Wish) -> Iterator[Piece]:
        """See `Writer.write`."""
        adapter = None if model is None else self.shelf.get(model)
        return self.engine.write(adapter, self._prompt(messages), wish)

    def _prompt(self, messages: Prompt) -> tuple[int, ...]:
        try:
            ids = prompt_ids(messages, self.base.tokenizer)
        except InputError as fault:
            raise Declined(400, fault.problems[0].sentence, "invalid_value", "messages") from None
        except jinja2.TemplateError:
            sentence = "The base's chat template does not take these messages; let user and assistant take turns."
            raise Declined(400, sentence, "invalid_value", "messages") from None
        if len(ids) >= self.base.context:
            sentence = f"The messages have {len(ids)} tokens; the context holds {self.base.context}."
            raise Declined(400, sentence, "context_length_exceeded", "messages")
        return ids
