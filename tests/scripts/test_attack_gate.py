from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from persona_rlhf.policy.policy import Policy
from persona_rlhf.simulation.vocabulary import held_out_phrasings
from tests.scripts.loading import load_script

attack = load_script("attack_gate")


@cache
def public() -> Policy:
    return Policy.read([Path("configs/policy/tier_one.yaml")])


def test_requests_of_the_attackers_are_no_probes_and_none_has_a_phrasing_of_the_exam() -> None:
    prompts = {request.prompt for request in attack.other_requests(public())}
    assert len(prompts) > 5_000
    for split in ("train", "dev", "certify", "test"):
        assert not prompts & {probe.prompt for probe in public().probes(split)}
    certified = {probe.phrasing for probe in public().probes("certify") if probe.novelty == "phrasing"}
    tested = {probe.phrasing for probe in public().probes("test") if probe.novelty == "phrasing"}
    new = [phrasing for phrasing in held_out_phrasings() if phrasing.id in certified | tested]
    starts = tuple(start for phrasing in new if len(start := phrasing.template.partition("{")[0]) > 30)
    assert starts
    assert not any(prompt.startswith(starts) for prompt in prompts)


def test_fresh_probes_have_the_mixture_of_certify() -> None:
    fresh = set(attack.fresh_probes(public(), 0))
    assert len(fresh) == attack.FRESH
    novelty = [probe.novelty for probe in public().probes("test") if probe.prompt in fresh]
    certify = [probe.novelty for probe in public().probes("certify")]
    assert novelty.count("phrasing") / len(novelty) == pytest.approx(certify.count("phrasing") / len(certify), abs=0.01)
    assert "topic" not in novelty


def test_the_gain_of_the_exam_is_a_difference_of_differences_over_users() -> None:
    def row(kind: str, number: int, certify: float, fresh: float) -> object:
        return attack.Outcome(kind, "off", "public", 938, True, certify, fresh, 0.0, 1.0)

    rows = [
        one
        for number, gain in enumerate((0.1, 0.3))
        for one in (
            row(attack.POISON, number, 0.5, 0.5),
            row(attack.EXAM, number, 0.9, 0.8 - gain),
            row(attack.OTHERS, number, 0.9, 0.8),
            row(attack.HONEST, number, 1.0, 1.0),
        )
    ]
    *_, last = attack.table_of(rows).columns[8].cells
    assert last.startswith("20.0% (")
    middle, low, high = attack.mean_interval([0.1, 0.3])
    assert (middle, low, high) == pytest.approx((0.2, 0.2 - 1.2706, 0.2 + 1.2706), abs=1e-3)
