import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.convert import dialects, import_config
from persona_rlhf.config.experiment import Config, read_config

TRL_FILE = """
# trl dpo --config trl.yaml
model_name_or_path: model
dataset_name: pairs.jsonl
torch_dtype: bfloat16
beta: 0.05
learning_rate: 5.0e-4
num_train_epochs: 2.0
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
lr_scheduler_type: cosine
warmup_ratio: 0.2
loss_type: [robust]
label_smoothing: 0.1
max_length: 1024
use_peft: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
gradient_checkpointing: true
optim: adamw_torch
fp16: false
deepspeed: zero2.json
seed: 3
output_dir: "out/my model/"
report_to: wandb
hub_token:
"""

AXOLOTL_FILE = """
base_model: model
rl: dpo
datasets:
  - path: pairs.jsonl
    type: chatml.intel
    split: train
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout:
lora_target_linear: true
val_set_size: 0.05
sequence_len: 2048
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: linear
learning_rate: "2e-4"
warmup_steps: 10
dpo_beta: 0.3
bf16: auto
seed: 7
wandb_project: mine
output_dir: ./outputs/lora-out
"""


LLAMA_FACTORY_FILE = """
model_name_or_path: model
adapter_name_or_path: saves/sft
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj, v_proj
pref_beta: 0.2
pref_loss: ipo
dataset: mine, other
dataset_dir: theirs
template: qwen3
cutoff_len: 2048
quantization_bit: 4
val_size: 0.1
output_dir: saves/x
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes their file beside the files that it names."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("pairs.jsonl").touch()

    def write(text: str) -> Path:
        Path("theirs.yaml").write_text(text)
        return Path("theirs.yaml")

    return write


def _read(text: str) -> Config:
    Path("ours.yaml").write_text(text)
    return read_config("ours.yaml")


def test_a_config_of_trl(written):
    found = import_config(written(TRL_FILE))
    config = _read(found.text)
    assert (config.name, config.seed, str(config.run.dir)) == ("my-model", 3, "out/my model")
    assert (config.base.model, config.base.dtype, str(config.users.path)) == ("model", "bfloat16", "pairs.jsonl")
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (16, 32, ["q_proj", "v_proj"])
    dpo = config.dpo
    assert (dpo.loss, dpo.label_smoothing, dpo.beta, dpo.epochs) == ("robust", 0.1, 0.05, 2)
    assert (dpo.pairs_per_step, dpo.learning_rate, dpo.warmup, dpo.schedule) == (8, 5e-4, 0.2, "cosine")
    left = dict(line.split(": ", 1) for line in found.left_out)
    assert list(left) == ["max_length", "lora_dropout", "gradient_checkpointing", "fp16", "deepspeed", "report_to"]
    assert "fleet.processes" in left["deepspeed"]
    assert all(line in found.text for line in found.left_out)


def test_a_config_of_axolotl(written):
    found = import_config(written(AXOLOTL_FILE))
    config = _read(found.text)
    assert (config.name, config.seed, config.base.dtype) == ("lora-out", 7, "auto")
    assert (str(config.users.path), config.users.heldout) == ("pairs.jsonl", 0.05)
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (32, 16, "all-linear")
    dpo = config.dpo
    assert (dpo.loss, dpo.beta, dpo.epochs, dpo.pairs_per_step) == ("sigmoid", 0.3, 4, 8)
    assert (dpo.learning_rate, dpo.schedule) == (2e-4, "linear")
    left = [line.split(": ")[0] for line in found.left_out]
    assert left == ["datasets", "sequence_len", "optimizer", "warmup_steps", "wandb_project"]


def test_a_config_of_llama_factory(written):
    Path("theirs").mkdir()
    info = {"mine": {"file_name": "../pairs.jsonl", "columns": {"prompt": "instruction", "chosen": "good"}}}
    Path("theirs/dataset_info.json").write_text(json.dumps(info))
    found = import_config(written(LLAMA_FACTORY_FILE))
    config = _read(found.text)
    assert (config.name, config.seed, config.base.model, config.base.quantization) == ("x", 42, "model", "nf4")
    assert (str(config.users.path), config.users.heldout) == ("theirs/../pairs.jsonl", 0.1)
    assert "rename its columns `good` to `chosen`; its rows need a `user_id`" in found.text
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (4, 8, ["q_proj", "v_proj"])
    dpo = config.dpo
    assert (dpo.loss, dpo.beta, dpo.epochs, dpo.pairs_per_step) == ("ipo", 0.2, 2, 8)
    assert (dpo.learning_rate, dpo.warmup, dpo.schedule) == (5e-6, 0.1, "cosine")
    assert str(config.policy.documents[0]).endswith("configs/policy/real/tier_one.yaml")
    left = dict(line.split(": ", 1) for line in found.left_out)
    assert list(left) == ["adapter_name_or_path", "trust_remote_code", "dataset", "template", "cutoff_len", "plot_loss"]
    assert "merge this adapter into it first" in left["adapter_name_or_path"]


@pytest.mark.parametrize(
    ("entry", "path"),
    [({"hf_hub_url": "someone/prefs"}, "someone/prefs"), ({"file_name": "a.json"}, "data/a.json"), (None, "a")],
)
def test_a_data_set_of_llama_factory_is_looked_up_by_its_name(written, entry, path):
    if entry is not None:
        Path("data").mkdir()
        Path("data/dataset_info.json").write_text(json.dumps({"a": entry}))
    found = import_config(written("model_name_or_path: model\nstage: dpo\nlora_rank: 16\ndataset: a\n"))
    tree = yaml.safe_load(found.text)
    assert tree["users"]["path"] == path
    assert found.left_out == []
    assert (tree["lora"]["alpha"], float(tree["dpo"]["learning_rate"]), tree["dpo"]["pairs_per_step"]) == (32, 5e-5, 8)


@pytest.mark.parametrize(
    ("mixture", "left"),
    [
        ("dataset_mixer:\n  pairs.jsonl: 1.0\n", []),
        ("dataset_mixer:\n  pairs.jsonl: 0.5\n  other/set: 0.5\n", ["dataset_mixer"]),
        ("dataset_mixture:\n  datasets:\n    - id: pairs.jsonl\n", []),
        ("dataset_mixture:\n  datasets:\n    - id: pairs.jsonl\n      weight: 0.5\n  seed: 1\n", ["dataset_mixture"]),
    ],
)
def test_a_mixture_of_the_alignment_handbook_gives_its_first_data_set(written, mixture, left):
    found = import_config(written(f"model_name_or_path: model\n{mixture}"))
    assert str(_read(found.text).users.path) == "pairs.jsonl"
    assert [line.split(": ")[0] for line in found.left_out] == left


def test_the_bundled_base_gets_its_own_policy(written):
    found = import_config(written("model_name_or_path: data/base\ndataset_name: pairs.jsonl\n"))
    assert yaml.safe_load(found.text)["policy"]["documents"] == ["configs/policy/tier_one.yaml"]


def test_what_a_file_leaves_out_is_what_its_program_would_take(written):
    least = import_config(written("model_name_or_path: model\ndataset_name: pairs.jsonl\n"))
    dpo = _read(least.text).dpo
    assert (dpo.pairs_per_step, dpo.learning_rate, dpo.epochs, dpo.warmup) == (8, 1e-6, 3, 0)
    assert "theirs trains whole models" in least.text
    least = import_config(
        written("base_model: model\nrl: ipo\nlearning_rate: 1e-5\ndatasets:\n  - path: pairs.jsonl\n")
    )
    assert least.left_out == []
    dpo = _read(least.text).dpo
    assert (dpo.loss, dpo.pairs_per_step, dpo.learning_rate, dpo.epochs, dpo.schedule) == ("ipo", 1, 1e-5, 1, "cosine")


def test_a_value_without_a_counterpart_leaves_our_default(written):
    """Not theirs, which the file had overruled."""
    text = "model_name_or_path: model\ndataset_name: pairs.jsonl\nwarmup_steps: 50\nlr_scheduler_type: polynomial\n"
    found = import_config(written(text + "loss_type: [sigmoid, sft]\nnum_train_epochs: 0.5\nbf16: true\n"))
    config = _read(found.text)
    dpo = Config.model_fields["dpo"].default
    assert (config.dpo.warmup, config.dpo.schedule, config.dpo.loss) == (dpo.warmup, dpo.schedule, dpo.loss)
    assert config.dpo.epochs == dpo.epochs
    assert config.base.dtype == "bfloat16"
    assert [line.split(": ")[0] for line in found.left_out] == [
        "warmup_steps",
        "lr_scheduler_type",
        "loss_type",
        "num_train_epochs",
    ]
    assert "warmup:" not in found.text


def test_the_defaults_and_keys_of_trl_are_those_of_the_installed_one():
    from trl import DPOConfig, ModelConfig, ScriptArguments

    fields = {field.name: field.default for kind in (DPOConfig, ModelConfig, ScriptArguments)
              for field in dataclasses.fields(kind)}  # fmt: skip
    trl = dialects().trl
    ours = {key: name for name, key in trl.keys.items()} | {"dpo.warmup": "warmup_steps"}
    assert {key: fields[ours[key]] for key in trl.defaults} == trl.defaults
    assert {key: fields[key] for key in trl.batch} == trl.batch
    assert {*trl.keys, *trl.same} - set(fields) <= {"torch_dtype", "warmup_ratio"}  # of earlier versions


@pytest.mark.parametrize("dialect", [dialects().trl, dialects().axolotl, dialects().llama_factory])
def test_every_counterpart_is_a_key_of_ours(dialect):
    for ours in {*dialect.keys.values(), *dialect.defaults, *dialect.values, *dialects().values}:
        section, _, field = ours.rpartition(".")
        kind = Config.model_fields[section].annotation if section else Config
        assert field in kind.model_fields, ours


def test_files_that_are_not_here_are_said_beside_their_value(written):
    found = import_config(written("model_name_or_path: ./gone\ndataset_name: someone/ultrafeedback\nuse_peft: true\n"))
    tree = yaml.safe_load(found.text)
    assert (tree["base"]["model"], tree["users"]["path"]) == ("./gone", "someone/ultrafeedback")
    lines = {line.split(": ")[0].strip(): line for line in found.text.splitlines()}
    assert "no such file or folder" in lines["model"]
    assert lines["path"].endswith("# dataset_name; its rows need a `user_id`")  # read from the hub


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora: {r: 8}\n", "neither `model_name_or_path` (TRL, LLaMA-Factory), nor `base_model` and `rl: dpo`"),
        (
            "model_name_or_path: model\nstage: sft\ndataset: a\n",
            "this LLaMA-Factory config has `stage: sft`; `stage: dpo`",
        ),
        ("model_name_or_path: model\npref_beta: 0.1\ndataset: a\n", "this LLaMA-Factory config has no `stage`"),
        ("model_name_or_path: model\nstage: dpo\n", "theirs.yaml: dataset: no data set is named"),
        ("model_name_or_path: model\ndataset_mixer: {}\n", "no data set is named"),
        ("base_model: model\ndatasets: []\n", "has no `rl`"),
        ("base_model: model\nrl: kto\n", "has `rl: kto`"),
        ("base_model: model\nrl: dpo\n", "theirs.yaml: datasets: no data set is named"),
        ("model_name_or_path: model\ndataset_name: pairs.jsonl\nbeta: -1\n", "theirs.yaml:3: dpo.beta: must be more"),
        ("model_name_or_path: model\ndataset_name: [a]\n", "theirs.yaml:2: users.path: expected a path"),
        (
            "model_name_or_path: model\nper_device_train_batch_size: 4\ndataset_name: pairs.jsonl\n"
            "gradient_accumulation_steps: two\n",
            "theirs.yaml:4: dpo.pairs_per_step: expected a whole number, got `two`",
        ),
        ("model_name_or_path: model\nmodel_name_or_path: b\n", "written twice"),
        ("- a\n", "`key: value` lines"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(written, text, words):
    with pytest.raises(InputError) as fault:
        import_config(written(text))
    assert words in str(fault.value)


def test_texts_that_yaml_would_read_otherwise_stay_texts(written):
    for name in ("1e3", "yes", "a: b", "c #d", "e\nf", "true"):
        text = yaml.safe_dump({"model_name_or_path": name, "dataset_name": "pairs.jsonl"}, default_style='"')
        found = import_config(written(text))
        Path(name).mkdir()
        assert _read(found.text).base.model == name
