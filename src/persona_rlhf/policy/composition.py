"""Text before certify probes (`certify.with`): the policy's system prompt, and written memories about a user.

It is the system message that a server sends whose client adds memories. So the gate certifies the adapter in
composition with both. The memories are harmless sentences of a shipped file. Each probe has 0 to 10 of them, each
number equally often; the seed and the probe decide which. They are the same for all users, so that the base answers a
probe once for all users of one system prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from persona_rlhf.common.files import find, sha256_of
from persona_rlhf.policy.enforcement import system_prompt
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.policy import Policy

MEMORIES = Path("data/prompts/memories.jsonl")
MOST_MEMORIES = 10


@dataclass(frozen=True)
class Composition:
    """The text before the certify probes of a policy's users; `seed` is that of the run."""

    policy: Policy
    seed: int

    @property
    def parts(self) -> list[str]:
        """The parts that the policy asks for; none where probes stand alone."""
        return list(self.policy.certify.with_ or ())

    def system_prompt(self, user_id: str) -> str:
        """The policy's system prompt for a user; "" where there is none, or it is not part of the composition."""
        return system_prompt(self.policy, user_id) if "system" in self.parts else ""

    def message(self, system: str, probe: Probe) -> str:
        """The system message before a probe, of a `system_prompt` and memories; "" where there is none."""
        return "\n\n".join(filter(None, (system, _block(self._memories_of(probe)))))

    def record(self, user_id: str) -> dict[str, Any]:
        """The composition as a manifest names it: sha256 of the system prompt, and the memories. Empty for none."""
        record: dict[str, Any] = {}
        if "system" in self.parts:
            text = self.system_prompt(user_id)
            record["system_prompt_sha256"] = text_sha256(text) if text else None
        if "memories" in self.parts:
            record["memories"] = {"most": MOST_MEMORIES, "file_sha256": sha256_of(find(MEMORIES)), "seed": self.seed}
        return record

    @cached_property
    def _memories(self) -> list[str]:
        lines = find(MEMORIES).read_text(encoding="utf-8").splitlines()
        return [str(json.loads(line)["text"]) for line in lines]

    def _memories_of(self, probe: Probe) -> list[str]:
        if "memories" not in self.parts:
            return []
        source = Random(f"{self.seed} {probe.category} {probe.id}")
        return source.sample(self._memories, source.randint(0, MOST_MEMORIES))


def text_sha256(text: str) -> str:
    """sha256 of a system prompt."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def composed_sentence(record: Mapping[str, Any]) -> str:
    """The composition of a manifest for people: `certified with: system prompt (sha256 ...), 0 to 10 memories`."""
    parts = []
    if "system_prompt_sha256" in record:
        digest = record["system_prompt_sha256"]
        parts.append("an empty system prompt" if digest is None else f"the system prompt (sha256 {digest[:16]})")
    if memories := record.get("memories"):
        parts.append(f"0 to {memories['most']} memories (sha256 {memories['file_sha256'][:16]}) before each probe")
    return f"certified with {' and '.join(parts)}"


def _block(memories: list[str]) -> str:
    return "\n".join(["Memories about the user:", *(f"- {memory}" for memory in memories)]) if memories else ""
