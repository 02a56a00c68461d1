"""The run's policy around a text generator: system prompt, redirects, and a check of each answer."""

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
from persona_rlhf.serving.openai_api import (
    AdmittedAdapter,
    APIError,
    SamplingParams,
    TextChunk,
    TextGenerator,
    TokenLogprob,
    Usage,
)

FALLBACK = "I cannot give an answer to that here."
"""The answer if neither the user's adapter nor the base gives one that passes the check."""


@dataclass(frozen=True, slots=True)
class PolicyFilter:
    """The policy of one run, applied to a conversation in three places.

    `system_prompt` maps a user id to the system prompt, empty if there is none. `redirect` maps the user's last
    message to the answer that replaces the model's, or None. `post_check` maps that message and an answer to the ids
    of the rules that the answer breaks. Without a `post_check` answers are streamed as they are generated.
    """

    system_prompt: Callable[[str], str] | None = None
    redirect: Callable[[str], str | None] | None = None
    post_check: Callable[[str, str], list[str]] | None = None

    @staticmethod
    def of(policy: Policy) -> PolicyFilter:
        """The filter of a policy's rules."""

        def broken_rules(prompt: str, answer: str) -> list[str]:
            return [rule.id for rule in post_check(policy, prompt, answer)]

        check = broken_rules if any(map(checkable, policy.requirements)) else None
        return PolicyFilter(partial(system_prompt, policy), Redirects(policy).answer, check)

    def with_system_prompt(self, user_id: str, messages: Prompt) -> Prompt:
        """The messages, opened by the policy's system prompt."""
        text = "" if self.system_prompt is None else self.system_prompt(user_id)
        if not text:
            return messages
        if messages[0].role == "system":
            return (Message("system", f"{text}\n\n{messages[0].content}"), *messages[1:])
        return (Message("system", text), *messages)

    def redirects(self, messages: Prompt) -> bool:
        """Whether the policy answers a request itself, so that it does not reach the model."""
        return self.redirect is not None and self.redirect(messages[-1].content) is not None

    def answer(
        self,
        generator: TextGenerator,
        user_id: str,
        adapter: AdmittedAdapter | None,
        messages: Prompt,
        sampling: SamplingParams,
    ) -> Iterator[TextChunk]:
        """The answer under a user's adapter if it passes, else the base's greedy one, else FALLBACK.

        A checked answer comes in one chunk. Text that no model generated finishes as `content_filter`. Raises APIError
        at once if the request cannot be accepted.
        """
        redirected = None if self.redirect is None else self.redirect(messages[-1].content)
        if redirected is not None:
            return iter([TextChunk(redirected, "content_filter", Usage(0, 0), filtered="redirect")])
        prompt = self.with_system_prompt(user_id, messages)
        chunks = generator.generate(adapter, prompt, sampling)
        return chunks if self.post_check is None else self._checked(chunks, generator, prompt, sampling)

    def _checked(
        self, chunks: Iterator[TextChunk], generator: TextGenerator, prompt: Prompt, sampling: SamplingParams
    ) -> Iterator[TextChunk]:
        assert self.post_check is not None
        message, total = prompt[-1].content, Usage(0, 0)
        for attempt in (chunks, None):
            answer = join_chunks(attempt or generator.generate(None, prompt, sampling._replace(temperature=0.0)))
            usage = answer.usage or Usage(0, 0)
            total = Usage(usage.prompt, total.completion + usage.completion)
            if not self.post_check(message, answer.text):
                yield answer._replace(usage=total, filtered=None if attempt is not None else "base")
                return
        yield TextChunk(FALLBACK, "content_filter", total, filtered="fallback")


def policy_of_run(run: Path, documents: Sequence[Path | str]) -> Policy:
    """The policy of a run, read from its documents. Raises InputError if they changed since the run was judged."""
    policy = Policy.read(documents)
    try:
        judged_by = json.loads((run / "policy.json").read_bytes())["hash"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise InputError([Problem(str(run / "policy.json"), None, None, f"cannot be read ({fault})")]) from fault
    if policy.hash != judged_by:
        sentence = "the policy documents changed since this run was judged; judge it again, or restore them"
        raise InputError([Problem(str(run / "policy.json"), None, "policy.documents", sentence)])
    return policy


def join_chunks(chunks: Iterator[TextChunk]) -> TextChunk:
    """An answer in one chunk. Raises APIError if its end is missing."""
    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    for chunk in chunks:
        texts.append(chunk.text)
        logprobs += chunk.logprobs
        if chunk.finish is not None:
            return chunk._replace(text="".join(texts), logprobs=tuple(logprobs))
    raise APIError(502, "The engine ended without an end of its answer.", "engine_failed")
