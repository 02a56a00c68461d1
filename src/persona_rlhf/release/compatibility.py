"""Checks of an adapter folder against the requirements of PEFT, vLLM, llama.cpp and LoRAX, without loading weights.

Rules as of PEFT 0.21 (tuners/lora/config.py), vLLM 0.32 (vllm/lora/peft_helper.py, lora_model.py, config/lora.py),
llama.cpp (convert_lora_to_gguf.py; llama-adapter.h for the scale) and LoRAX (docs/models/adapters/lora.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

CARD, CONFIG, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The allowed values of `vllm serve --max-lora-rank`."""

_VLLM_DEFAULT_RANK, _LORAX_RANK = 16, 64
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
FLOATS = ("F32", "F16", "BF16")
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")
EXTRAS = ("lora_bias", "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "target_parameters")
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "tok_embeddings", "embed_in")
_VLLM_LAYERS = frozenset((
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
    "out_proj", "fc1", "fc2", "c_attn", "c_proj", "c_fc", "query_key_value", "dense", "dense_h_to_4h",
    "dense_4h_to_h", "fc_in", "fc_out", "Wqkv", "Wo", "Wi", "w1", "w2", "w3",
))  # fmt: skip
"""The linear layers of the model families that vLLM serves with adapters."""


class Finding(NamedTuple):
    """A problem that a loader has with an adapter.

    `refused`: it would not load, or compute something else. Otherwise it loads with a setting or on some bases only.
    """

    loader: str
    sentence: str
    refused: bool = True

    def __str__(self) -> str:
        return f"{self.loader}: {self.sentence}"


def lint(folder: Path) -> list[Finding]:
    """Every finding on this adapter folder; empty if all loaders load it as it is."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        tensors = _header(folder / WEIGHTS)
        card = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError) as fault:
        return [Finding("every loader", f"a file cannot be read ({type(fault).__name__}: {fault})")]
    if not isinstance(config, dict):
        return [Finding("every loader", f"{CONFIG} holds no object")]
    return [*_config_findings(config), *_tensor_findings(config, tensors), *_card_findings(card)]


def max_lora_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM for adapters of this rank. Raises ValueError above the largest."""
    fitting = [value for value in VLLM_RANKS if value >= rank]
    if not fitting:
        raise ValueError(f"vLLM serves adapters to rank {VLLM_RANKS[-1]}, this one has {rank}")
    return fitting[0]


def _header(file: Path) -> dict[str, str]:
    """The type of every tensor in a safetensors file, by name; the weights are not read. Raises ValueError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as fault:
        raise ValueError(f"{file.name}: {fault}") from None


def _config_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    if config.get("peft_type") != "LORA":
        yield Finding("PEFT", f"peft_type is {config.get('peft_type')!r}; plain adapters are LORA")
    if config.get("task_type") != "CAUSAL_LM":
        yield Finding("PEFT", f"task_type is {config.get('task_type')!r}; a chat model's adapter is CAUSAL_LM")
    yield from _rank_findings(config.get("r"))
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        yield Finding("vLLM", f"lora_alpha is {alpha!r}; it must be a number above 0")
    if config.get("bias", "none") != "none":
        yield Finding("vLLM", f"bias is {config['bias']!r}; only `none` is read")
    if config.get("modules_to_save"):
        yield Finding("vLLM", f"modules_to_save holds {config['modules_to_save']}; whole layers are not taken")
    if config.get("use_dora"):
        yield Finding("vLLM", "it is a DoRA adapter; llama.cpp takes none either")
    for key in EXTRAS:
        if config.get(key):
            yield Finding("vLLM", f"{key} is set; only plain LoRA is taken")
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        yield Finding("vLLM", f"init_lora_weights is {start!r}, which changes the base; plain LoRA starts with true")
    if config.get("use_rslora"):
        yield Finding(
            "llama.cpp", "use_rslora is ignored: it always scales by lora_alpha / r; fold the factor into lora_alpha"
        )
    if config.get("alpha_pattern"):
        yield Finding("llama.cpp", "alpha_pattern: it scales all layers by one lora_alpha")
    base = str(config.get("base_model_name_or_path") or "")
    if not base or _is_local_path(base):
        yield Finding("every loader", f"base_model_name_or_path is `{base}`, a folder that only one machine has")


def _rank_findings(rank: object) -> Iterator[Finding]:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        yield Finding("vLLM", f"r is {rank!r}; it must be a whole number above 0")
    elif rank > VLLM_RANKS[-1]:
        yield Finding("vLLM", f"r is {rank}; it serves adapters to rank {VLLM_RANKS[-1]}")
    elif rank > _VLLM_DEFAULT_RANK:
        yield Finding("vLLM", f"r is {rank}: start it with --max-lora-rank {max_lora_rank(rank)}", refused=False)
    if isinstance(rank, int) and _LORAX_RANK < rank <= VLLM_RANKS[-1]:
        yield Finding("LoRAX", f"r is {rank}: set LORAX_COMPILE_MAX_RANK to it, or do without --compile", refused=False)


def _tensor_findings(config: Mapping[str, Any], tensors: Mapping[str, str]) -> Iterator[Finding]:
    modules = set()
    for name, kind in tensors.items():
        if "lora_embedding_" in name or (name.split(".")[-2:-1] and name.split(".")[-2] in _EMBEDDINGS):
            yield Finding("llama.cpp", f"the weights hold an embedding, `{name}`")
        elif (match := TENSOR.fullmatch(name)) is None:
            yield Finding("vLLM", f"the weights hold `{name}`, which is neither lora_A nor lora_B of a layer")
        else:
            modules.add(match["module"])
        if kind not in FLOATS:
            yield Finding("llama.cpp", f"`{name}` is of type {kind}; it reads {', '.join(FLOATS)}")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        yield Finding("vLLM", f"target_modules is {targets!r}; it must list the adapted layers by name")
        return
    for target in sorted(set(targets)):
        if not any(_means(target, module) for module in modules):
            yield Finding("PEFT", f"target_modules names `{target}`, but there are no weights of it")
        leaf = target.rsplit(".", 1)[-1]
        if leaf == "lm_head":
            yield Finding("vLLM", "lm_head is adapted: not on bases that tie it to the embedding", refused=False)
        elif leaf not in _VLLM_LAYERS:
            yield Finding("vLLM", f"it may not know layers called `{leaf}` on this base", refused=False)
    for module in sorted(modules):
        if not any(_means(target, module) for target in targets):
            yield Finding("PEFT", f"target_modules does not name `{module}`: its weights would be left out")


def _means(target: str, module: str) -> bool:
    """Whether an entry of target_modules means this module in PEFT."""
    return module == target or module.endswith(f".{target}")


def _is_local_path(name: str) -> bool:
    """Whether a base's name is a path of one machine."""
    parts = PurePosixPath(name).parts
    return name.startswith(("/", "~")) or "\\" in name or ".." in parts or bool(PureWindowsPath(name).drive)


def _card_findings(card: str) -> Iterator[Finding]:
    """Findings on the front matter, read by the hub's own reader."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card).data
    except Exception as fault:  # YAML and the hub's classes raise many kinds
        yield Finding("the hub", f"the front matter of {CARD} cannot be read ({type(fault).__name__}: {fault})")
        return
    for key, value in (("library_name", "peft"), ("pipeline_tag", "text-generation")):
        if (stated := getattr(data, key, None)) != value:
            yield Finding("the hub", f"{CARD} has {key}: {stated}; an adapter's card has {value}")
    if (base := getattr(data, "base_model", None)) is not None and _is_local_path(str(base)):
        yield Finding("the hub", f"{CARD} names the base `{base}`, a folder of some machine")
