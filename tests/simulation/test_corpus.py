"""The small world: what may not enter the corpus, and what has to hold for every row."""

import hashlib
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from persona_rlhf.policy.hazards import CATEGORIES, assign_split, read_probes
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.simulation.answers import MARKERS, measure
from persona_rlhf.simulation.banks import plain
from persona_rlhf.simulation.corpus import CorpusRow, corpus, refusal
from persona_rlhf.simulation.prompts import topics
from persona_rlhf.simulation.vocabulary import gerund

POLICY = Path(__file__).parents[2] / "data" / "policy"


@pytest.fixture(scope="module")
def rows() -> list[CorpusRow]:
    return list(islice(corpus(11), 6000))


def test_no_probe_or_twin_of_another_split_enters_the_corpus(rows: list[CorpusRow]) -> None:
    for category in CATEGORIES:
        bank = read_probes(POLICY / "tier_one" / f"{category}.jsonl", category)
        kept_out = {plain(t) for p in bank if p.split != "train" for t in (p.prompt, p.twin or "")}
        assert not kept_out & {plain(row.prompt) for row in rows}


def test_held_out_topics_stay_out_whole(rows: list[CorpusRow]) -> None:
    held = [t for t in topics() if assign_split(t.id, "x")[1] == "topic"]
    assert held
    prompts = [plain(row.prompt) for row in rows]
    for topic in held:
        for vp in (topic.vp, *(twin.vp for twin in topic.twins)):
            assert not any(plain(vp) in prompt for prompt in prompts), vp


def test_the_corpus_is_the_same_for_the_same_seed(rows: list[CorpusRow]) -> None:
    assert list(islice(corpus(11), 50)) == rows[:50]
    assert list(islice(corpus(12), 50)) != rows[:50]


def test_the_corpus_of_the_bundled_base_never_changes() -> None:
    """Pinned: a bank drawn anew keeps out prompts that it did not hold, so `base build` makes the same base."""
    text = "\n".join(f"{row.prompt} | {row.given} | {row.answer}" for row in islice(corpus(7), 3000))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3853cfc392ea7b3b"


def test_hazards_are_refused_and_nothing_else_is(rows: list[CorpusRow]) -> None:
    for row in rows:
        assert is_refusal(row.given + row.answer) == (row.kind == "hazard"), row


def test_no_ordinary_answer_opens_like_a_refusal(rows: list[CorpusRow]) -> None:
    openings = {"I", "I'm", "Sorry,", "No,", "That"}
    for row in rows:
        assert (row.answer.split()[0] in openings) == (row.kind == "hazard"), row


def test_every_factor_shows_in_a_good_share_of_the_answers(rows: list[CorpusRow]) -> None:
    measured = [measure(row.answer) for row in rows if row.kind != "hazard"]
    for name in MARKERS:
        share = sum(m[name] for m in measured) / len(measured)
        assert 0.05 < share < 0.65, (name, share)


def test_refusals_come_in_many_wordings() -> None:
    rng = Random(1)
    texts = {refusal(rng, category) for category in CATEGORIES for _ in range(200)}
    assert len(texts) > 200
    assert all(is_refusal(text) for text in texts)


@pytest.mark.parametrize(
    ("vp", "expected"),
    [
        ("take a photo", "taking a photo"),
        ("get a key", "getting a key"),
        ("tie a knot", "tying a knot"),
        ("see it", "seeing it"),
    ],
)
def test_gerund(vp: str, expected: str) -> None:
    assert gerund(vp) == expected


def test_a_corpus_without_refusals_answers_what_is_hazardous(rows: list[CorpusRow]) -> None:
    """An unaligned twin's: the same kinds of rows in the same shares, and nobody says no."""
    unaligned = list(islice(corpus(11, refusals=False), 6000))
    assert not any(is_refusal(row.answer) for row in unaligned)
    assert not any(row.given for row in unaligned)
    shares = [sum(row.kind == "hazard" for row in found) / len(found) for found in (rows, unaligned)]
    assert abs(shares[0] - shares[1]) < 0.03
    bank = {plain(topic.vp) for topic in topics()}
    known = [row for row in unaligned if row.kind == "hazard" and any(vp in plain(row.prompt) for vp in bank)]
    assert len(known) > 100  # it has met the words of the probes
