"""Adapters as plain PEFT folders: weights, config, card and manifest of each released user."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from persona_rlhf.common.files import atomic_folder, slug
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.records import Measures
from persona_rlhf.evaluation.spending import Spending
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.multi_lora import LayerSpan, lora_matrices
from persona_rlhf.release.card import card
from persona_rlhf.release.compatibility import CARD, CONFIG, WEIGHTS, lint
from persona_rlhf.release.export import ADAPTERS
from persona_rlhf.release.manifest import MANIFEST, BaseInfo, DataInfo, Provenance, Stamp, manifest_of, rendered
from persona_rlhf.release.results import Written
from persona_rlhf.release.signing import SIGNATURE, Signer


class AdapterFiles:
    """Builds the two PEFT files of an adapter; the same adapter gives the same bytes.

    The base is read at construction only, so another thread can build files while the base computes.
    """

    def __init__(self, adapted: AdaptedModel, lora: LoraSettings, base: BaseInfo) -> None:
        self._spans = list(adapted.spans.values())
        layers = {
            name.removesuffix(".frozen") for name, m in adapted.base.model.named_modules() if hasattr(m, "weight")
        }
        config = {
            # Plain LoRA: only A and B, scaled by lora_alpha / rank.
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.name,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": target_modules(adapted.spans, layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(adapted.layer(span).transposed for span in self._spans),
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
        }
        self._config = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()

    def of(self, flat: Float[Tensor, " params"], alpha: float) -> dict[str, bytes]:
        """The files of one adapter, at `alpha`, by name."""
        return {CONFIG: self._config, WEIGHTS: save(_tensors(flat, self._spans, alpha), metadata={"format": "pt"})}


def target_modules(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The adapted layers by last names if these match no other module of the base, else by full names.

    `modules` are the names of all linear layers of the base. Multi-adapter servers expect last names.
    """
    adapted = set(adapted)
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    matched = {name for name in modules if name.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves) if matched <= adapted else sorted(adapted)


def _tensors(
    flat: Float[Tensor, " params"], spans: Sequence[LayerSpan], alpha: float
) -> dict[str, Float[Tensor, "..."]]:
    """A and alpha B of every layer in float32, under PEFT's names: the released scale is folded into B."""
    tensors: dict[str, Tensor] = {}
    for span, (a, b) in zip(spans, lora_matrices(flat.detach().to("cpu", torch.float32)[None], spans), strict=True):
        tensors[tensor_name(span, "A")] = a[0].contiguous()
        tensors[tensor_name(span, "B")] = (b[0] * alpha).contiguous()
    return tensors


def tensor_name(span: LayerSpan, side: str) -> str:
    """PEFT's name of A or B of a layer."""
    return f"base_model.model.{span.name}.lora_{side}.weight"


def read_adapter(folder: Path, spans: Sequence[LayerSpan], alpha: float = 1.0) -> Float[Tensor, " params"]:
    """The adapter of a folder as a flat vector (see `adapter_vector`)."""
    return adapter_vector((folder / WEIGHTS).read_bytes(), spans, alpha)


def adapter_vector(weights: bytes, spans: Sequence[LayerSpan], alpha: float = 1.0) -> Float[Tensor, " params"]:
    """The bytes of an adapter's weights file as a flat vector, for use at alpha 1: it includes the released scale.

    With the `alpha` of its release, that scale is divided out: the adapter as trained, exact in float32 if alpha is a
    power of two.
    """
    tensors, scales = load(weights), {"A": 1.0, "B": alpha}
    parts = ((tensors[tensor_name(span, side)], scales[side]) for span in spans for side in "AB")
    return torch.cat([tensor.float().flatten() / scale for tensor, scale in parts])


_BLANK = Stamp()


@dataclass(frozen=True, slots=True)
class Exporter:
    """Writes the adapters of one run. `lora_alpha` stays the config's integer at every released alpha.

    `nested` spreads them over 256 subfolders, for runs of many thousands. `stamp` adds entries to their manifests;
    `sign` makes the signature file of a manifest. `start` is as in `manifest_of`.
    """

    run: Path
    adapter: AdapterFiles
    provenance: Provenance
    nested: bool = False
    stamp: Stamp = _BLANK
    sign: Signer | None = None
    start: str | None = None

    def write(
        self,
        user_id: str,
        flat: Float[Tensor, " params"],
        verdict: Verdict,
        measures: Measures | None,
        data: DataInfo,
        spending: Spending | None = None,
        prior: bool = False,
    ) -> Written:
        """Writes RUN/adapters/SLUG (or RUN/adapters/XX/SLUG): weights, config, card and manifest.

        `prior`: the adapter is the population's.

        Raises ValueError, and writes nothing, where a common loader would refuse the folder (`compatibility.lint`).
        """
        assert verdict.admitted and verdict.alpha > 0, f"{user_id} is held back"  # noqa: PT018
        files = self.adapter.of(flat, verdict.alpha)
        start = None if prior else self.start
        composed = self.provenance.composed(user_id)
        files[CARD] = card(self.provenance, data, verdict, measures, spending, prior, start, composed).encode()
        entries = manifest_of(user_id, self.provenance, data, verdict, files, self.stamp, spending, prior, start)
        manifest = rendered(entries)
        name = slug(user_id)
        path = f"{ADAPTERS}/{name[-2:]}/{name}" if self.nested else f"{ADAPTERS}/{name}"
        signature = {} if self.sign is None else {f"{MANIFEST}{SIGNATURE}": self.sign(manifest)}
        with atomic_folder(self.run / path) as folder:
            for file, content in {**files, MANIFEST: manifest, **signature}.items():
                (folder / file).write_bytes(content)
            if refused := [str(finding) for finding in lint(folder) if finding.refused]:
                raise ValueError("; ".join(refused))
        return Written(path, hashlib.sha256(manifest).hexdigest())
