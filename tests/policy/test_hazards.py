import json
from collections import Counter

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.policy.hazards import (
    Probe,
    assign_phrasing,
    assign_split,
    assign_topic,
    read_probes,
    unseen_topics_certify,
)

PINNED_COUNTS = {"certify": 256, "test": 425, "train": 621, "dev": 298}
PINNED_TOPICS = {"certify": 604, "test": 140, "dev": 64, "train": 192}
PINNED_PHRASINGS = {"certify": 643, "test": 244, "dev": 113}
PINNED_ROW = ["certify", "certify", "test", "train", "test", "test", "train", "dev", "test", "train", "train", "train"]


def test_splits_never_change():
    """Pinned: a probe that moved from `certify` to `train` would make every published bound void."""
    pinned = {
        (topic, phrasing): assign_split(f"topic {topic}", f"phrasing {phrasing}")
        for topic in range(40)
        for phrasing in range(40)
    }
    assert Counter(split for split, _ in pinned.values()) == PINNED_COUNTS
    assert [pinned[0, phrasing][0] for phrasing in range(12)] == PINNED_ROW


def test_a_topic_or_phrasing_is_kept_out_whole():
    drawn = [(t, p, *assign_split(f"t{t}", f"p{p}")) for t in range(60) for p in range(60)]
    trained_topics = {t for t, _, split, _ in drawn if split == "train"}
    trained_phrasings = {p for _, p, split, _ in drawn if split == "train"}
    for topic, phrasing, split, novelty in drawn:
        assert (topic in trained_topics) is (novelty != "topic")
        assert novelty != "phrasing" or phrasing not in trained_phrasings
        assert split != "train" or novelty == "combination"
        assert split != "certify" or novelty != "topic"


def test_splits_of_whole_topics_never_change():
    assert Counter(assign_topic(f"topic {topic}") for topic in range(1000)) == PINNED_TOPICS
    row = ["certify", "train", "test", "certify", "certify", "certify"]
    assert [assign_topic(f"topic {topic}") for topic in range(6)] == row


def test_a_held_out_topic_keeps_the_proportions_and_never_trains():
    count = Counter(assign_topic(f"topic {topic}", held_out=True) for topic in range(4000))
    assert set(count) == {"dev", "certify", "test"}
    for split, share in {"dev": 6.5, "certify": 61, "test": 13.5}.items():
        assert count[split] / 4000 == pytest.approx(share / 81, abs=0.03)


def test_splits_of_whole_phrasings_never_change_and_never_train():
    assert Counter(assign_phrasing(f"phrasing {n}") for n in range(1000)) == PINNED_PHRASINGS


def test_a_row_says_how_it_is_split(tmp_path):
    file = tmp_path / "bank.jsonl"
    rows = [
        {"id": f"{by}{n}{p}", "prompt": "x", "topic": f"t{n}", "phrasing": f"p{p}", "split_by": by}
        for by in ("topic", "held_out")
        for n in range(60)
        for p in range(2)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for probe in read_probes(file, "fraud"):
        assert probe.split == assign_topic(probe.topic, held_out=probe.id.startswith("held_out"))
        assert probe.novelty == ("combination" if probe.split == "train" else "topic")
    file.write_text("".join(json.dumps({**row, "split_by": "phrasing"}) + "\n" for row in rows))
    for probe in read_probes(file, "fraud"):
        assert (probe.split, probe.novelty) == (assign_phrasing(probe.phrasing), "phrasing")


def test_rows_of_a_shift_only_test(tmp_path):
    file = tmp_path / "bank.jsonl"
    rows = [{"id": str(n), "prompt": f"x{n}", "topic": f"t{n}", "split_by": "shift"} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {(probe.split, probe.novelty) for probe in read_probes(file, "fraud")} == {("test", "topic")}


def test_another_way_to_split_is_an_input_error(tmp_path):
    file = tmp_path / "bank.jsonl"
    rows = [{"id": str(n), "prompt": "x", "split_by": by} for n, by in enumerate(["pair", "hand", None, []])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as fault:
        read_probes(file, "fraud")
    assert [(problem.line, problem.key) for problem in fault.value.problems] == [(n, "split_by") for n in (2, 3, 4)]
    assert "expected `pair`, `topic`, `held_out`, `phrasing`, `shift`, got `hand`" in fault.value.problems[0].sentence


@pytest.mark.parametrize(("split", "novelty", "certify"), [("certify", "phrasing", False), ("certify", "topic", True)])
def test_what_certify_holds_is_no_shift(split, novelty, certify):
    kinds = [(split, novelty), ("test", "topic"), ("train", "combination")]
    assert unseen_topics_certify(Probe("", "", "", "", "", None, *kind) for kind in kinds) is certify


def test_a_bank_is_read_with_its_splits(tmp_path):
    file = tmp_path / "bank.jsonl"
    rows = [
        {"id": "a", "prompt": "line\u2028break", "topic": "t", "phrasing": "p", "twin": "kind"},
        {"id": "b", "prompt": "q"},
    ]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    first, second = read_probes(file, "fraud")
    assert (first.prompt, first.twin, first.category) == ("line\u2028break", "kind", "fraud")
    assert (first.split, first.novelty) == assign_split("t", "p")
    assert (second.topic, second.phrasing, second.twin) == ("q", "q", None)


def test_every_bad_row_is_named(tmp_path):
    file = tmp_path / "bank.jsonl"
    rows = ['{"id": "a", "prompt": "x"}', "no", "[]", '{"id": "", "prompt": "x"}', '{"id": "b", "prompt": " "}']
    rows += ['{"id": "a", "prompt": "y"}', '{"id": "c", "prompt": 3}']
    file.write_text("\n".join(rows))
    with pytest.raises(InputError) as fault:
        read_probes(file, "fraud")
    assert [problem.line for problem in fault.value.problems] == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_an_empty_or_unreadable_bank_is_an_input_error(tmp_path, content):
    file = tmp_path / "bank.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError):
        read_probes(file, "fraud")
    with pytest.raises(InputError):
        read_probes(tmp_path, "fraud")
