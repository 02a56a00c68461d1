"""PEFT adapters of other trainers (`users.start`), read and checked without torch: TRL's and Unsloth's folders too.

Only plain LoRA is taken: an adapter of a fleet is `W x + scale B A x`. The scale is PEFT's: `lora_alpha / r`, or
`lora_alpha / sqrt(r)` with `use_rslora` (Kalajdzievski 2023).
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import sha256_of
from persona_rlhf.release.compatibility import CONFIG, EXTRAS, FLOATS, PLAIN_STARTS, TENSOR, WEIGHTS
from persona_rlhf.release.manifest import MANIFEST, read_manifest

_KEY = "users.start"
_BASE = "base_model_name_or_path"
_PICKLE = "adapter_model.bin"
_REFUSED = {
    "use_dora": "it is a DoRA adapter, whose magnitudes plain LoRA cannot hold; train it without use_dora",
    "modules_to_save": "it trained whole layers, which no LoRA adapter can hold; train it without modules_to_save",
    "trainable_token_indices": "it trained embeddings of tokens; train it without trainable_token_indices",
    "rank_pattern": "its layers have different ranks; train it with one r",
    "alpha_pattern": "its layers have different scales; train it with one lora_alpha",
    **dict.fromkeys(EXTRAS, "it is no plain LoRA; train it without this setting"),
}
"""Settings of PEFT that are refused where they are set, each with the sentence."""


class ForeignAdapter(NamedTuple):
    """A plain LoRA adapter of another trainer, without its weights.

    scale: the factor of `B A x`
    layers: inputs and outputs of each adapted layer, by its name in the base
    base: the name or folder of its base, as it states it; None where it states none
    base_sha256: the hash of the base's weights, where a manifest of this toolkit lies beside the adapter
    sha256: the hash of the file of weights
    """

    folder: Path
    rank: int
    scale: float
    layers: Mapping[str, tuple[int, int]]
    base: str | None
    base_sha256: str | None
    sha256: str

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def digest(self) -> str:
        """sha256 over everything that decides a training."""
        return hashlib.sha256(json.dumps([self.rank, self.scale, self.sha256]).encode()).hexdigest()

    def problem(self, sentence: str) -> Problem:
        """A mistake of this adapter."""
        return Problem(str(self.folder), None, _KEY, sentence)


def read_foreign(folder: Path, rank: int) -> ForeignAdapter:
    """The adapter of a folder, to be trained on at `rank`. Raises InputError with everything that speaks against it."""
    config = _config(folder)
    problems = [Problem(str(folder / CONFIG), None, key, sentence) for key, sentence in _faults(config, rank)]
    shapes, faults = _shapes(folder)
    problems += faults
    layers: dict[str, tuple[int, int]] = {}
    for module in dict.fromkeys(module for module, _ in shapes):
        a, b = shapes.get((module, "A")), shapes.get((module, "B"))
        if a is None or b is None:
            problems.append(_of_weights(folder, f"`{module}` has one of lora_A and lora_B; it needs both"))
        elif not len(a) == len(b) == 2 or a[0] != config.get("r") or b[1] != config.get("r"):
            sentence = f"`{module}` has lora_A {list(a)} and lora_B {list(b)}, which are not of rank {config.get('r')}"
            problems.append(_of_weights(folder, f"{sentence}; save it anew with its adapter_config.json"))
        else:
            layers[module] = a[1], b[0]
    if not shapes and not faults:
        problems.append(_of_weights(folder, "holds no lora_A and lora_B; save the adapter anew"))
    if problems:
        raise InputError(problems)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    manifest, _ = read_manifest(folder / MANIFEST)
    base_sha256 = None if manifest is None else manifest["base"]["weights_sha256"]
    base = config.get(_BASE) or None
    return ForeignAdapter(folder, config["r"], scale, layers, base, base_sha256, sha256_of(folder / WEIGHTS))


def _config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises InputError where the folder holds no adapter."""
    file = folder / CONFIG
    if not file.is_file():
        checkpoints = [place.parent for place in folder.glob(f"checkpoint-*/{CONFIG}")]
        sentence = f"holds no {CONFIG}; name the folder of a PEFT adapter"
        if checkpoints:
            newest = max(checkpoints, key=lambda place: (_step(place), place.name))
            sentence = f"is no adapter but holds checkpoints of one; name one of them, such as the newest, {newest}"
        raise InputError([Problem(str(folder), None, _KEY, sentence)])
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise InputError([Problem(str(file), None, None, f"cannot be read ({fault}); save the adapter anew")]) from None
    if not isinstance(config, dict):
        raise InputError([Problem(str(file), None, None, "holds no JSON object; save the adapter anew")])
    return config


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1


def _faults(config: Mapping[str, Any], rank: int) -> Iterator[tuple[str, str]]:
    """Settings that no plain LoRA adapter of this rank may have: the key, and a sentence."""
    if (kind := config.get("peft_type")) != "LORA":
        yield "peft_type", f"is {kind!r}; only LORA adapters can be trained on"
    if (task := config.get("task_type")) not in ("CAUSAL_LM", None):
        yield "task_type", f"is {task!r}; the adapter of a chat model is CAUSAL_LM"
    for key, sentence in _REFUSED.items():
        if config.get(key):
            yield key, sentence
    if (bias := config.get("bias", "none")) != "none":
        yield "bias", f"is {bias!r}: it trained biases, which plain LoRA cannot hold; train it with bias none"
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        yield "init_lora_weights", f"is {start!r}, which changes the base; convert it to plain LoRA when you save it"
    r, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        yield "r", f"is {r!r}; it must be a whole number above 0"
    elif r > rank:
        yield "r", f"is {r}, and lora.rank is {rank}: a lower rank would change the adapter; set lora.rank to {r}"
    if not isinstance(base := config.get(_BASE), str | None):
        yield _BASE, f"is {base!r}; it must be a name or a folder"
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= sys.float_info.max:
        yield "lora_alpha", f"is {reprlib.repr(alpha)}; it must be a number above 0 that a float can hold"


def _shapes(folder: Path) -> tuple[dict[tuple[str, str], tuple[int, ...]], list[Problem]]:
    """The shape of each lora_A and lora_B, by layer and side; and the faults of the file. No weight is read."""
    from safetensors import SafetensorError, safe_open

    if not (folder / WEIGHTS).is_file():
        sentence = "is missing; save the adapter anew"
        if (folder / _PICKLE).is_file():
            sentence = f"is missing, and {_PICKLE} is a pickle, which can run code; save with safe_serialization=True"
        return {}, [_of_weights(folder, sentence)]
    shapes, problems = dict[tuple[str, str], tuple[int, ...]](), []
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor, match = tensors.get_slice(name), TENSOR.fullmatch(name)
                if match is None:
                    sentence = f"holds `{name}`, which is neither lora_A nor lora_B of a layer; train it without"
                    problems.append(_of_weights(folder, sentence))
                elif tensor.get_dtype() not in FLOATS:
                    sentence = f"`{name}` is of type {tensor.get_dtype()}; save it as one of {', '.join(FLOATS)}"
                    problems.append(_of_weights(folder, sentence))
                else:
                    shapes[match["module"], match["side"]] = tuple(tensor.get_shape())
    except (SafetensorError, OSError) as fault:
        problems.append(_of_weights(folder, f"cannot be read ({fault}); save the adapter anew"))
    return shapes, problems


def _of_weights(folder: Path, sentence: str) -> Problem:
    return Problem(str(folder / WEIGHTS), None, None, sentence)
