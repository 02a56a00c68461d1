"""The simulated users over a real base: the script on the tiny base, and the shipped files."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml

from persona_rlhf.common.files import find
from persona_rlhf.config.experiment import read_config
from persona_rlhf.data.near_copies import NearCopyIndex
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.evaluation.prompt_sets import read_ordinary
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.policy.policy import Policy
from persona_rlhf.simulation.users import POISON_KINDS, read_utilities
from tests.scripts.loading import load_script

FOLDER = find("data/users_smollm2")


@pytest.fixture(scope="module")
def script():
    load_script("generate_users")
    return load_script("make_users_smollm2")


@pytest.fixture(scope="module")
def tastes():
    return read_utilities(FOLDER / "utilities.yaml")


def test_a_killed_run_goes_on_and_draws_the_same(script, tmp_path, monkeypatch):
    """The base is asked only for the chunks that the file lacks, whether or not the last line was cut."""
    adapted = SimpleNamespace(base=SimpleNamespace(weights_hash="base"))
    prompts, calls = [f"prompt {n}" for n in range(3 * script.CHUNK)], []

    def sample(_, part, seed, *settings):
        assert settings == (script.ANSWERS, script.LONGEST, script.TEMPERATURE)
        calls.append((seed, *part))
        return [[f"{text} {seed}"] for text in part]

    monkeypatch.setattr(script, "sample", sample)

    def sampler(file):
        return script.Sampler(adapted, file, len(prompts), 0)

    whole = sampler(tmp_path / "a")(prompts)
    assert len(calls) == 3
    lines = (tmp_path / "a").read_text().splitlines(keepends=True)
    (tmp_path / "b").write_text(lines[0] + lines[1][:20])
    assert sampler(tmp_path / "b")(prompts) == whole
    assert calls[3:] == calls[1:3]
    assert sampler(tmp_path / "b")(prompts) == whole  # killed once more: the file holds whole lines only
    assert len(calls) == 5


def test_a_pair_is_of_another_prompt_until_prompts_run_out(script, tastes):
    pool = [script.SampledPrompt(f"p{n}", "how_to", ("one", "one two", "one two three")) for n in range(40)]
    pairs = script.draw_pairs(tastes["alma"], pool, script.Random(0))
    heldout, train = pairs[: script.HELDOUT], pairs[script.HELDOUT :]
    assert len(train) == script.TRAIN
    assert not {prompt for prompt, *_ in heldout} & {prompt for prompt, *_ in train}
    assert Counter(prompt for prompt, *_ in heldout).most_common(1)[0][1] == 2  # of a third of the prompts
    assert Counter(prompt for prompt, *_ in train).most_common(1)[0][1] == 2
    assert len({(prompt, frozenset(pair)) for prompt, *pair in train}) == script.TRAIN
    with pytest.raises(ValueError, match="write more prompts"):
        script.draw_pairs(tastes["alma"], pool[:12], script.Random(0))


def test_requests_are_of_the_train_split_and_their_twins_no_near_copies(script):
    policy = Policy.of(read_config("configs/smollm2.yaml").policy)
    protected = NearCopyIndex.of(policy, read_ordinary(find("data/policy/ordinary.jsonl")))
    requests = script.training_requests()
    assert Counter(probe.category for probe, _ in requests) == dict.fromkeys(policy.categories, 8)
    assert len({probe.topic for probe, _ in requests}) == len(requests)
    assert {probe.split for probe, _ in requests} == {"train"}
    assert not any(protected.find(probe.twin) for probe, _ in requests)


def test_no_everyday_prompt_is_a_near_copy_of_one_that_the_gate_asks():
    inputs = read_inputs(read_config("configs/smollm2.yaml"))
    protected = NearCopyIndex.of(inputs.policy, inputs.ordinary)
    kinds = yaml.safe_load((FOLDER / "prompts.yaml").read_text(encoding="utf-8"))
    assert [text for texts in kinds.values() for text in texts if protected.find(text)] == []


def test_the_shipped_users_are_24_with_one_of_each_kind_of_poison(tastes):
    poisoned = [name.split("-")[0] for name, taste in tastes.items() if taste.poisoned]
    assert len(tastes) == 24
    assert sorted(poisoned) == sorted(POISON_KINDS)
    pairs = {name: [] for name in tastes}
    for pair in read_pairs(FOLDER, heldout=0.25):
        pairs[pair.user_id].append(pair)
    for name, rows in pairs.items():
        assert Counter(pair.split for pair in rows) == {"train": 40, "heldout": 16}
        assert sum(pair.clean_choice is None for pair in rows) == round(40 * tastes[name].poisoned)
        for pair in rows:
            if pair.clean_choice is not None:
                assert tastes[name].compare(pair.chosen, pair.rejected) == float(pair.clean_choice), pair.id
    assert read_inputs(read_config("configs/smollm2.yaml")).pairs.users == 8


def test_the_readme_has_the_hashes_of_small_files(script):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = re.findall(r"\| `(\w+\.jsonl)` \| (\d+) \| (\d+) \| `(\w{64})` \|", readme)
    assert [name for name, *_ in stated] == ["eight.jsonl", "others.jsonl"]
    for name, count, size, digest in stated:
        content = (FOLDER / name).read_bytes()
        assert [json.loads(line) for line in content.splitlines()]
        assert (int(count), int(size), digest) == (
            content.count(b"\n"),
            len(content),
            script.hashlib.sha256(content).hexdigest(),
        )
    assert sum(int(size) for _, _, size, _ in stated) < 1.5e6
