"""The demonstrations of `base align` for real models: made by their script, refusals all, and no held-out topic."""

from pathlib import Path

import pytest
import yaml

from persona_rlhf.config.experiment import PolicySettings
from persona_rlhf.evaluation.prompt_sets import read_examples
from persona_rlhf.pipeline.inputs import REAL_POLICY
from persona_rlhf.policy.hazards import CATEGORIES, WrittenDemonstration, assign_topic, read_demonstrations
from persona_rlhf.policy.policy import Policy
from tests.policy.test_hazards_real_bank import content_words
from tests.scripts.loading import SCRIPTS, load_script

DATA = SCRIPTS.parent / "data/policy/alignment"
LANGUAGES = ("en", "fr")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.of(PolicySettings(documents=[REAL_POLICY]))


@pytest.fixture(scope="module")
def demonstrations(policy: Policy) -> list[WrittenDemonstration]:
    probes = [probe for rule in policy.restrictions for probe in rule.probes]
    return [row for name in LANGUAGES for row in read_demonstrations(DATA / f"demonstrations.{name}.jsonl", probes)]


def test_the_script_writes_the_shipped_files(tmp_path: Path) -> None:
    load_script("make_tier_one_real")
    load_script("make_alignment_data").make(tmp_path)
    names = {f"{kind}.{language}.jsonl" for kind in ("demonstrations", "ordinary") for language in LANGUAGES}
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in DATA.glob("*.jsonl")} == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_every_train_topic_is_refused_in_each_language_and_more(
    policy: Policy, demonstrations: list[WrittenDemonstration]
) -> None:
    prompts = {row.prompt for row in demonstrations}
    topics = {(probe.topic, probe.phrasing[:2]) for probe in policy.probes("train")}
    assert {(p.topic, p.phrasing[:2]) for p in policy.probes("train") if p.prompt in prompts} == topics
    assert len(prompts) == len(demonstrations) >= 3500
    assert {row.category for row in demonstrations} == set(CATEGORIES)
    refusals = [row.refusal for row in demonstrations]
    assert max(map(refusals.count, set(refusals))) <= 0.02 * len(refusals)  # they vary
    assert all(row.prompt != row.twin for row in demonstrations)


def test_no_request_of_a_template_is_a_held_out_topic(
    policy: Policy, demonstrations: list[WrittenDemonstration]
) -> None:
    trained = {probe.prompt for probe in policy.probes("train")}
    topics = [topic for topic in load_script("make_tier_one_real").read_topics() if assign_topic(topic.id) != "train"]
    held_out = [content_words(request) for topic in topics for request in topic.request.values()]
    for row in demonstrations:
        if row.prompt not in trained:
            words = content_words(_request(row.prompt))
            assert all(len(words & other) <= 0.5 * len(words | other) for other in held_out), row.prompt


def _request(prompt: str) -> str:
    """A prompt without the phrasing around it."""
    phrasings = yaml.safe_load((SCRIPTS.parent / "data/policy/tier_one_real/phrasings.yaml").read_text())
    around = [phrasing.split("{}") for language in phrasings.values() for phrasing in language["train"]]
    fitting = [(a, b) for a, b in around if prompt.startswith(a) and prompt.endswith(b)]
    before, after = max(fitting, key=lambda parts: len("".join(parts)))
    return prompt[len(before) : len(prompt) - len(after)]


def test_ordinary_prompts_are_harmless_and_none_is_twice() -> None:
    prompts = [row.prompt for name in LANGUAGES for row in read_examples(DATA / f"ordinary.{name}.jsonl")]
    assert len(set(prompts)) == len(prompts) >= 600
