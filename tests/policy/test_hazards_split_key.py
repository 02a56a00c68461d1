from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.common.files import shipped_root
from persona_rlhf.policy.hazards import CATEGORIES, assign_split, assign_topic, read_probes

KEYS = st.binary(min_size=16, max_size=32)
BANKS = [
    (shipped_root() / f"data/policy/{folder}/{category}{language}.jsonl", category)
    for folder, language in (("tier_one", ""), ("tier_one_real", ".en"))
    for category in CATEGORIES
]


@given(st.text(), st.text(), KEYS)
def test_a_key_moves_nothing_into_or_out_of_train(topic: str, phrasing: str, key: bytes):
    split, novelty = assign_split(topic, phrasing)
    own, part = assign_split(topic, phrasing, key)
    assert (own == "train") == (split == "train")
    assert part == novelty
    assert own != "certify" or novelty != "topic"
    assert (assign_topic(topic, key=key) == "train") == (assign_topic(topic) == "train")
    assert assign_topic(topic, held_out=True, key=key) != "train"


@pytest.mark.parametrize(("file", "category"), BANKS)
def test_shipped_probes_of_train_stay_and_the_rest_keeps_its_proportions(file: Path, category: str):
    public, own = read_probes(file, category), read_probes(file, category, b"a key of sixteen")
    assert [p for p in own if p.split == "train"] == [p for p in public if p.split == "train"]
    assert [p._replace(split="dev") for p in own] == [p._replace(split="dev") for p in public]
    moved = sum(one.split != two.split for one, two in zip(public, own, strict=True))
    assert moved > 5


def test_a_topic_or_phrasing_is_kept_out_whole_under_a_key():
    drawn = [(t, p, *assign_split(f"t{t}", f"p{p}", b"key")) for t in range(60) for p in range(60)]
    certified = {p for _, p, split, novelty in drawn if (split, novelty) == ("certify", "phrasing")}
    assert certified
    for _, phrasing, split, novelty in drawn:
        assert novelty != "phrasing" or (split == "certify") == (phrasing in certified)


def test_the_proportions_are_those_of_the_public_split():
    topics = [f"topic {n}" for n in range(4000)]
    public, own = (Counter(assign_topic(topic, key=key) for topic in topics) for key in (None, b"key"))
    assert own["train"] == public["train"]
    for split in ("dev", "certify", "test"):
        assert own[split] == pytest.approx(public[split], abs=120)
    pairs = [(f"t{t}", f"p{p}") for t in range(70) for p in range(70)]
    before, after = (Counter(assign_split(*pair, key) for pair in pairs) for key in (None, b"key"))
    for part in (("dev", "combination"), ("certify", "combination"), ("test", "combination")):
        assert after[part] == pytest.approx(before[part], abs=100)
