"""The linear layers of a base that get adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.models.base import is_linear
from persona_rlhf.models.model_split import decoder_layers, layer_number


class TargetLayers(NamedTuple):
    """Layers to adapt.

    names: module names, in the order of the model
    first: number of the lowest decoder layer that is adapted
    notice: a sentence on layers that `all-linear` covers but that cannot be adapted; None without such layers
    """

    names: list[str]
    first: int
    notice: str | None


def target_layers(model: PreTrainedModel, lora: LoraSettings) -> TargetLayers:
    """Layers of this model that `lora` selects. Raises InputError for names that match nothing or cannot be adapted."""
    stack, first = "", 0
    decoder = decoder_layers(model)
    if lora.layers != "all" and decoder is not None:
        stack, first = decoder[0], len(decoder[1]) - max(1, round(lora.layers.top * len(decoder[1])))

    def selected(name: str) -> bool:
        number = layer_number(name, stack)
        return first == 0 or (number is not None and number >= first)

    names = [name for name in adaptable_layers(model, lora.target_modules) if selected(name)]
    if lora.target_modules != "all-linear":
        return TargetLayers(names, first, None)
    reasons = unadaptable_layers(model).items()
    skipped = {(re.sub(r"\.\d+\.", ".*.", name), reason) for name, reason in reasons if selected(name)}
    listed = ", ".join(f"{name} ({reason})" for name, reason in sorted(skipped))
    notice = f"Layers without adapters, which stay as the base has them: {listed}" if skipped else None
    return TargetLayers(names, first, notice)


def adaptable_layers(model: PreTrainedModel, target_modules: str | Sequence[str]) -> list[str]:
    """Names of the linear layers to adapt, in the order of the model.

    `all-linear` has PEFT's meaning: every linear layer but the output head. Names match as in PEFT, whole or by their
    last parts. Raises InputError for a name that matches nothing, or a layer that cannot be adapted.
    """
    base, head, unadaptable = model.name_or_path or "the base", model.get_output_embeddings(), unadaptable_layers(model)
    linear = [name for name, m in model.named_modules() if is_linear(m) and m is not head and name not in unadaptable]
    if target_modules == "all-linear":
        if not linear:
            raise InputError([Problem(base, None, None, "the base has no linear layer to adapt")])
        return linear
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    problems, chosen = [], set()
    for target in targets:
        matches = [name for name in names if name == target or name.endswith("." + target)]
        bad = [name for name in matches if name not in linear]
        if not matches:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
            sentence = f"`{target}` names no layer of the base; its linear layers are {', '.join(leaves)}"
            problems.append(Problem(base, None, "lora.target_modules", sentence))
        elif bad:
            reason = unadaptable.get(bad[0], "it is no plain linear layer within the decoder")
            sentence = (
                f"`{bad[0]}` cannot be adapted: {reason}; leave `{target}` out, or name the layers you mean in full"
            )
            problems.append(Problem(base, None, "lora.target_modules", sentence))
        chosen.update(matches)
    if problems:
        raise InputError(problems)
    return [name for name in linear if name in chosen]


def unadaptable_layers(model: PreTrainedModel) -> dict[str, str]:
    """Layers with weight matrices that can carry no adapter, each with the reason.

    Embeddings and the output head are left out.
    """
    head = model.get_output_embeddings()
    layers = [(n, m) for n, m in model.named_modules() if m is not head and not isinstance(m, nn.Embedding)]
    nonlinear = {
        name: f"a {type(module).__name__} is no plain linear layer"
        for name, module in layers
        if not is_linear(module) and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    experts = _read_as_experts(model, {name.rsplit(".", 1)[-1] for name, module in layers if is_linear(module)})
    misread = {
        name: "PEFT would take it for a fused expert" for name, _ in layers if name.rsplit(".", 1)[-1] in experts
    }
    return misread | nonlinear


def _read_as_experts(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Last names of linear layers that PEFT takes for experts of a mixture, which newer models fuse."""
    if all(parameter.dim() < 3 for parameter in model.parameters()):
        return set()
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT takes names as they are
        return set()
    experts = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it is one of two that must be named together
            experts.add(name)
        else:
            experts |= {name} - set(config.target_modules or ())
    return experts
