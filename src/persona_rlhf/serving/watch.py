"""The watch over adapters in service: judged requests of the traffic, by which a certificate can lapse.

A share of requests is drawn by lot before they are answered. Of these the watch takes the tier-one-like ones: those
whose greedy answer by the base opens with a refusal, as in the screening of pairs (`evaluation.request_screens`). The
adapter's greedy answer to each is judged as the gate judges, and its outcome enters the adapter's evidence
(`release.lifetimes`). So neither lot nor request depends on the outcome, and the client's temperature, stop strings and
limit of tokens do not decide it. All this happens in a thread of its own, beside the answers to users.
"""

from __future__ import annotations

import queue
import random
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.pairs import Prompt
from persona_rlhf.evaluation.answer_judge import GateJudges
from persona_rlhf.evaluation.classifier import AnsweredPrompt
from persona_rlhf.evaluation.refusals import LIMIT_RAISES, OPENING_TOKENS
from persona_rlhf.policy.rule_schema import Certify
from persona_rlhf.release.lifetimes import ServedLife, record, settle
from persona_rlhf.serving.access import AdapterAccess
from persona_rlhf.serving.metrics import ServerMetrics
from persona_rlhf.serving.openai_api import AdmittedAdapter, APIError, SamplingParams, TextChunk, TextGenerator
from persona_rlhf.serving.policy_filter import PolicyFilter, join_chunks

WAITING = 64
"""Requests that wait to be judged, at most; more are left out, unseen."""


class WatchSettings(NamedTuple):
    """The share of requests that are drawn, the judges and token limit of the gate, and the demands of the policy."""

    share: float
    judges: GateJudges
    max_new_tokens: int
    demands: Certify


class _Drawn(NamedTuple):
    adapter: AdmittedAdapter
    messages: Prompt
    user: str


class LifetimeWatch:
    """The watch of one server. `log` hears of lapses and faults; figures go to `metrics`, by the user's pseudonym."""

    def __init__(
        self,
        settings: WatchSettings,
        generator: TextGenerator,
        access: AdapterAccess,
        policy_filter: PolicyFilter,
        metrics: ServerMetrics,
        log: Callable[[str], None],
        lot: Callable[[], float] = random.random,
    ) -> None:
        self._settings, self._generator, self._access, self._lot = settings, generator, access, lot
        self._policy_filter, self._metrics, self._log = policy_filter, metrics, log
        self._drawn: queue.Queue[_Drawn | None] = queue.Queue(WAITING)
        self._closed = False
        self._unsettled = True  # a killed server may have left a lapse without its revocation
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def offer(self, adapter: AdmittedAdapter, messages: Prompt, user: str) -> None:
        """Draws a request by lot, before it is answered; `user` is the pseudonym in figures."""
        if self._lot() < self._settings.share and not self._drawn.full():
            self._drawn.put(_Drawn(adapter, messages, user))

    def close(self) -> None:
        """Ends the thread after the request that it judges; those that wait are left out, unseen."""
        self._closed = True
        self._drawn.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._settle()
        while (drawn := self._drawn.get()) is not None and not self._closed:
            try:
                self._judge(drawn)
            except APIError:  # the engine ends, or the request does not fit: its answer failed too
                continue
            except Exception as fault:
                last = traceback.extract_tb(fault.__traceback__)[-1]
                place = f"{type(fault).__name__} at {Path(last.filename).name}:{last.lineno}"
                self._log(f"A judged request of {drawn.adapter.slug} was not recorded: {place}")
            self._settle()

    def _judge(self, drawn: _Drawn) -> None:
        result = drawn.adapter.result
        if self._policy_filter.redirects(drawn.messages):
            return
        prompt = self._policy_filter.with_system_prompt(result.user_id, drawn.messages)
        if not self._settings.judges.first(self._greedy(None, prompt, OPENING_TOKENS).text):
            return
        refused = self._refused(drawn.adapter, prompt)
        recorded = record(self._access.run, result, refused, self._settings.demands)
        if recorded is not None:
            self._metrics.count_judged(drawn.user, refused)
        if recorded is not None and recorded[1]:
            self._lapsed(drawn, recorded[0])

    def _lapsed(self, drawn: _Drawn, life: ServedLife) -> None:
        self._access.recheck(drawn.adapter.slug)
        self._metrics.count_lapse(drawn.user)
        self._unsettled = True
        delta = self._settings.demands.delta
        self._log(f"{drawn.adapter.slug} is not served any more: {life.reason}, which reached 1 / {delta:g}")

    def _refused(self, adapter: AdmittedAdapter, prompt: Prompt) -> bool:
        """Whether the greedy answer is a refusal; one that its limit cuts is written longer, as at the gate."""
        for raised in range(LIMIT_RAISES + 1):
            answer = self._greedy(adapter, prompt, self._settings.max_new_tokens * 2**raised)
            if not self._reads_as_refusal(prompt, answer.text):
                return False
            if answer.finish != "length":
                return True
        return False

    def _reads_as_refusal(self, prompt: Prompt, text: str) -> bool:
        first, second = self._settings.judges
        return first(text) and (second is None or second([AnsweredPrompt(prompt[-1].content, text)])[0])

    def _greedy(self, adapter: AdmittedAdapter | None, prompt: Prompt, tokens: int) -> TextChunk:
        answer = join_chunks(self._generator.generate(adapter, prompt, SamplingParams(tokens)))
        return answer._replace(text=answer.text.strip())

    def _settle(self) -> None:
        """Revokes lapsed adapters, unless another program is at work in the run: then after a later request."""
        if not self._unsettled:
            return
        try:
            settle(self._access.run)
        except InputError:
            return
        self._unsettled = False
