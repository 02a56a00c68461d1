"""Memory model: bytes of a machine and of a step, the number of users that fit side by side, and shapes of bases.

The largest step of one user is measured, or counted from the shape of a base without its weights. Its bytes and tokens,
against those of the device, give the number of slots.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from heapq import nlargest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import find, is_gguf, is_hub_id
from persona_rlhf.config.training import BaseSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.attention import packed_attention
from persona_rlhf.models.base import Fp8Linear, fits_fp8, is_linear
from persona_rlhf.models.base_folder import cannot_load, config_reasons
from persona_rlhf.models.model_files import gguf_config
from persona_rlhf.models.model_split import token_logps
from persona_rlhf.models.multi_lora import LayerSpan, MultiLoRALinear, attach, lora_matrices, target_layers
from persona_rlhf.models.packing import pack
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import ConstraintFunctional, ConstraintSample
from persona_rlhf.training.objective import step_loss
from persona_rlhf.training.user_state import Slots

_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes(device: torch.device) -> int:
    """All memory of a device: a GPU's own, or the machine's (of a container: its limit). Memory in use by others is not
    subtracted, so that the same machine always gives the same number."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [file.read_text().strip() for name in _CONTAINER_LIMITS if (file := Path(name)).is_file()]
    return min([installed, *(int(limit) for limit in limits if limit.isdigit())])


def most_held(device: torch.device) -> int:
    """The peak memory of this process in bytes: of tensors on a GPU, else its resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_by(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors; shared storage is counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def taken_by(work: Callable[[], object], device: torch.device) -> int:
    """The peak bytes of tensors that `work` adds to those held before it.

    A GPU's allocator keeps count. On a CPU the tensors themselves are counted, because a process's memory depends on
    its past; scratch memory of kernels is not counted there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    counter = _Counter()
    with counter:
        work()
    return counter.most


class _Counter(TorchDispatchMode):
    """Counter of the storage that operations create, until it is freed; `most` is the largest sum, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in inputs:
                self._watch(leaf.untyped_storage())
        return results

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return

        def freed(_: object) -> None:
            self.now -= self._alive.pop(key)[1]

        self._alive[key] = (weakref.ref(storage, freed), storage.nbytes())
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)


_CPU_SLOTS = 8  # more gains nothing on any shape: on a CPU users share only the overhead of a step
_CPU_NUMBERS = 1 << 21
"""Numbers in the widest tensor of a CPU's step, 8 MiB in float32. Larger tensors fall out of the cache between two
operations, which costs more than the shared overhead saves (measured: docs/explanation/performance.md)."""
_GPU_TOKENS = 65_536  # in a step; more does not fill the device any better
_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of the memory; the rest is for judging, and on a CPU for other programs


class StepCost(NamedTuple):
    """One user's largest step: its `tokens`, the `memory` (bytes) of adapter, moments and activations in it, and the
    `width` of the widest adapted layer (numbers a token)."""

    tokens: int
    memory: int
    width: int


def choose_slots(fleet: FleetSettings, cost: StepCost, device: str, machine: int, base: int) -> int:
    """Users in memory at once: `fleet.slots`, or as many as memory and the token budget allow; at least 1.

    `machine` is all memory of the device, `base` what the base takes of it; both in bytes.
    """
    if fleet.slots != "auto":
        return fleet.slots
    in_memory = int(machine * _SHARE[device] - base) // cost.memory
    return max(1, min(in_memory, _most_slots(fleet, cost.tokens, cost.width, device)))


def _most_slots(fleet: FleetSettings, tokens: int, width: int, device: str) -> int:
    """Users whose largest steps, of so many `tokens` each, keep to the token budget; perhaps 0."""
    best = _CPU_NUMBERS // width if device == "cpu" else _GPU_TOKENS
    fits = (best if fleet.tokens_per_step == "auto" else fleet.tokens_per_step) // tokens
    return min(fits, _CPU_SLOTS) if device == "cpu" else fits


def slots_of(
    adapted: AdaptedModel,
    users: Sequence[UserRows],
    constraint: ConstraintFunctional | None,
    dpo: DpoSettings,
    fleet: FleetSettings,
) -> int:
    """The number of slots of a run; for `auto`, one step is measured on an adapter that is thrown away, unless the
    token budget leaves room for one user only.

    It does not depend on other programs, so the same machine always chooses the same number.
    """
    if fleet.slots != "auto":
        return fleet.slots
    device, tokens = adapted.base.device, _tokens(*_largest(users, constraint, dpo))
    if _most_slots(fleet, tokens, widest(adapted.spans.values()), device.type) <= 1:
        return 1
    cost = largest_step(adapted, users, constraint, dpo)
    base = held_by(list(adapted.base.model.parameters()))
    return choose_slots(fleet, cost, device.type, machine_bytes(device), base)


def empty_slots(adapted: AdaptedModel, count: int, constraint: ConstraintFunctional | None, dpo: DpoSettings) -> Slots:
    """The state of `count` users at once, in fp32 at least, with a dual variable per name of the constraint."""
    names, gain = (constraint.names, constraint.gain) if constraint else ((), 0.0)
    dtype = torch.promote_types(adapted.base.model.dtype, torch.float32)
    return Slots(count, adapted.params_per_user, len(names), dpo, gain, adapted.base.device, dtype)


def pair_tokens(pair: PairRow) -> int:
    """The tokens that a pair adds to a step: its prompt once, and both answers."""
    return len(pair.chosen.prompt) + len(pair.chosen.completion) + len(pair.rejected.completion)


def largest_step(
    adapted: AdaptedModel,
    users: Sequence[UserRows],
    constraint: ConstraintFunctional | None,
    dpo: DpoSettings,
) -> StepCost:
    """The cost of a step of the run's longest pairs, whichever users they belong to, with the constraint's largest
    sample. No step of any user is larger."""
    pairs, samples = _largest(users, constraint, dpo)
    reference, device = _Unread(), adapted.base.device

    def step() -> None:
        slots = empty_slots(adapted, 1, constraint, dpo)
        learning, duals = slots.flat.detach().requires_grad_(), slots.duals.values
        with adapted.using(learning):
            step_loss(adapted, reference, [pairs], samples, constraint, duals, dpo).total.sum().backward()
        assert learning.grad is not None
        slots.optimizer.step(learning.grad, torch.zeros(1, dtype=torch.float64, device=device))

    return StepCost(_tokens(pairs, samples), taken_by(step, device), widest(adapted.spans.values()))


def _largest(
    users: Sequence[UserRows], constraint: ConstraintFunctional | None, dpo: DpoSettings
) -> tuple[list[PairRow], list[ConstraintSample]]:
    """The pairs and the constraint's sample of the largest step."""
    pairs = nlargest(dpo.pairs_per_step, (pair for user in users for pair in user.taught), key=pair_tokens)
    return pairs, [] if constraint is None else [constraint.largest()]


def _tokens(pairs: Sequence[PairRow], samples: Sequence[ConstraintSample]) -> int:
    return sum(map(pair_tokens, pairs)) + sum(row.length for sample in samples for row in sample.rows)


def widest(spans: Iterable[LayerSpan]) -> int:
    """Most inputs or outputs of any adapted layer."""
    return max(max(span.inputs, span.outputs) for span in spans)


class _Unread(Reference):
    """A reference of zeros: the memory of a step does not depend on the values."""

    def __init__(self) -> None:
        pass

    def __getitem__(self, row: Row) -> float:
        return 0.0


_META = torch.device("meta")
_SHAPES = "data/shapes.json"


class StepWork(NamedTuple):
    """A step of one user: its `tokens`; floating-point operations of the forward pass and of `both` passes; the bytes
    `kept` for the backward pass."""

    tokens: int
    forward: int
    both: int
    kept: int


_NF4_BITS = 4.127
"""Bits per weight: four, and a share of the quantization constants, which are quantized too (QLoRA, section 3)."""


class BaseShape:
    """The shape of a base from its config: tensors without values, so nothing is read or computed."""

    def __init__(
        self, config: PreTrainedConfig, lora: LoraSettings, dtype: torch.dtype, quantization: str | None = None
    ) -> None:
        with _META:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.requires_grad_(False).eval()
        self.parameters, self._quantization = self.model.num_parameters(), quantization
        self.spans = attach(self.model, target_layers(self.model, lora).names, lora.rank, lora.alpha / lora.rank)
        self.adapter_parameters = max(span.stop for span in self.spans.values())

    @property
    def base_bytes(self) -> int:
        """Bytes of the frozen weights."""
        head = self.model.get_output_embeddings()
        layers = [m for m in self.model.modules() if is_linear(m) and m is not head]
        rest = self.parameters - sum(layer.weight.numel() for layer in layers)
        return int(rest * self.model.dtype.itemsize + sum(map(self._stored, layers)))

    def _stored(self, layer: nn.Linear | Conv1D | Fp8Linear) -> float:
        """Bytes of a linear layer's weight."""
        if self._quantization == "nf4":
            return layer.weight.numel() * _NF4_BITS / 8
        if self._quantization == "fp8" and fits_fp8(layer):
            outputs = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
            return layer.weight.numel() + outputs * torch.float32.itemsize
        return layer.weight.numel() * self.model.dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize)

    def step(self, rows: Sequence[Row]) -> StepWork:
        """The work of one step over these rows: shared prompts once, as packed batches have them."""
        flat = torch.zeros(1, self.adapter_parameters, device=_META, requires_grad=True)
        spans = list(self.spans.values())
        for span, (a, b) in zip(spans, lora_matrices(flat, spans), strict=True):
            layer = self.model.get_submodule(span.name)
            assert isinstance(layer, MultiLoRALinear)
            layer.a, layer.b = a, b
        batch = pack(rows, 1, 0, _META)
        counted = {tensor.untyped_storage()._cdata for tensor in (*self.model.parameters(), flat)}
        kept: list[Tensor] = []  # held, so that no storage is reused and counted once

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in counted:
                counted.add(tensor.untyped_storage()._cdata)
                kept.append(tensor)
            return tensor

        head = self.model.get_output_embeddings()
        assert head is not None
        with packed_attention(self.model.config.get_text_config()), FlopCounterMode(display=False) as counter:
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                hidden = self.model.base_model(
                    input_ids=batch.input_ids, use_cache=False, position_ids=batch.position_ids, layout=batch.layout
                ).last_hidden_state
                loss = token_logps(head(batch.predictors(hidden.flatten(0, 1))), batch.targets).sum()
            forward = counter.get_total_flops()
            loss.backward()
            both = counter.get_total_flops()
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept)
        return StepWork(batch.input_ids.numel(), forward, both, size)


def shape_of(base: BaseSettings, lora: LoraSettings) -> BaseShape:
    """The shape of a base by its name, from a shipped config, a folder or the hub.

    Raises InputError if there is no config, or if packed attention does not work with its architecture.
    """
    try:
        dtype = torch.float32 if base.dtype == "float32" else torch.bfloat16
        return BaseShape(_config(base.model), lora, dtype, base.quantization)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as fault:
        raise cannot_load(base.model, fault) from fault


def _config(model: str) -> PreTrainedConfig:
    shipped = json.loads(find(_SHAPES).read_text())
    if model in shipped:
        return AutoConfig.for_model(**shipped[model])
    name = model if is_hub_id(model) else find(model)
    if is_gguf(name):
        return gguf_config(model, Path(name))
    config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if reasons := list(config_reasons(config.to_dict())):
        raise InputError([Problem(model, None, "base.model", reason) for reason in reasons])
    return config
