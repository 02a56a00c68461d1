"""Each rule of the loaders against an adapter that breaks it, and against one that breaks none."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_rlhf.common.files import slug
from persona_rlhf.release.compatibility import lint, max_lora_rank
from persona_rlhf.release.manifest import MANIFEST, rendered, self_hash
from persona_rlhf.release.verify import verify

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SIDES = ("lora_A", "lora_B")


CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somebody/base",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
}
CARD = """---
base_model: somebody/base
library_name: peft
pipeline_tag: text-generation
model-index:
- name: x
  results: []
---
# A card
"""


@pytest.fixture
def adapter(tmp_path):
    """The least folder that every loader takes."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "README.md").write_text(CARD)
    names = [A.replace("q_proj", target).replace("lora_A", side) for target in ("q_proj", "v_proj") for side in SIDES]
    tensors = {name: torch.zeros((4, 32) if "lora_A" in name else (32, 4)) for name in names}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weights(folder, **changes):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata={"format": "pt"})


def card(folder, before, after):
    file = folder / "README.md"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


def renamed(target):
    """All adapters of q_proj under another name, in weights and config."""

    def break_it(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        moved = {name.replace("self_attn.q_proj", target): tensor for name, tensor in tensors.items()}
        save_file(moved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        config(folder, target_modules=[target if name == "q_proj" else name for name in names])

    return break_it


REFUSED = {
    "peft_type": (lambda f: config(f, peft_type="LOHA"), "PEFT: peft_type is 'LOHA'"),
    "task_type": (lambda f: config(f, task_type="SEQ_CLS"), "PEFT: task_type is 'SEQ_CLS'"),
    "no rank": (lambda f: config(f, r=0), "vLLM: r is 0"),
    "rank that is no number": (lambda f: config(f, r=True), "vLLM: r is True"),
    "rank above any server's": (lambda f: config(f, r=1024), "vLLM: r is 1024; it serves adapters to rank 512"),
    "no alpha": (lambda f: config(f, lora_alpha=None), "vLLM: lora_alpha is None"),
    "bias": (lambda f: config(f, bias="lora_only"), "vLLM: bias is 'lora_only'"),
    "modules_to_save": (lambda f: config(f, modules_to_save=["lm_head"]), "vLLM: modules_to_save holds ['lm_head']"),
    "DoRA": (lambda f: config(f, use_dora=True), "vLLM: it is a DoRA adapter"),
    "lora_bias": (lambda f: config(f, lora_bias=True), "vLLM: lora_bias is set"),
    "activated LoRA": (lambda f: config(f, alora_invocation_tokens=[1]), "vLLM: alora_invocation_tokens is set"),
    "replicated layers": (lambda f: config(f, layer_replication=[[0, 1]]), "vLLM: layer_replication is set"),
    "QALoRA": (lambda f: config(f, use_qalora=True), "vLLM: use_qalora is set"),
    "BD-LoRA": (lambda f: config(f, use_bdlora={"nblocks": 2}), "vLLM: use_bdlora is set"),
    "parameters": (lambda f: config(f, target_parameters=["experts.w"]), "vLLM: target_parameters is set"),
    "PiSSA": (lambda f: config(f, init_lora_weights="pissa_niter_4"), "vLLM: init_lora_weights is 'pissa_niter_4'"),
    "rsLoRA": (lambda f: config(f, use_rslora=True), "llama.cpp: use_rslora"),
    "alpha_pattern": (lambda f: config(f, alpha_pattern={"q_proj": 4}), "llama.cpp: alpha_pattern"),
    "a folder as base": (lambda f: config(f, base_model_name_or_path="/home/me/base"), "every loader: base_model_name"),
    "a drive as base": (lambda f: config(f, base_model_name_or_path="C:base"), "every loader: base_model_name"),
    "no base": (lambda f: config(f, base_model_name_or_path=None), "every loader: base_model_name"),
    "targets that are no list": (
        lambda f: config(f, target_modules="all-linear"),
        "vLLM: target_modules is 'all-linear'",
    ),
    "no targets": (lambda f: config(f, target_modules=[]), "vLLM: target_modules is []"),
    "a target without weights": (
        lambda f: config(f, target_modules=["q_proj", "v_proj", "w1"]),
        "PEFT: target_modules names `w1`",
    ),
    "weights without a target": (
        lambda f: config(f, target_modules=["v_proj"]),
        "PEFT: target_modules does not name `model.layers.0.self_attn.q_proj`",
    ),
    "an embedding": (
        lambda f: weights(f, **{"base_model.model.model.embed_tokens.weight": torch.zeros(4, 4)}),
        "llama.cpp: the weights hold an embedding",
    ),
    "an adapted embedding": (
        lambda f: weights(f, **{"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 4)}),
        "llama.cpp: the weights hold an embedding",
    ),
    "a DoRA vector": (
        lambda f: weights(f, **{A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(4)}),
        "vLLM: the weights hold `base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector`",
    ),
    "a bias among the weights": (
        lambda f: weights(f, **{A.replace("lora_A.weight", "bias"): torch.zeros(4)}),
        "which is neither lora_A nor lora_B",
    ),
    "a name without PEFT's prefix": (
        lambda f: weights(f, **{A.removeprefix("base_model.model."): torch.zeros(4, 32)}),
        "which is neither lora_A nor lora_B",
    ),
    "whole numbers": (lambda f: weights(f, **{A: torch.zeros(4, 32, dtype=torch.int8)}), "is of type I8"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "every loader: a file cannot be read"),
    "a config that is none": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no object"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"0"),
        "every loader: a file cannot be read",
    ),
    "a card without front matter": (
        lambda f: (f / "README.md").write_text("# Hi\n"),
        "README.md has library_name",
    ),
    "a card of something else": (
        lambda f: card(f, "library_name: peft", "library_name: transformers"),
        "the hub: README.md has library_name: transformers",
    ),
    "a card that is no YAML": (
        lambda f: card(f, "library_name: peft", "library_name: [peft"),
        "front matter",
    ),
    "results that are none": (lambda f: card(f, "model-index:\n", "model-index: 3\nx:\n"), "front matter"),
    "a folder on the card": (
        lambda f: card(f, "library_name: peft", "library_name: peft\nbase_model: ~/models/base"),
        "the hub: README.md names the base `~/models/base`",
    ),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_a_broken_rule_is_found(adapter, rule):
    assert lint(adapter) == [], "before it is broken"
    break_it, words = REFUSED[rule]
    break_it(adapter)
    found = [str(finding) for finding in lint(adapter) if finding.refused]
    assert any(words in sentence for sentence in found), found


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: config(f, r=24), ["vLLM: r is 24: start it with --max-lora-rank 32"]),
        (lambda f: config(f, r=100), ["vLLM: r is 100: start it with --max-lora-rank 128", "LoRAX: r is 100: set"]),
        (renamed("lm_head"), ["vLLM: lm_head is adapted: not on bases that tie it"]),
        (renamed("own_proj"), ["vLLM: it may not know layers called `own_proj`"]),
        (lambda f: config(f, init_lora_weights="gaussian"), []),
        (lambda f: config(f, rank_pattern={}), []),
    ],
)
def test_what_hangs_on_the_server_or_the_base_is_told_and_no_fault(adapter, break_it, words):
    break_it(adapter)
    found = lint(adapter)
    assert not [finding for finding in found if finding.refused]
    assert len(found) == len(words)
    assert all(str(finding).startswith(start) for finding, start in zip(found, words, strict=True))


def test_verify_asks_the_linter(run):
    """Of an adapter whose papers are in order: somebody who can write manifests, but not load adapters."""
    folder = run.path / "adapters" / slug("ada")
    assert lint(folder) == []
    config(folder, use_rslora=True)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    raw = (folder / "adapter_config.json").read_bytes()
    manifest["files"]["adapter_config.json"] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    (folder / MANIFEST).write_bytes(rendered(manifest | {"manifest_hash": self_hash(manifest)}))
    [fault] = verify(folder)
    assert fault.startswith("llama.cpp: use_rslora")


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (2, 8), (8, 8), (9, 16), (17, 32), (300, 320), (512, 512)])
def test_the_rank_that_vllm_is_started_with(rank, flag):
    assert max_lora_rank(rank) == flag
    assert flag >= rank


def test_no_server_takes_a_rank_above_512():
    with pytest.raises(ValueError, match="rank 512"):
        max_lora_rank(513)
