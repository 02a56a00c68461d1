"""What the policy asks of a conversation: its words at the beginning, and a look at the answer before it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.data.pairs import Message, Prompt
from persona_rlhf.policy.enforcement import Redirects, post_check, system_prompt
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.properties import checkable
from persona_rlhf.serving.openai_api import APIError, SamplingParams, TextChunk, TextGenerator, Usage

INSTEAD = "I cannot give an answer to that here."
"""What is said where neither the user's adapter nor the base gives an answer that passes."""


@dataclass(frozen=True, slots=True)
class PolicyFilter:
    """The policy of one run, in the three places where it meets a conversation.

    `system_prompt` gives the words for a user (his id), nothing where it has none for him. `redirect` takes the user's
    last message, and gives what is answered instead of the model; None where the model is asked. `post_check` takes
    that message and an answer, and says which rules the answer breaks: none where it passes. Without a `post_check`
    answers are streamed as they are written.
    """

    system_prompt: Callable[[str], str] | None = None
    redirect: Callable[[str], str | None] | None = None
    post_check: Callable[[str, str], list[str]] | None = None

    @staticmethod
    def of(policy: Policy) -> PolicyFilter:
        """What a policy's rules ask of serving."""

        def broken(prompt: str, answer: str) -> list[str]:
            return [rule.id for rule in post_check(policy, prompt, answer)]

        look = broken if any(map(checkable, policy.requirements)) else None
        return PolicyFilter(partial(system_prompt, policy), Redirects(policy).answer, look)

    def opened(self, user_id: str, messages: Prompt) -> Prompt:
        """The messages with the policy's words before all others."""
        words = "" if self.system_prompt is None else self.system_prompt(user_id)
        if not words:
            return messages
        if messages[0].role == "system":
            return (Message("system", f"{words}\n\n{messages[0].content}"), *messages[1:])
        return (Message("system", words), *messages)

    def answer(
        self, writer: TextGenerator, user_id: str, model: str | None, messages: Prompt, wish: SamplingParams
    ) -> Iterator[TextChunk]:
        """The answer of a user's adapter, where it passes; else the base's, greedy; else a fixed sentence.

        An answer that must be looked at is given whole. What the model did not write ends as `content_filter`. Raises
        Declined at once where the request cannot be taken.
        """
        instead = None if self.redirect is None else self.redirect(messages[-1].content)
        if instead is not None:
            return iter([TextChunk(instead, "content_filter", Usage(0, 0))])
        opened = self.opened(user_id, messages)
        pieces = writer.write(model, opened, wish)
        return pieces if self.post_check is None else self._looked_at(pieces, writer, opened, wish)

    def _looked_at(
        self, pieces: Iterator[TextChunk], writer: TextGenerator, messages: Prompt, wish: SamplingParams
    ) -> Iterator[TextChunk]:
        assert self.post_check is not None
        asked, used = messages[-1].content, Usage(0, 0)
        for attempt in (pieces, None):
            whole = together(attempt or writer.write(None, messages, wish._replace(temperature=0.0)))
            usage = whole.usage or Usage(0, 0)
            used = Usage(usage.prompt, used.completion + usage.completion)
            if not self.post_check(asked, whole.text):
                yield whole._replace(usage=used)
                return
        yield TextChunk(INSTEAD, "content_filter", used)


def policy_of(run: Path, documents: Sequence[Path | str]) -> Policy:
    """The policy of a run, from its documents. Raises InputError where they are not as they were when it was judged."""
    policy = Policy.read(documents)
    try:
        judged_by = json.loads((run / "policy.json").read_bytes())["hash"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise InputError([Problem(str(run / "policy.json"), None, None, f"cannot be read ({fault})")]) from fault
    if policy.hash != judged_by:
        sentence = "the policy documents changed since this run was judged; judge it again, or put them back"
        raise InputError([Problem(str(run / "policy.json"), None, "policy.documents", sentence)])
    return policy


def together(pieces: Iterator[TextChunk]) -> TextChunk:
    """An answer in one piece. Raises Declined where it has no end."""
    texts = []
    for piece in pieces:
        texts.append(piece.text)
        if piece.finish is not None:
            return piece._replace(text="".join(texts))
    raise APIError(502, "The engine ended without an end of its answer.", "engine_failed")
