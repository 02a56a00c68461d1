"""Exported adapters through llama.cpp's converters and loader: the same greedy answers as the built-in engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.experiment import Config, read_run_config
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base
from persona_rlhf.models.generation import generate_answers
from persona_rlhf.release.adapter import adapter_vector
from tests.story.engines import engine_folder, needs_engine, prompt_rows, prompts
from tests.story.experiment import persona_rlhf, results

pytestmark = needs_engine("llama-cpp")

LLAMA_CPP = engine_folder("llama-cpp") / "source/vendor/llama.cpp"
USERS, PROMPTS, TOKENS = 3, 24, 48


class Exported(NamedTuple):
    """Released adapters of a run as PEFT folders and as GGUF files, and the base as a GGUF file."""

    config: Config
    folders: list[Path]
    adapters: list[Path]
    base: Path


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Exported:
    place = tmp_path_factory.mktemp("gguf")
    released = [one for one in results(trained.run) if one["status"] == "released"][:USERS]
    files = [place / f"{n}.gguf" for n in range(len(released))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_CPP", str(LLAMA_CPP))
        patch.chdir(trained.folder)
        config = read_run_config(trained.run)
        for one, file in zip(released, files, strict=True):
            words = ("export", "run", "--user", one["user_id"], "--to", file, "--format", "gguf")
            done = persona_rlhf(*words, cwd=trained.folder)
            assert done.returncode == 0, done.stderr
    program = [sys.executable, str(Path(__file__).with_name("llama_cpp_base.py")), str(LLAMA_CPP)]
    words = [str(shipped_root() / "data/base"), "--outtype", "f32", "--outfile", str(place / "base.gguf")]
    subprocess.run([*program, *words], check=True, capture_output=True)
    return Exported(config, [trained.run / one["path"] for one in released], files, place / "base.gguf")


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order: the two halves of each head take turns."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


NAMES = {
    "self_attn.q_proj": ("attn_q", 4),
    "self_attn.k_proj": ("attn_k", 2),
    "self_attn.v_proj": ("attn_v", None),
    "self_attn.o_proj": ("attn_output", None),
    "mlp.gate_proj": ("ffn_gate", None),
    "mlp.up_proj": ("ffn_up", None),
    "mlp.down_proj": ("ffn_down", None),
}


def expected_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter under llama.cpp's names, in float32."""
    tensors = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer, _, rest = name.partition("layers.")[2].partition(".")
        module, _, side = rest.removesuffix(".weight").rpartition(".lora_")
        of_gguf, heads = NAMES[module]
        rows = tensor.astype(np.float32)
        turned = interleaved(rows, heads) if side == "B" and heads is not None else rows
        tensors[f"blk.{layer}.{of_gguf}.weight.lora_{side.lower()}"] = turned
    return tensors


def test_the_file_holds_the_adapter_tensor_for_tensor(exported):
    for folder, file in zip(exported.folders, exported.adapters, strict=True):
        reader, expected = gguf.GGUFReader(file), expected_tensors(folder)
        assert {tensor.name for tensor in reader.tensors} == expected.keys()
        for tensor in reader.tensors:
            assert tensor.data.dtype == np.float32
            np.testing.assert_array_equal(tensor.data, expected[tensor.name], err_msg=tensor.name)
        assert reader.fields["adapter.lora.alpha"].contents() == exported.config.lora.alpha


def our_answers(exported: Exported, base: Base, rows: list[tuple[int, ...]]) -> list[list[list[int]]]:
    """Token ids `[adapter][prompt]` of the built-in engine: the base, then each adapter."""
    adapted = AdaptedModel(base, exported.config.lora)
    spans = list(adapted.spans.values())
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in exported.folders]
    flats = [torch.zeros(adapted.params_per_user), *(adapter_vector(one, spans) for one in weights)]
    answers = []
    with torch.inference_mode():
        for flat in flats:
            with adapted.using(flat[None]):
                of_flat = generate_answers(adapted.base, 1, rows, [0] * len(rows), TOKENS, 0.0)
            answers.append([list(one.ids) for one in of_flat])
    adapted.close()
    return answers


def their_answers(
    exported: Exported, rows: list[tuple[int, ...]], ends: list[int], cache: Literal["float32", "float16"]
) -> list[list[list[int]]]:
    task = {
        "base": str(exported.base),
        "adapters": [None, *map(str, exported.adapters)],
        "prompts": rows,
        "tokens": TOKENS,
        "ends": ends,
        "cache": cache,
    }
    python, program = engine_folder("llama-cpp") / "bin/python", Path(__file__).with_name("llama_cpp_answers.py")
    done = subprocess.run([python, program], input=json.dumps(task), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_greedy_answers_are_those_of_the_built_in_engine(exported):
    base = load_base(exported.config.base)
    rows = prompt_rows(prompts(PROMPTS), base.tokenizer)
    ours = our_answers(exported, base, rows)
    for one in ours[1:]:
        assert one != ours[0]
    for cache in ("float32", "float16"):
        theirs = their_answers(exported, rows, list(base.eos_ids), cache)
        equal = [a == b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
        print(f"cache in {cache}: {sum(equal)} of {len(equal)} answers are equal")
        if cache == "float32":
            assert all(equal)
