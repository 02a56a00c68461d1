"""`base get`: from a package with a model inside to a base, with every fault in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.cli import base as verbs
from persona_rlhf.config.training import BaseSettings
from persona_rlhf.models.base import load_base, weights_hash
from persona_rlhf.pipeline import download_base
from persona_rlhf.pipeline.download_base import BaseSource, PackageWithModel, base_sources
from tests.models.gguf_files import digest, tiny_llama, write_gguf, write_wheel
from tests.story import experiment
from tests.story.experiment import tier_one, write_yaml

Get = Callable[..., Any]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    return write_wheel(folder / "links", write_gguf(folder / "tiny.gguf", tiny_llama(), "Q4_1"))


@pytest.fixture(scope="module")
def weights(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of the weights in bfloat16, as transformers saves them."""
    folder = tmp_path_factory.mktemp("expected")
    load_base(BaseSettings(model=str(wheel.parents[1] / "tiny.gguf"), dtype="bfloat16")).model.save_pretrained(folder)
    return weights_hash(BaseSettings(model=str(folder)))


def source_of(wheel: Path, weights_sha256: str, alignment: str | None = None) -> BaseSource:
    package = PackageWithModel(
        name="tiny-model",
        version="1.0",
        file=wheel.name,
        bytes=wheel.stat().st_size,
        sha256=digest(wheel),
        weights="tiny_model/tiny.gguf",
        licence_text="tiny_model-1.0.dist-info/LICENSE",
    )
    return BaseSource(
        title="Tiny",
        authors="Nobody",
        licence="apache-2.0",
        hub="nobody/tiny",
        aligned_by="Nobody",
        note="A test.",
        package=package,
        weights_sha256=weights_sha256,
        alignment=alignment,
    )


@pytest.fixture
def get(wheel: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Get:
    """The verb with one base in its table; pip reads the folder of the wheel and no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(verbs, "base_source", lambda name: source_of(wheel, weights))
    return lambda *options: CliRunner().invoke(
        app.app, ["base", "get", "tiny", str(tmp_path / "out"), *map(str, options)]
    )


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_pip_downloads_with_the_callers_settings(get: Get, weights: str, tmp_path: Path) -> None:
    done = get("--json")
    assert done.exit_code == 0, done.stderr
    assert "sha256 as pinned" in done.stderr
    assert json.loads(done.stdout)["weights_sha256"] == weights
    base = load_base(BaseSettings(model=str(tmp_path / "out"), dtype="bfloat16"))
    exact = load_base(BaseSettings(model=str(write_gguf(tmp_path / "exact.gguf", tiny_llama(), "Q4_1")))).model
    for name, tensor in exact.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor.bfloat16())
    assert base.weights_hash == weights
    assert base.tokenizer.chat_template
    wanted = {"LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert wanted <= names(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert names(tmp_path) == {"out", "exact.gguf"}  # no download left behind


def test_an_adapter_in_peft_over_the_folder_answers_as_merged(get: Get, wheel: Path, tmp_path: Path) -> None:
    get("--wheel", wheel)
    folder = tmp_path / "out"
    base = load_base(BaseSettings(model=str(folder), dtype="float32"))
    torch.manual_seed(1)
    trained = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    trained.save_pretrained(tmp_path / "adapter")
    prompt = torch.tensor([[1, 50, 60, 70]])
    expected = trained.generate(input_ids=prompt, max_new_tokens=16, do_sample=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(again.generate(input_ids=prompt, max_new_tokens=16, do_sample=False), expected)


def test_faults_exit_2_and_write_nothing(
    get: Get, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other" / wheel.name
    other.parent.mkdir()
    other.write_bytes(wheel.read_bytes()[:-1] + b"x")
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("not the pinned", ("--wheel", other)),
        ("no such file", ("--wheel", "x")),
    ]
    for sentence, options in cases:
        done = get(*options)
        assert (done.exit_code, sentence in done.stderr) == (2, True), done.stderr
    monkeypatch.setenv("PIP_FIND_LINKS", str(other.parent))
    done = get()
    assert done.exit_code == 2
    assert "gives another file" in done.stderr
    monkeypatch.delenv("PIP_FIND_LINKS")
    done = get()
    assert done.exit_code == 2
    assert "pip cannot get version 1.0" in done.stderr
    assert "--wheel" in done.stderr
    monkeypatch.setattr(verbs, "base_source", lambda name: source_of(wheel, "0" * 64))
    done = get("--wheel", wheel)
    assert done.exit_code == 2
    assert "these weights have the hash" in done.stderr
    monkeypatch.setattr(download_base, "find_spec", lambda name: None)
    done = get("--wheel", wheel)
    assert done.exit_code == 2
    assert "persona-rlhf[gguf]" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_second_try_uses_the_downloaded_file(
    get: Get, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("persona_rlhf.pipeline.get_base.write_base", interrupt)
        done = get()
    assert done.exit_code == 130
    assert "same command uses them" in done.stderr
    monkeypatch.delenv("PIP_FIND_LINKS")  # pip would not get it again
    assert get().exit_code == 0
    assert not (tmp_path / ".out.download").exists()


def test_the_shipped_alignment_is_merged_to_the_bits_that_base_align_wrote(
    get: Get, wheel: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "_PROBES", {"train": 4, "dev": 3, "certify": 24, "test": 0})
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "tier_one.yaml", tier_one(tmp_path / "banks"))
    (tmp_path / "ordinary.jsonl").write_text('{"prompt": "a bird?"}\n{"prompt": "a cake?"}\n{"prompt": "a song?"}\n')
    assert get("--wheel", wheel).exit_code == 0
    options = ["policy.documents=[tier_one.yaml]", "align.ordinary=ordinary.jsonl", "align.max_new_tokens=4"]
    options += ["base.dtype=bfloat16", "align.sft.learning_rate=1e-2"]
    done = CliRunner().invoke(app.app, ["base", "align", "out", "aligned", *options])
    assert done.exit_code == 0, done.stderr
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    shutil.copytree("aligned/adapters", shipped / "adapters")
    shutil.copy("aligned/alignment.json", shipped)
    shutil.rmtree("out")

    done = get("--wheel", wheel, "--aligned")
    assert done.exit_code == 2
    assert "no alignment of tiny is shipped" in done.stderr
    monkeypatch.setattr(verbs, "base_source", lambda name: source_of(wheel, weights, str(shipped)))
    done = get("--wheel", wheel, "--aligned", "--json")
    assert done.exit_code == 0, done.stderr
    aligned = weights_hash(BaseSettings(model="aligned"))
    assert json.loads(done.stdout)["weights_sha256"] == aligned == weights_hash(BaseSettings(model="out")) != weights
    assert json.loads(Path("out/alignment.json").read_text())["aligned"]["sha256"] == aligned
    assert "license: apache-2.0" in Path("out/README.md").read_text()
    assert Path("out/LICENSE").exists()

    shutil.rmtree("out")
    facts = json.loads((shipped / "alignment.json").read_text())
    facts["aligned"]["sha256"] = "0" * 64
    (shipped / "alignment.json").write_text(json.dumps(facts))
    done = get("--wheel", wheel, "--aligned")
    assert done.exit_code == 2
    assert "these weights have the hash" in done.stderr
    assert "take the files of" in done.stderr
    assert not Path("out").exists()


def test_table_names_its_bases() -> None:
    done = CliRunner().invoke(app.app, ["base", "get", "smolm2-135m", "x"])
    assert done.exit_code == 2
    assert "smollm2-135m" in done.stderr


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_package(tmp_path: Path) -> None:
    done = CliRunner().invoke(app.app, ["base", "get", "smollm2-135m", str(tmp_path / "out")])
    if "pip cannot get" in done.stderr:
        pytest.skip(f"no package index here: {done.stderr.splitlines()[-2]}")
    assert done.exit_code == 0, done.stderr
    base = load_base(BaseSettings(model=str(tmp_path / "out")))
    assert base.weights_hash == base_sources()["smollm2-135m"].weights_sha256
    shutil.rmtree(tmp_path / "out")
