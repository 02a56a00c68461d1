import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.experiment import Config, read_config
from persona_rlhf.config.loader import Section
from persona_rlhf.pipeline.inputs import read_inputs

SOURCE = Path(__file__).parents[2] / "src" / "persona_rlhf"


@pytest.fixture
def minimal(tmp_path, monkeypatch):
    """A config with nothing but what it must have, and the files that it names."""
    monkeypatch.chdir(tmp_path)
    for file in ("model/config.json", "one.yaml", "users.jsonl"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    config = {
        "name": "x",
        "base": {"model": "./model"},
        "policy": {"documents": ["one.yaml"]},
        "users": {"path": "users.jsonl"},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Path("config.yaml")


def problems_of(config, *overrides):
    with pytest.raises(InputError) as fault:
        read_config(config, overrides)
    return fault.value.problems


def sections(kind=Config, path=()):
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation, (*path, name))
        else:
            yield ".".join((*path, name)), name, field


@pytest.mark.parametrize("file", sorted((shipped_root() / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_config_loads(file, monkeypatch):
    monkeypatch.chdir(shipped_root())
    read_config(file)


def test_every_field_says_what_it_is_and_is_read_somewhere():
    code = "\n".join(file.read_text() for file in SOURCE.rglob("*.py") if file.name != "settings.py")
    for key, name, field in sections():
        assert field.description, f"{key} has no description"
        assert re.search(rf"\.{name}\b", code), f"{key} is read nowhere"


def test_the_keys_that_other_programs_use_are_there():
    contract = """name seed base.model base.dtype base.quantization policy.documents users.path users.heldout lora.rank
    lora.alpha lora.target_modules dpo.loss dpo.beta dpo.epochs dpo.pairs_per_step dpo.learning_rate constraint.enabled
    gate.enabled gate.alphas gate.family screening.quarantine fleet.slots run.dir"""
    assert set(contract.split()) <= {key for key, _, _ in sections()}


def test_defaults_are_within_their_own_bounds(minimal):
    # Defaults are not validated when they are used; written out and read back they are.
    config = read_config(minimal)
    Path("again.yaml").write_text(config.to_yaml())
    assert read_config("again.yaml") == config


def test_everything_wrong_comes_at_once_with_line_key_and_hint(minimal):
    minimal.write_text(
        """name: x
seed: 1.5
base:
  model: ./modle
  dtype: flot32
  quantization: nf5
policy: {documents: []}
users:
  path: nope.jsonl
  path: users.jsonl
lora: {rank: true, learning_rate: 1e-3, alpha: 0}
dpo:
  learning_rte: 5e-6
  beta: -1
  epochs: "3"
  max_grad_norm: .inf
gate: {alphas: [0.5, 0.25], enabled: yes}
fleet: {slots: many}
"""
    )
    found = [(p.line, p.key) for p in problems_of(minimal)]
    assert [line for line, _ in found] == sorted(line for line, _ in found)
    assert sorted(found) == [
        (2, "seed"),
        (4, "base.model"),
        (5, "base.dtype"),
        (6, "base.quantization"),
        (7, "policy.documents"),
        (9, "users.path"),
        (10, "users.path"),
        (11, "lora.alpha"),
        (11, "lora.learning_rate"),
        (11, "lora.rank"),
        (13, "dpo.learning_rte"),
        (14, "dpo.beta"),
        (15, "dpo.epochs"),
        (16, "dpo.max_grad_norm"),
        (17, "gate.alphas"),
        (17, "gate.enabled"),
        (18, "fleet.slots"),
    ]
    text = "\n".join(map(str, problems_of(minimal)))
    assert "did you mean `model`?" in text
    assert "did you mean `float32`?" in text
    assert "did you mean `dpo.learning_rate`?" in text
    assert "did you mean `learning_rate`?" in text
    assert "did you mean `nf4`?" in text
    assert "expected a whole number, got `1.5`" in text
    assert "expected a whole number or `auto`, got `many`" in text


def test_missing_sections_and_keys_are_named(minimal):
    minimal.write_text("name: x\nbase: {dtype: auto}\npolicy:\n")
    assert [(p.line, p.key) for p in problems_of(minimal)] == [(1, "users"), (2, "base.model"), (3, "policy")]


def test_an_empty_file_and_a_list_are_refused(minimal):
    for text in ("", "- name: x\n", "just words"):
        minimal.write_text(text)
        assert len(problems_of(minimal)) == 1


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("dpo.learning_rate=5e-6", ("dpo", "learning_rate"), 5e-6),
        ("dpo.beta=1", ("dpo", "beta"), 1),
        ("gate.alphas=[0.5, 1]", ("gate", "alphas"), [0.5, 1]),
        ("constraint.enabled=false", ("constraint", "enabled"), False),
        ("lora.target_modules=[q_proj, v_proj]", ("lora", "target_modules"), ["q_proj", "v_proj"]),
        ("fleet.slots=auto", ("fleet", "slots"), "auto"),
        ("fleet.tokens_per_step=4096", ("fleet", "tokens_per_step"), 4096),
        ("dpo.early_stop={patience: 2}", ("dpo", "early_stop", "patience"), 2),
        ("dpo.early_stop.every=5", ("dpo", "early_stop", "every"), 5),
        ("dpo.early_stop=null", ("dpo", "early_stop"), None),
        ("run.dir=~", ("run", "dir"), None),
        ("base.quantization=", ("base", "quantization"), None),
        ("name=a", ("name",), "a"),
        ("gate={alphas: [1.0]}", ("gate", "alphas"), [1.0]),
    ],
)
def test_overrides_mean_what_yaml_means(minimal, override, key, value):
    node = read_config(minimal, [override])
    for part in key:
        node = getattr(node, part)
    assert node == value


def test_a_later_override_goes_before_an_earlier_one(minimal):
    assert read_config(minimal, ["dpo.epochs=5", "dpo.epochs=7"]).dpo.epochs == 7
    assert read_config(minimal, ["gate={alphas: [1.0]}", "gate.alphas=[0.5]"]).gate.alphas == [0.5]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dpo.beta=high", "dpo.beta: expected a number, got `high`"),
        ("dpo.btea=1", "unknown key (did you mean `beta`?)"),
        ("lora.rank=1.5", "expected a whole number, got `1.5`"),
        ("lora.rank=true", "expected a whole number, got `true`"),
        ("gate.alphas=[", "not valid YAML"),
        ("fleet.slots=0", "must be at least 1"),
        ("dpo.early_stop={patience: 0}", "must be at least 1"),
        ("dpo.early_stop={evry: 5}", "did you mean `every`?"),
        ("dpo.early_stop=true", "expected a section"),
        ("dpo.beta", "section.key=value"),
        ("=3", "section.key=value"),
        ("dpo..beta=3", "section.key=value"),
        ("name.x=3", "name"),
        ("nothing.at.all=3", "unknown key"),
        ("dpo={beta: 1, beta: 2}", "written twice"),
        ("users.path=gone", "no such file or folder"),
        ("gate.alphas=[0.5, 1.5]", "(0, 1]"),
        ("name=../out", "name"),
    ],
)
def test_a_wrong_override_is_named(minimal, override, words):
    (problem,) = problems_of(minimal, override)
    assert problem.file == f"override {override}"
    assert words in str(problem)


def test_wrong_overrides_and_a_wrong_file_come_together(minimal):
    minimal.write_text(minimal.read_text() + "sed: 3\n")
    assert {p.key for p in problems_of(minimal, "dpo.beta=x", "lora.rnk=3")} == {"sed", "dpo.beta", "lora.rnk"}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([key for key, _, _ in sections()]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=2),
)
def test_any_value_anywhere_is_taken_or_named(minimal, key, value):
    """Whatever stands in a field, the answer is a config or sentences that name this field, never a traceback."""
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    try:
        config = read_config(minimal, [f"{key}={text}"])
    except InputError as fault:
        assert all((problem.key or "").startswith(key) for problem in fault.problems)
    else:
        Path("again.yaml").write_text(config.to_yaml())
        assert read_config("again.yaml") == config


@pytest.mark.parametrize("file", ["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "qwen3-8b"])
def test_the_configs_of_hub_models_load(file):
    """Their base is on the hub, everything else is shipped."""
    config = read_config(f"configs/{file}.yaml")
    assert config.name == file
    materials = read_inputs(config)
    assert len(materials.policy.probes("certify")) == 1224
    assert materials.pairs.users > 0


def test_the_quickstart_with_a_basis_differs_in_how_pairs_teach_alone():
    plain, shared = (read_config(f"configs/{name}.yaml") for name in ("quickstart", "quickstart_basis"))
    assert shared.basis is not None
    assert shared.model_copy(update={"basis": None, "dpo": plain.dpo}) == plain
