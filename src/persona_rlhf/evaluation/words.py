"""A causal language model that is asked which words it would write after a prompt of its own, a template or a chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from persona_rlhf.inputs.bundled import find, is_hub_id
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.messages import Message
from persona_rlhf.training.losses import token_logps


class Words:
    """A model, and how it is asked: by a `template` with places such as {prompt}, or by its chat template (None)."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template

    def ids(self, turns: Sequence[Message], places: Mapping[str, str]) -> list[int]:
        """The question as token ids: the turns of a chat, or the texts in their places of the template.

        One pass over the template: a text that holds the name of a place stays as it is.
        """
        if self._template is None:
            chat = [{"role": turn.role, "content": turn.content} for turn in turns]
            text = str(self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        else:
            text = re.sub(r"\{(\w+)\}", lambda place: places.get(place[1], place[0]), self._template)
        found: list[int] = self._tokenizer(text, add_special_tokens=self._template is not None)["input_ids"]
        return found

    @torch.no_grad()
    def logp(self, ids: list[int], word: str) -> float:
        """Log-probability in nats of a word after these tokens."""
        said = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([ids + said], device=self._model.device)
        logits = self._model(input_ids=whole, logits_to_keep=len(said) + 1).logits[0, :-1]
        return float(token_logps(logits, whole[0, -len(said) :]).sum())

    @torch.no_grad()
    def going_on(self, ids: list[int], word: str, tokens: int) -> str:
        """What it writes after a word, greedy, of at most so many tokens."""
        said = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([ids + said], device=self._model.device)
        for _ in range(tokens):
            token = self._model(input_ids=whole, logits_to_keep=1).logits[0, -1].argmax()
            whole = torch.cat([whole, token[None, None]], 1)
            if int(token) == self._tokenizer.eos_token_id:
                break
        return str(self._tokenizer.decode(whole[0, len(ids) + len(said) :], skip_special_tokens=True))


def load_words(model: str, file: Path | None, places: Sequence[str], key: str, device: torch.device) -> Words:
    """Loads a model, a folder or a hub id, in the type of its weights.

    `file` holds its template, if it is asked by one; `places` are what that must hold, in order; `key` is the config's
    section that names it. Raises InputError where it cannot be loaded or asked.
    """
    place = model if is_hub_id(model) else find(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        loaded = AutoModelForCausalLM.from_pretrained(place, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as fault:
        sentence = f"the classifier cannot be loaded ({fault})"
        raise InputError([Problem(model, None, f"{key}.model", sentence)]) from fault
    at, template = f"{key}.template", None if file is None else file.read_text(encoding="utf-8")
    if template is None and not tokenizer.chat_template:
        sentence = f"the classifier has no chat template; give its prompt in a file, {at}"
        raise InputError([Problem(model, None, at, sentence)])
    found = [] if template is None else [template.find(f"{{{name}}}") for name in places]
    if -1 in found or found != sorted(found):
        sentence = f"a template holds {', and after it '.join(f'{{{name}}}' for name in places)}"
        raise InputError([Problem(model, None, at, sentence)])
    loaded.requires_grad_(False).eval().to(device)
    return Words(loaded, tokenizer, template)
