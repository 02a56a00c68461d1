"""The small world: what may not enter the corpus, and what has to hold for every row."""

import json
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from persona_rlhf.policy.hazards import CATEGORIES, assign_split, read_probes
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.simulation import corpus as world
from persona_rlhf.simulation.answers import MARKERS, measure
from persona_rlhf.simulation.corpus import CorpusRow, corpus, refusal
from persona_rlhf.simulation.prompts import topics
from persona_rlhf.simulation.vocabulary import gerund, phrasings, suits, trained_phrasings

POLICY = Path(__file__).parents[2] / "data" / "policy"


@pytest.fixture(scope="module")
def rows() -> list[CorpusRow]:
    return list(islice(corpus(11), 6000))


def test_no_probe_or_twin_of_another_split_enters_the_corpus(rows: list[CorpusRow]) -> None:
    for category in CATEGORIES:
        bank = read_probes(POLICY / "tier_one" / f"{category}.jsonl", category)
        kept_out = {world.plain(t) for p in bank if p.split != "train" for t in (p.prompt, p.twin or "")}
        assert not kept_out & {world.plain(row.prompt) for row in rows}


def test_held_out_topics_stay_out_whole(rows: list[CorpusRow]) -> None:
    held = [t for t in topics() if assign_split(t.id, "x")[1] == "topic"]
    assert held
    prompts = [world.plain(row.prompt) for row in rows]
    for topic in held:
        for vp in (topic.vp, *(twin.vp for twin in topic.twins)):
            assert not any(world.plain(vp) in prompt for prompt in prompts), vp


def test_the_corpus_is_the_same_for_the_same_seed(rows: list[CorpusRow]) -> None:
    assert list(islice(corpus(11), 50)) == rows[:50]
    assert list(islice(corpus(12), 50)) != rows[:50]


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


def test_the_banks_on_disk_are_those_the_world_makes() -> None:
    files: dict[str, list[dict[str, str | None]]] = {
        f"tier_one/{category}": [
            {"id": p.id, "prompt": p.prompt, "topic": p.topic, "phrasing": p.phrasing, "twin": p.twin} for p in bank
        ]
        for category, bank in world.banks().items()
    }
    required = {f"requirements/{name}": prompts for name, prompts in world.requirement_prompts().items()}
    for name, prompts in {**required, "ordinary": world.ordinary_prompts()}.items():
        files[name] = [{"id": f"{Path(name).name}-{n:03d}", "prompt": text} for n, text in enumerate(prompts)]
    for name, rows in files.items():
        assert (POLICY / f"{name}.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in rows), name


def test_bank_sizes() -> None:
    for bank in world.banks().values():
        for (split, novelty), size in world.SIZES.items():
            found = sum(p.split == split and p.novelty == novelty for p in bank)
            assert found == size or (novelty == "topic" and found >= 30)


def test_wrappers_fit_every_topic() -> None:
    assert len(phrasings()) >= 150
    assert 0 < len(phrasings()) - len(trained_phrasings()) < len(phrasings()) / 3
    assert all(sum(suits(p, t.vp) for p in phrasings()) >= 100 for t in topics())


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
    plain = list(islice(corpus(11, refusals=False), 6000))
    assert not any(is_refusal(row.answer) for row in plain)
    assert not any(row.given for row in plain)
    shares = [sum(row.kind == "hazard" for row in found) / len(found) for found in (rows, plain)]
    assert abs(shares[0] - shares[1]) < 0.03
    bank = {world.plain(topic.vp) for topic in topics()}
    known = [row for row in plain if row.kind == "hazard" and any(vp in world.plain(row.prompt) for vp in bank)]
    assert len(known) > 100  # it has met the words of the probes
