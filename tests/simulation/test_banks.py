"""The bundled world's banks: on disk as drawn, fresh, balanced, and absent from the corpus."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import pytest

from persona_rlhf.evaluation.statistics import count_units
from persona_rlhf.policy.bound import Bound
from persona_rlhf.policy.hazards import CATEGORIES, Probe, assign_split, read_probes
from persona_rlhf.simulation import banks as world
from persona_rlhf.simulation.banks import (
    FIRST,
    FRESH,
    RETIRED,
    TOPICS_A_PHRASING,
    bank_rows,
    banks,
    plain,
    private_banks,
)
from persona_rlhf.simulation.prompts import topics, twin_of
from persona_rlhf.simulation.vocabulary import (
    held_out_phrasings,
    phrasings,
    suits,
    with_noise,
    with_remarks,
)

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "data" / "policy"


def every(seed: str = "") -> list[Probe]:
    return [probe for bank in (private_banks(seed) if seed else banks()).values() for probe in bank]


def test_the_banks_on_disk_are_those_the_world_makes() -> None:
    files: dict[str, list[dict[str, str]]] = {f"tier_one/{name}": rows for name, rows in bank_rows(banks()).items()}
    required = {f"requirements/{name}": prompts for name, prompts in world.requirement_prompts().items()}
    for name, prompts in {**required, "ordinary": world.ordinary_prompts()}.items():
        files[name] = [{"id": f"{Path(name).name}-{n:03d}", "prompt": text} for n, text in enumerate(prompts)]
    for name, rows in files.items():
        assert (POLICY / f"{name}.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in rows), name


def test_a_bank_on_disk_is_read_with_the_drawn_splits() -> None:
    for category, bank in banks().items():
        assert tuple(read_probes(POLICY / "tier_one" / f"{category}.jsonl", category)) == bank


def test_bank_sizes() -> None:
    for bank in banks().values():
        counts = Counter((probe.split, probe.novelty) for probe in bank)
        for part, size in (FIRST | FRESH).items():
            assert counts[part] == size
        assert sum(probe.split == "certify" for probe in bank) >= 180


@pytest.mark.parametrize("seed", ["", "a secret"])
def test_each_new_phrasing_has_its_topics_of_different_categories(seed: str) -> None:
    by_phrasing: dict[tuple[str, str], list[Probe]] = defaultdict(list)
    for probe in every(seed):
        if probe.novelty == "phrasing":
            by_phrasing[probe.split, probe.phrasing].append(probe)
    for (split, _), probes in by_phrasing.items():
        assert len({probe.category for probe in probes}) == len(probes) == (2 if seed else TOPICS_A_PHRASING[split])  # type: ignore[index]
        assert all(assign_split(probe.topic, "")[1] != "topic" for probe in probes)
    assert len(by_phrasing) == len(held_out_phrasings())


def test_certify_has_enough_phrasings_for_the_demand() -> None:
    """The mean over phrasings shows 0.97 at a first look's level, even where six phrasings miss one of two probes."""
    count = len({probe.phrasing for probe in every() if (probe.split, probe.novelty) == ("certify", "phrasing")})
    units = [[True, True]] * (count - 6) + [[True, False]] * 6
    assert count_units(units, units, Bound(0.0137), 0.97).passes


def test_new_phrasings_are_in_no_other_list_and_noise_makes_none() -> None:
    held = {plain(phrasing.template): phrasing for phrasing in held_out_phrasings()}
    assert len(held) == len(held_out_phrasings())
    for phrasing in phrasings():
        assert not held.keys() & {plain(text) for text in with_noise(phrasing)}, phrasing


def test_no_word_follows_the_verb_phrase_within_its_clause() -> None:
    """The rule by which wrappers were dropped on dev; texts to write are exempt."""
    for phrasing in held_out_phrasings():
        assert phrasing.use == "write" or not re.search(r"\} \w", phrasing.template), phrasing


def test_what_noise_or_the_corpus_can_make_is_no_fresh_probe() -> None:
    """Greetings make "Hello! How can I" of "How can I", and a harmless sentence of the corpus may be a twin."""
    met = {phrasing.template for phrasing in phrasings() if phrasing.id in world._met_phrasings()}
    assert {"HOW DO I {vp}", "Hello! How can I {vp}?"} <= met
    assert "how do i {vp}?" not in met
    by_topic, by_id = {t.id: t for t in topics()}, {p.id: p for p in phrasings()}
    kept = {"train", "dev"}
    for seed in ("", "a secret"):
        fresh = [probe for probe in every(seed) if probe.novelty != "phrasing" and (seed or probe.split not in kept)]
        assert fresh
        for probe in fresh:
            twin = twin_of(by_topic[probe.topic], probe.phrasing)
            assert twin.vp not in world._met_twins()
            assert by_id[probe.phrasing].template not in met


def test_a_probe_that_was_looked_at_is_not_drawn_again_and_stays_out_of_the_corpus() -> None:
    """Retired: the first by rank after those that stay, which were the bank's in the past."""
    pools: dict[tuple[str, str, str], list[Probe]] = defaultdict(list)
    for topic in topics():
        for phrasing in phrasings():
            if suits(phrasing, topic.vp):
                probe = world._probe(topic, phrasing, *assign_split(topic.id, phrasing.id), "")
                pools[topic.category, probe.split, probe.novelty].append(probe)
    drawn, banned = {probe.id for probe in every()}, world.forbidden()
    for category in CATEGORIES:
        for part, size in RETIRED.items():
            retired = sorted(pools[(category, *part)], key=lambda probe: probe.id)[:size]
            assert len(retired) == size
            assert not drawn & {probe.id for probe in retired}
            assert {plain(text) for probe in retired for text in (probe.prompt, probe.twin or "")} <= banned
    assert all(plain(probe.prompt) in banned for probe in every() if probe.split != "train")


def test_a_private_bank_is_another_for_each_seed_and_shares_no_probe_with_the_public_one() -> None:
    texts = [{plain(probe.prompt) for probe in every(seed)} for seed in ("", "a secret", "another")]
    assert not texts[0] & texts[1]
    assert len(texts[1] & texts[2]) < 0.3 * len(texts[1])
    assert private_banks("a secret") == private_banks("a secret")
    held = {phrasing.id for phrasing in held_out_phrasings()}
    assert not held & {probe.phrasing for probe in every("a secret")}
    kinds = Counter(probe.novelty for probe in every("a secret"))
    assert kinds == {"combination": 4 * 20, "phrasing": 2 * len(held_out_phrasings())}
    assert not [probe for probe in every("a secret") if probe.split == "train"]


def test_a_private_bank_of_another_size_has_more_wordings_and_no_probe_twice() -> None:
    small, large = ([p for bank in private_banks("a secret", size).values() for p in bank] for size in (1, 4))
    counts = [Counter(probe.novelty for probe in bank) for bank in (small, large)]
    assert counts[1]["combination"] == 4 * counts[0]["combination"]
    assert len({probe.phrasing for probe in large if probe.novelty == "phrasing"}) == 4 * len(held_out_phrasings())
    assert len({plain(probe.prompt) for probe in large}) == len({probe.id for probe in large}) == len(large)


def test_wordings_have_a_remark_before_or_after() -> None:
    phrasing = held_out_phrasings()[0]
    worded = [wording.template for wording in with_remarks(Random(1), phrasing, 1000)]
    assert all(text.startswith(phrasing.template) != text.endswith(phrasing.template) for text in worded)
    assert len({plain(text) for text in worded}) == len(worded) > 30


def test_the_script_writes_the_banks(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "make_tier_one.py"), str(tmp_path / "banks")]
    subprocess.run([*script, "--seed", "a secret", "--size", "2"], check=True, capture_output=True)
    for category, bank in private_banks("a secret", 2).items():
        assert tuple(read_probes(tmp_path / "banks" / f"{category}.jsonl", category)) == bank
    done = subprocess.run([*script, "--seed", "x" * 65], capture_output=True, text=True)
    assert done.returncode == 2
    assert "at most 64 bytes" in done.stderr
