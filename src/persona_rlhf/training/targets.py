"""Which layers of a base get adapters, and which of them cannot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.training.quantized import is_linear
from persona_rlhf.training.settings import LoraSettings
from persona_rlhf.training.trunk import decoder_layers, layer_number


class Targets(NamedTuple):
    """Names of the layers to adapt, in the order of the model; the number of the first decoder layer among them; and
    one sentence on those that `all-linear` would mean but that cannot be adapted, None where there are none."""

    names: list[str]
    first: int
    notice: str | None


def targets(model: PreTrainedModel, lora: LoraSettings) -> Targets:
    """What `lora` means in this model. Raises InputError for names that mean nothing in it, or cannot be adapted."""
    stack, first = "", 0
    found = decoder_layers(model)
    if lora.layers != "all" and found is not None:
        stack, first = found[0], len(found[1]) - max(1, round(lora.layers.top * len(found[1])))

    def meant(name: str) -> bool:
        number = layer_number(name, stack)
        return first == 0 or (number is not None and number >= first)

    names = [name for name in adaptable_layers(model, lora.target_modules) if meant(name)]
    if lora.target_modules != "all-linear":
        return Targets(names, first, None)
    hindered = {(re.sub(r"\.\d+\.", ".*.", name), why) for name, why in obstacles(model).items() if meant(name)}
    told = ", ".join(f"{name} ({why})" for name, why in sorted(hindered))
    return Targets(names, first, f"Layers without adapters, which stay as the base has them: {told}" if told else None)


def adaptable_layers(model: PreTrainedModel, target_modules: str | Sequence[str]) -> list[str]:
    """Names of the linear layers to adapt, in the order of the model.

    `all-linear` means what PEFT means by it: every linear layer but the output head. Names are matched as PEFT does,
    whole or by their last parts. Raises InputError where a name matches nothing, or a layer cannot be adapted.
    """
    base, head, hindered = model.name_or_path or "the base", model.get_output_embeddings(), obstacles(model)
    linear = [name for name, m in model.named_modules() if is_linear(m) and m is not head and name not in hindered]
    if target_modules == "all-linear":
        if not linear:
            raise InputError([Problem(base, None, None, "the base has no linear layer to adapt")])
        return linear
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    named = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    problems, chosen = [], set()
    for target in wanted:
        found = [name for name in named if name == target or name.endswith("." + target)]
        bad = [name for name in found if name not in linear]
        if not found:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
            sentence = f"`{target}` names no layer of the base; its linear layers are {', '.join(leaves)}"
            problems.append(Problem(base, None, "lora.target_modules", sentence))
        elif bad:
            why = hindered.get(bad[0], "it is no plain linear layer within the decoder")
            sentence = f"`{bad[0]}` cannot be adapted: {why}; leave `{target}` out, or name the layers you mean in full"
            problems.append(Problem(base, None, "lora.target_modules", sentence))
        chosen.update(found)
    if problems:
        raise InputError(problems)
    return [name for name in linear if name in chosen]


def obstacles(model: PreTrainedModel) -> dict[str, str]:
    """The layers with matrices that no adapter can be put on, and why; embeddings and the output head are not meant."""
    head = model.get_output_embeddings()
    layers = [(n, m) for n, m in model.named_modules() if m is not head and not isinstance(m, nn.Embedding)]
    odd = {
        name: f"a {type(module).__name__} is no plain linear layer"
        for name, module in layers
        if not is_linear(module) and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    mistaken = _taken_for_experts(model, {name.rsplit(".", 1)[-1] for name, module in layers if is_linear(module)})
    lost = {name: "PEFT would take it for a fused expert" for name, _ in layers if name.rsplit(".", 1)[-1] in mistaken}
    return lost | odd


def _taken_for_experts(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Of the last names of linear layers those that PEFT reads as experts of a mixture, which became fused since."""
    if all(parameter.dim() < 3 for parameter in model.parameters()):
        return set()
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT takes names as they are
        return set()
    mistaken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it is one of two that must be named together
            mistaken.add(name)
        else:
            mistaken |= {name} - set(config.target_modules or ())
    return mistaken
