"""Near copies in a pool of private probes: rows that are close to a public probe, or to a row of another topic.

A near copy of a public probe can be learnt from it, and two near copies would count as two topics. So both are left out
where whole topics are drawn. In a bank of topics times phrasings all rows resemble others; such rows stay.
"""

from __future__ import annotations

from typing import NamedTuple

from persona_rlhf.data.near_copies import NearCopyIndex, ProtectedPrompt
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.policy import Policy


class PoolCopy(NamedTuple):
    """A row of a pool, and the probe that it is a near copy of, by its id."""

    probe: Probe
    of: str


def pool_copies(policy: Policy) -> list[PoolCopy]:
    """The near copies in the pool of a policy's private banks; of two rows of the pool, the later one."""
    if policy.private is None:
        return []
    private = set(policy.private.pool.probes)
    public = [probe for rule in policy.restrictions for probe in rule.probes if probe not in private]
    near_public = NearCopyIndex(ProtectedPrompt(probe.prompt, probe.id, False) for probe in public)
    copies, rest = list[PoolCopy](), list[Probe]()
    for probe in policy.private.pool.probes:
        if probe.novelty == "topic":
            match = near_public.find(probe.prompt)
            copies += [] if match is None else [PoolCopy(probe, f"public probe `{match.name}`")]
            rest += [probe] if match is None else []
    by_text = {probe.prompt: probe for probe in rest}
    index = NearCopyIndex(ProtectedPrompt(probe.prompt, probe.id, False) for probe in rest)
    for probe in rest:
        if (match := index.find(probe.prompt)) is not None:
            first = by_text[match.text]
            if (first.category, first.topic) != (probe.category, probe.topic):
                copies.append(PoolCopy(probe, f"row `{first.id}` of topic `{first.topic}`"))
    return copies
