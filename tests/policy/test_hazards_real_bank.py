"""The tier-one bank for real models: its size, its splits, and that it repeats neither itself nor a public set."""

from collections import Counter, defaultdict
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest

from persona_rlhf.data.readers import RawRow, read_rows
from persona_rlhf.policy.hazards import CATEGORIES, Probe, public_sets, read_probes
from persona_rlhf.policy.judges import NearDuplicateIndex, plain, shingles
from persona_rlhf.policy.policy import Policy
from tests.scripts.loading import load_script

ROOT = Path(__file__).parents[2]
BANK = ROOT / "data" / "policy" / "tier_one_real"
PUBLIC = ROOT.parent / "shared" / "data"  # beside the checkout, where there is one
LANGUAGES = ("en", "fr")
STOP_WORDS = frozenset(
    plain(
        """a about after against all among an and another any are as at be because been before being between both by
        down during each for from had has have her him his i if in into it its me my no not of off on one onto or other
        our out over she so some someone than that the their them then these they this those through to under up us was
        we were when where which while who whom whose with without you your"""
    ).split()
)


@cache
def probes(category: str, language: str) -> tuple[Probe, ...]:
    return tuple(read_probes(BANK / f"{category}.{language}.jsonl", category))


def content_words(text: str) -> frozenset[str]:
    """The words of an English text, without stop words and endings of plurals and possessives."""
    words = (word for word in plain(text.replace("'s", "")).split() if word not in STOP_WORDS)
    return frozenset(word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] != "s" else word for word in words)


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def every(language: str) -> list[Probe]:
    return [probe for category in CATEGORIES for probe in probes(category, language)]


def test_making_it_again_gives_the_same_bytes(tmp_path):
    load_script("make_tier_one_real").make(tmp_path)
    made = sorted(tmp_path.iterdir())
    assert [file.name for file in made] == sorted(file.name for file in BANK.glob("*.jsonl"))
    for file in made:
        assert file.read_bytes() == (BANK / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("language", "least"),
    [
        ("en", {"train": 1100, "dev": 90, "certify": 900, "test": 180}),
        ("fr", {"train": 300, "dev": 20, "certify": 240, "test": 40}),
    ],
)
def test_sizes_by_split(language, least):
    count = Counter(probe.split for probe in every(language))
    assert all(count[split] >= size for split, size in least.items())
    for split in ("dev", "certify", "test"):
        topics = [probe.topic for probe in every(language) if probe.split == split]
        assert len(set(topics)) == len(topics) == count[split]
    phrasings = Counter(probe.topic for probe in every(language) if probe.split == "train")
    assert set(phrasings.values()) == {4}


def test_every_category_certifies_by_enough_topics_for_its_demand():
    for category in CATEGORIES:
        count = Counter(probe.split for probe in probes(category, "en"))
        assert count["certify"] >= 180
        assert count["train"] >= 4 * 60


def test_no_two_topics_share_most_of_their_content_words():
    """The gate counts a topic as one trial, so that two topics differ by more than a synonym."""
    words = {topic.id: content_words(topic.request["en"]) for topic in load_script("make_tier_one_real").read_topics()}
    near = [(one, other) for one, other in combinations(words, 2) if jaccard(words[one], words[other]) > 0.5]
    assert near == []


def test_a_synonym_of_a_line_would_be_a_near_topic():
    one, other = content_words("hide the files of a murderer"), content_words("hide a murderer's old files")
    assert jaccard(one, other) > 0.5 >= jaccard(one, content_words("hide the files of a club"))


def test_every_twin_shares_a_content_word_of_its_request():
    for topic in load_script("make_tier_one_real").read_topics():
        assert content_words(topic.request["en"]) & content_words(topic.twin["en"]), topic.id


def test_no_topic_is_in_two_splits_or_categories():
    found = defaultdict(set)
    for probe in (*every("en"), *every("fr")):
        found[probe.topic].add((probe.split, probe.category))
    assert all(len(places) == 1 for places in found.values())
    assert {p.topic for p in every("fr")} < {p.topic for p in every("en")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_probe_has_a_twin_of_the_same_phrasing(language):
    prompts = {plain(probe.prompt) for probe in every(language)}
    for probe in every(language):
        assert probe.twin is not None
        assert plain(probe.twin) not in prompts
        assert shingles(probe.twin) & shingles(probe.prompt), "the phrasing around both is the same"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_held_out_request_repeats_another_or_a_trained_one(language):
    script = load_script("make_tier_one_real")
    held = NearDuplicateIndex()
    for topic in (topic for topic in script.read_topics() if language in topic.request):
        assert held.near(topic.request[language]) is None, topic.id
        held.add(topic.id, topic.request[language])
    trained = {plain(probe.prompt) for probe in every(language) if probe.split == "train"}
    assert not trained & {plain(probe.prompt) for probe in every(language) if probe.split != "train"}


def test_some_held_out_phrasings_are_never_trained():
    trained = {probe.phrasing for probe in every("en") if probe.split == "train"}
    unseen = [probe for probe in every("en") if probe.split == "certify" and probe.phrasing not in trained]
    assert 0.1 < len(unseen) / 977 < 0.4


def test_the_readme_counts_what_is_there():
    readme = (BANK / "README.md").read_text()
    for category, language in product((*CATEGORIES, "all"), LANGUAGES):
        bank = every(language) if category == "all" else probes(category, language)
        count = Counter(probe.split for probe in bank)
        topics = len({probe.topic for probe in bank if probe.split == "train"})
        held_out = " | ".join(str(count[split]) for split in ("dev", "certify", "test"))
        assert f"| {category} | {language} | {count['train']} ({topics}) | {held_out} |" in readme


def test_the_policy_for_real_models_loads(monkeypatch):
    monkeypatch.chdir(ROOT)
    policy = Policy.read(["configs/policy/real/tier_one.yaml", "configs/policy/tier_two.yaml"])
    assert policy.categories == CATEGORIES
    assert len(policy.probes("certify")) == 977 + 247
    assert {probe.novelty for probe in policy.probes("certify")} == {"topic"}


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public sets are not beside this checkout (../shared/data)")
@pytest.mark.parametrize(
    "file",
    [
        "advbench/advbench.csv",
        "harmbench/harmbench_behaviors_text_all.csv",
        "simplesafetytests/sst.csv",
        "strongreject/strongreject.csv",
        "xstest/xstest_prompts.csv",
    ],
)
def test_nothing_is_or_nearly_is_a_prompt_of_a_public_set(file):
    source = public_sets()[file.split("/")[0]]
    theirs, held = set(), NearDuplicateIndex()
    for row in read_rows(PUBLIC / file):
        assert isinstance(row, RawRow)
        text = source.text(row.row)
        theirs.add(plain(text))
        held.add(f"line {row.line}", text)
    for probe in (*every("en"), *every("fr")):
        for text in (probe.prompt, probe.twin):
            assert plain(text) not in theirs, probe.id
            assert held.near(text) is None, (probe.id, held.near(text))
