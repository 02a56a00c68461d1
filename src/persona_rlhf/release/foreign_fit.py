"""Another trainer's adapter over a loaded base: whether it fits, and its flat vector."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PureWindowsPath

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import find
from persona_rlhf.config.training import BaseSettings
from persona_rlhf.models.base import weights_hash
from persona_rlhf.models.multi_lora import LayerSpan, lora_matrices
from persona_rlhf.release.adapter import tensor_name
from persona_rlhf.release.foreign_adapter import ForeignAdapter


def fit_problems(
    adapter: ForeignAdapter, base: BaseSettings, base_hash: str, spans: Mapping[str, LayerSpan]
) -> list[Problem]:
    """Another base, layers that the run does not adapt, other shapes, and values that are not finite in float32.

    `spans` are the layers that the run adapts, by name.
    """
    problems = _base_problems(adapter, base, base_hash)
    outside = [name for name in adapter.layers if name not in spans]
    if outside:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in outside}))
        sentence = f"adapts {len(outside)} layers that the run does not, such as `{outside[0]}`"
        sentence += f"; let lora.target_modules and lora.layers cover {leaves}"
        problems.append(adapter.problem(sentence))
    for name, (inputs, outputs) in adapter.layers.items():
        span = spans.get(name)
        if span is not None and (span.inputs, span.outputs) != (inputs, outputs):
            sentence = f"`{name}` takes {inputs} inputs to {outputs} outputs, and {span.inputs} to {span.outputs} in "
            problems.append(adapter.problem(f"{sentence}{base.model}: it is an adapter of another base"))
            break  # one layer tells it
    for name, tensor in _tensors(adapter.weights, adapter.sha256).items():
        if not bool((tensor.float() * adapter.scale).isfinite().all()):
            sentence = f"`{name}` times the scale {adapter.scale:g} holds values that are not finite"
            problems.append(
                adapter.problem(f"{sentence}; take an earlier checkpoint, or one with a smaller lora_alpha")
            )
            break
    return problems


def _base_problems(adapter: ForeignAdapter, base: BaseSettings, base_hash: str) -> list[Problem]:
    """The problem of an adapter of another base.

    The weights are compared by their hash where they are known: by a manifest of this toolkit, or from the folder that
    the adapter names. Else the last parts of the names are compared; an adapter without a name is taken as it is.
    """
    if adapter.base_sha256 is not None:
        other = None if adapter.base_sha256 == base_hash else f"the base with sha256 {adapter.base_sha256[:16]}"
    elif adapter.base is None:
        other = None
    elif (there := _hash_of(adapter.base, base)) is not None:
        other = None if there == base_hash else f"the weights in {adapter.base}"
    else:
        other = None if _last_part(adapter.base) == _last_part(base.model) else adapter.base
    if other is None:
        return []
    sentence = f"was trained over {other}, and base.model is {base.model} (sha256 {base_hash[:16]})"
    if adapter.base_sha256 is None:
        sentence += "; if both are the same weights, write that name as base_model_name_or_path of adapter_config.json"
    return [adapter.problem(sentence)]


def _hash_of(name: str, base: BaseSettings) -> str | None:
    """The hash of the weights in a folder of this machine, stored as `base` is; None where it holds no model."""
    try:
        if find(name).is_dir():
            return weights_hash(base.model_copy(update={"model": name}))
    except InputError:
        pass
    return None


@lru_cache(maxsize=1)
def _tensors(weights: Path, sha256: str) -> Mapping[str, Tensor]:
    """The weights of an adapter, read once for all users of a run; the hash tells another file at the same place."""
    return load_file(weights)


def _last_part(name: str) -> str:
    return PureWindowsPath(name).name.casefold()


def started(
    adapter: ForeignAdapter,
    spans: Mapping[str, LayerSpan],
    scale: float,
    fresh: Float[Tensor, " params"],
) -> Float[Tensor, " params"]:
    """The adapter as a flat vector for a run that scales `B A x` by `scale`: the same function, in float32.

    B takes the ratio of the scales. `fresh` is a new adapter, whose B is zero: it gives A to the ranks and layers that
    the adapter lacks, so that they can be trained and change nothing before.
    """
    flat, tensors = fresh.clone(), _tensors(adapter.weights, adapter.sha256)
    places = list(spans.values())
    for span, (a, b) in zip(places, lora_matrices(flat[None], places), strict=True):
        if span.name in adapter.layers:
            a[0, : adapter.rank] = tensors[tensor_name(span, "A")].float()
            b[0, :, : adapter.rank] = tensors[tensor_name(span, "B")].float() * (adapter.scale / scale)
    return flat
