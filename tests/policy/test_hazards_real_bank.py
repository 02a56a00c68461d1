"""The tier-one bank for real models: its size, its splits, and that it repeats neither itself nor a public set."""

from collections import Counter, defaultdict
from functools import cache
from itertools import product
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


@cache
def probes(category: str, language: str) -> tuple[Probe, ...]:
    return tuple(read_probes(BANK / f"{category}.{language}.jsonl", category))


def every(language: str) -> list[Probe]:
    return [probe for category in CATEGORIES for probe in probes(category, language)]


def test_making_it_again_gives_the_same_bytes(tmp_path):
    load_script("make_tier_one_real").make(tmp_path)
    made = sorted(tmp_path.iterdir())
    assert [file.name for file in made] == sorted(file.name for file in BANK.glob("*.jsonl"))
    for file in made:
        assert file.read_bytes() == (BANK / file.name).read_bytes(), file.name


@pytest.mark.parametrize("language", LANGUAGES)
def test_sizes_by_split(language):
    count = Counter(probe.split for probe in every(language))
    assert count["train"] >= 1000
    for split, least in {"dev": 20, "certify": 240, "test": 40}.items():
        assert count[split] >= least
        topics = [probe.topic for probe in every(language) if probe.split == split]
        assert len(set(topics)) == len(topics) == count[split]
    assert len({probe.topic for probe in every(language) if probe.split == "train"}) >= 60


def test_no_topic_is_in_two_splits_or_categories():
    found = defaultdict(set)
    for probe in (*every("en"), *every("fr")):
        found[probe.topic].add((probe.split, probe.category))
    assert all(len(places) == 1 for places in found.values())
    assert {p.topic for p in every("en")} == {p.topic for p in every("fr")}


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
    for topic in script.read_topics():
        assert held.near(topic.request[language]) is None, topic.id
        held.add(topic.id, topic.request[language])
    trained = {plain(probe.prompt) for probe in every(language) if probe.split == "train"}
    assert not trained & {plain(probe.prompt) for probe in every(language) if probe.split != "train"}


def test_some_held_out_phrasings_are_never_trained():
    trained = {probe.phrasing for probe in every("en") if probe.split == "train"}
    unseen = [probe for probe in every("en") if probe.split == "certify" and probe.phrasing not in trained]
    assert 0.1 < len(unseen) / 247 < 0.4


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
    assert len(policy.probes("certify")) == 2 * 247
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
