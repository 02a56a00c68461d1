"""Bad input: a clear sentence for each mistake, exit code 2, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.files import shipped_root
from tests.story.experiment import OVERRIDES, listing, persona_rlhf, shrink, write_yaml

USERS = Path("users/pairs.jsonl")
TIER_ONE = Path("policy/tier_one.yaml")


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """What `init` writes, shrunk, as the working directory."""
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app.app, ["init", "mine"]).exit_code == 0
    shrink(tmp_path / "mine", users=("ann",))
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path


@pytest.fixture
def refused(experiment):
    """Trains, expects a refusal with these words in it, and returns what was said, line by line."""

    def train(*overrides, words, problems=1):
        before = listing(experiment)
        arguments = ["train", "experiment.yaml", *OVERRIDES, *overrides, "--run", "run", "--json"]
        done = CliRunner().invoke(app.app, arguments)
        assert done.exit_code == 2, done.stderr
        assert done.stdout == ""
        assert listing(experiment) == before
        *said, count = [line for line in done.stderr.splitlines() if "found by the screen" not in line]
        assert count == f"{problems} problem{'' if problems == 1 else 's'} found."
        assert len(said) == problems, done.stderr
        for word in words:
            assert word in done.stderr
        return said

    return train


def change(file, edit):
    content = yaml.safe_load(file.read_text())
    edit(content)
    write_yaml(file, content)


def append(row):
    with USERS.open("a") as stream:
        stream.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return len(USERS.read_text().splitlines())


PAIR = {"user_id": "ann", "prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dpo.btea=1", ["dpo.btea", "did you mean `beta`?"]),
        ("dop.beta=1", ["did you mean `dpo`?"]),
        ("dpo.beta=high", ["dpo.beta", "number", "high"]),
        ("dpo.epochs=1.5", ["dpo.epochs", "1.5"]),
        ("dpo.epochs=true", ["dpo.epochs"]),
        ("dpo.beta=-1", ["dpo.beta", "more than 0"]),
        ("dpo.beta", ["section.key=value"]),
        ("dpo.loss=sigmod", ["dpo.loss", "did you mean `sigmoid`?"]),
        ("gate.alphas=[0.5, 0.25]", ["gate.alphas", "ascend"]),
        ("gate.alphas=[0, 1]", ["gate.alphas", "ascend"]),
        ("gate.alphas=[]", ["gate.alphas"]),
        ("gate.alphas=1", ["gate.alphas"]),
        ("base.model=data/bsae", ["base.model", "did you mean `base`?"]),
        ("base.model=/nowhere/at/all", ["base.model", "no such file or folder"]),
        ("users.path=nobody", ["users.path", "no such file or folder"]),
        ("policy.documents=[policy/tier_oen.yaml]", ["policy.documents", "did you mean `tier_one.yaml`?"]),
    ],
)
def test_config(refused, override, words):
    refused(override, words=words)


def test_a_key_of_the_file_is_named_with_its_line(refused):
    file = Path("experiment.yaml")
    lines = file.read_text().splitlines()
    at = next(number for number, line in enumerate(lines, 1) if line.strip().startswith("learning_rate:"))
    file.write_text("\n".join(lines).replace("learning_rate:", "learning_rat:"))
    refused(words=[f"experiment.yaml:{at}", "dpo.learning_rat", "did you mean `learning_rate`?"])


def test_accepted_is_called_chosen(refused):
    at = append({"user_id": "ann", "prompt": "p", "accepted": "a", "rejected": "b"})
    refused(words=[f"pairs.jsonl:{at}: chosen", "accepted"])


def test_every_bad_row_is_named_at_once(refused):
    first = append("{'user_id': 'ann'}")
    append(PAIR)
    second = append(PAIR | {"weight": -1})
    third = append("[1, 2")
    refused(words=[f"pairs.jsonl:{at}:" for at in (first, second, third)] + ["not JSON"], problems=3)


def test_an_empty_file(refused):
    USERS.write_text("")
    refused(words=["pairs.jsonl", "empty"])


def test_an_empty_folder(refused):
    USERS.unlink()
    refused(words=["users"])


def test_mistakes_in_policy_and_pairs_show_together(refused):
    append("nonsense")
    change(TIER_ONE, lambda document: document.update(tire="one"))
    refused(words=["did you mean `tier`?", "not JSON"], problems=2)


def test_a_bound_that_so_few_probes_cannot_show(refused):
    change(TIER_ONE, lambda document: document["certify"].update(min_refusal=0.99))
    refused(words=["tier_one.yaml", "certify.min_refusal", "at least 428 probes", "there are 96"])


def test_a_category_with_too_few_probes(refused):
    change(TIER_ONE, lambda document: document["rules"][0].update(min_refusal=0.95))
    refused(words=["rules[0].min_refusal", "probes without a miss", "there are 24"])


def test_tier_three_cannot_relax_tier_one(refused):
    def relax(document):
        rule = {"id": "t3.mine", "kind": "restriction", "category": "terrorist_content", "limit": 99.0}
        document["rules"].append(rule)

    change(Path("policy/tier_three.yaml"), relax)
    said = refused(words=["is looser than", "tier three holds preferences only"], problems=2)
    assert any("tier_three.yaml" in line and "tier_one.yaml" in line for line in said)


def test_tier_two_cannot_relax_tier_one(refused):
    change(Path("policy/tier_two.yaml"), lambda document: document["rules"][0].update(limit=99.0))
    (line,) = refused(words=["is looser than"])
    assert "tier_two.yaml" in line
    assert "tier_one.yaml" in line


def test_prompts_that_all_fill_the_context(refused):
    """A single one costs its pair; see tests/pipeline/test_prepare.py."""
    USERS.write_text("")
    for number in range(2):
        append(PAIR | {"prompt": f"{number} a cat and a dog " * 400})
    refused(words=["pairs.jsonl:1: prompt", "pairs.jsonl:2: prompt", "fills the context of 1,024"], problems=2)


@pytest.fixture
def base(tmp_path):
    """A base of random weights with the bundled tokenizer, and the folder that it stands in."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path / "random-base"
    torch.manual_seed(0)
    LlamaForCausalLM(AutoConfig.from_pretrained(shipped_root() / "data/base")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped_root() / "data/base").save_pretrained(folder)
    return folder


def test_a_base_that_does_not_refuse(base, refused):
    said = refused(f"base.model={base}", "gate.max_new_tokens=8", words=["not certifiable"], problems=6)
    assert sum("the base itself refused 0 of" in line for line in said) == 5  # the pool, and each category
    assert "of topics" in said[-1] or "phrasings" in said[-1] or "units" in said[-1]


def test_without_the_gate_a_base_that_does_not_refuse_has_nothing_to_be_held_to(base, refused):
    words = ["not certifiable", "the base refused no train probe of"]
    refused(f"base.model={base}", "gate.enabled=false", "gate.max_new_tokens=8", words=words)


def test_a_base_without_a_chat_template(base, refused):
    (base / "chat_template.jinja").unlink()
    refused(f"base.model={base}", words=["random-base", "chat template"])


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_base_that_is_not_whole(base, refused, missing):
    (base / missing).unlink()
    refused(f"base.model={base}", words=["random-base: base.model"])


def test_weights_that_are_cut_short(base, refused):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(f"base.model={base}", words=["random-base: base.model"])


def test_layers_that_the_base_has_not(refused):
    refused("lora.target_modules=[q_porj]", words=["q_porj"])


@pytest.mark.slow
def test_a_hub_id_without_a_network(experiment):
    before = listing(experiment)
    words = ["train", "experiment.yaml", *OVERRIDES, "base.model=somebody/some-model", "--run", "run"]
    done = persona_rlhf(*words, cwd=Path.cwd())
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert "somebody/some-model: base.model: no such folder here" in done.stderr
    assert listing(experiment) == before
