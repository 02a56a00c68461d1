"""A base in a `.gguf` file: the same logits, tokens and shape as the model that was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.models import model_files
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base, load_tokenizer, weights_hash
from persona_rlhf.training.base_shape import shape_of
from tests.models.gguf_files import TEMPLATE, tiny_llama, write_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama())


@pytest.fixture(scope="module")
def base(file: Path) -> Base:
    return load_base(BaseSettings(model=str(file)))


def sentence(model: Path, **settings: str) -> str:
    with pytest.raises(InputError) as error:
        load_base(BaseSettings(model=str(model), **settings))  # type: ignore[arg-type]
    [problem] = error.value.problems
    return problem.sentence


def test_logits_are_those_of_the_written_model(base: Base) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, logits = tiny_llama()(input_ids=ids).logits, base.model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_quantized_file_gives_its_dequantized_numbers(tmp_path: Path) -> None:
    base = load_base(BaseSettings(model=str(write_gguf(tmp_path / "q.gguf", tiny_llama(), "Q8_0"))))
    for name, exact in tiny_llama().state_dict().items():
        step = exact.abs().max() / 127  # of a block of 32, at most
        assert (base.model.state_dict()[name] - exact).abs().max() <= step
    assert not torch.equal(base.model.state_dict()["model.embed_tokens.weight"], tiny_llama().model.embed_tokens.weight)


def test_tokenizer_comes_from_the_file(base: Base, file: Path) -> None:
    ids = prompt_ids((Message("user", "the hé"),), base.tokenizer)
    assert base.tokenizer.decode(list(ids)) == "<|im_start|>user\nthe hé<|im_end|>\n<|im_start|>assistant\n"
    assert base.tokenizer.convert_tokens_to_ids("the") in ids
    assert base.eos_ids == (2,)
    assert base.context == 512
    assert load_tokenizer(str(file)).chat_template == TEMPLATE


def test_it_is_saved_as_a_folder_with_the_same_weights(base: Base, tmp_path: Path) -> None:
    base.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: tensor.tolist() for name, tensor in loaded.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in base.model.state_dict().items()
    }


def test_it_holds_adapters(base: Base) -> None:
    adapted = AdaptedModel(base, LoraSettings(rank=2))
    try:
        assert (
            adapted.params_per_user == shape_of(BaseSettings(model=base.name), LoraSettings(rank=2)).adapter_parameters
        )
    finally:
        adapted.close()


def test_hash_is_that_of_the_file(base: Base, file: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / file.name, tiny_llama(1))
    assert weights_hash(BaseSettings(model=str(file))) == base.weights_hash
    assert weights_hash(BaseSettings(model=str(other))) != base.weights_hash


def test_errors(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gguf, cut, text = (tmp_path / name for name in ("no.gguf", "cut.gguf", "model.txt"))
    no_gguf.write_bytes(b"PK\x03\x04 something else")
    cut.write_bytes(file.read_bytes()[:3000])
    text.write_text("a model")
    assert "no GGUF file" in sentence(no_gguf)
    assert "transformers cannot load it" in sentence(cut)
    assert "name the folder" in sentence(text)
    assert "nf4" in sentence(file, quantization="nf4")
    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    assert "persona-rlhf[gguf]" in sentence(file)
