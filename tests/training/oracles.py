"""The slow and plain versions that the fleet is held against: PEFT models with one user's adapter."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.lora import LayerSpan, detach
from persona_rlhf.training.settings import LoraSettings


def peft_config(lora: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def weights(model: PeftModel, span: LayerSpan) -> tuple[Tensor, Tensor]:
    """PEFT's own A and B of one layer."""
    layer = model.get_submodule(f"base_model.model.{span.name}")
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def load_flat(model: PeftModel, spans: list[LayerSpan], flat: Tensor) -> None:
    """Copies one user's flat vector into a PEFT model, piece by piece."""
    with torch.no_grad():
        for span in spans:
            a, b = weights(model, span)
            a.copy_(flat[span.start : span.middle].view_as(a))
            b.copy_(flat[span.middle : span.stop].view_as(b))


def read_flat(model: PeftModel, spans: list[LayerSpan], gradients: bool = False) -> Tensor:
    """A PEFT model's adapter, or its gradient, as a flat vector."""
    parts = [part for span in spans for part in weights(model, span)]
    return torch.cat([(part.grad if gradients else part.detach()).flatten() for part in parts])


def peft_model(adapted: AdaptedModel, lora: LoraSettings, flat: Tensor) -> PeftModel:
    """PEFT's model of one user over a copy of the base."""
    model = copy.deepcopy(adapted.base.model)
    detach(model, list(adapted.spans))
    wrapped = get_peft_model(model, peft_config(lora)).eval()
    load_flat(wrapped, list(adapted.spans.values()), flat)
    return wrapped


def plain_logp(model: torch.nn.Module, row: Row) -> Tensor:
    """log P(completion | prompt) in nats: one row, no padding, the whole softmax."""
    ids = torch.tensor([[*row.prompt, *row.completion]])
    logps = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    start = len(row.prompt) - 1
    targets = torch.tensor(row.completion)
    return logps[start : start + len(targets)].gather(1, targets[:, None]).sum()
