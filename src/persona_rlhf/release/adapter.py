"""Write one PEFT folder: weights, config, card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from persona_rlhf.common.files import slug, write_folder
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.records import Measures
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.multi_lora import LayerSpan, matrices
from persona_rlhf.release.card import card
from persona_rlhf.release.export import ADAPTERS
from persona_rlhf.release.manifest import MANIFEST, BaseInfo, DataInfo, Provenance, Stamp, manifest_of, rendered
from persona_rlhf.release.results import Written
from persona_rlhf.release.signing import SIGNATURE, Signer

# ----------------------------------------------------------------------------------------------------
# An adapter as a plain PEFT folder, which every loader of PEFT adapters reads.
# ----------------------------------------------------------------------------------------------------

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class AdapterFiles:
    """Makes the two files that make one user's adapter a PEFT adapter; the same adapter gives the same bytes.

    What the base has to say is asked here, so that files can be made by another thread while it computes.
    """

    def __init__(self, adapted: AdaptedModel, lora: LoraSettings, base: BaseInfo) -> None:
        self._spans = list(adapted.spans.values())
        layers = {
            name.removesuffix(".frozen") for name, m in adapted.base.model.named_modules() if hasattr(m, "weight")
        }
        config = {
            # What PEFT, vLLM and their like need to know: plain LoRA, nothing but A and B, scaled by lora_alpha / rank.
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
        """The files of one adapter, at `alpha`."""
        return {CONFIG: self._config, WEIGHTS: save(_tensors(flat, self._spans, alpha), metadata={"format": "pt"})}


def target_modules(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The adapted layers by their last names, where these mean no other module of the base; else by their full names.

    `modules` are the names of all linear layers of the base. Last names are what servers of many adapters look for.
    """
    adapted = set(adapted)
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    meant = {name for name in modules if name.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves) if meant <= adapted else sorted(adapted)


def _tensors(
    flat: Float[Tensor, " params"], spans: Sequence[LayerSpan], alpha: float
) -> dict[str, Float[Tensor, "..."]]:
    """A and alpha B of every layer in float32, under PEFT's names: the released scale is folded into B."""
    tensors: dict[str, Tensor] = {}
    for span, (a, b) in zip(spans, matrices(flat.detach().to("cpu", torch.float32)[None], spans), strict=True):
        tensors[_name(span, "A")] = a[0].contiguous()
        tensors[_name(span, "B")] = (b[0] * alpha).contiguous()
    return tensors


def _name(span: LayerSpan, side: str) -> str:
    return f"base_model.model.{span.name}.lora_{side}.weight"


def read_adapter(folder: Path, spans: Sequence[LayerSpan], alpha: float = 1.0) -> Float[Tensor, " params"]:
    """A folder's adapter as a flat vector, to be used at alpha 1: its released scale is in it already.

    Given the `alpha` it was released at, that scale is divided out again: the adapter as it was trained (in float32 to
    the bit where alpha is a power of two).
    """
    tensors, scales = load_file(folder / WEIGHTS), {"A": 1.0, "B": alpha}
    return torch.cat([tensors[_name(span, side)].float().flatten() / scales[side] for span in spans for side in "AB"])


# ----------------------------------------------------------------------------------------------------
# Writes the adapters of a run as they are judged: PEFT's two files, the card, and the manifest last.
# ----------------------------------------------------------------------------------------------------

_BLANK = Stamp()


@dataclass(frozen=True, slots=True)
class Exporter:
    """Writes the adapters of one run. `lora_alpha` stays the config's integer, whatever alpha is released.

    `nested` puts each into one of 256 subfolders: no folder system likes tens of thousands side by side. `stamp`
    is what their papers bear beside; `sign` makes the signature of a manifest's bytes, which then lies beside it.
    """

    run: Path
    adapter: AdapterFiles
    provenance: Provenance
    nested: bool = False
    stamp: Stamp = _BLANK
    sign: Signer | None = None

    def write(
        self,
        user_id: str,
        flat: Float[Tensor, " params"],
        verdict: Verdict,
        measures: Measures | None,
        data: DataInfo,
    ) -> Written:
        """Writes RUN/adapters/SLUG (or RUN/adapters/XX/SLUG), whole or not at all."""
        assert verdict.admitted and verdict.alpha > 0, f"{user_id} is held back"  # noqa: PT018
        files = self.adapter.of(flat, verdict.alpha)
        files["README.md"] = card(self.provenance, data, verdict, measures).encode()
        manifest = rendered(manifest_of(user_id, self.provenance, data, verdict, files, self.stamp))
        name = slug(user_id)
        path = f"{ADAPTERS}/{name[-2:]}/{name}" if self.nested else f"{ADAPTERS}/{name}"
        signature = {} if self.sign is None else {f"{MANIFEST}{SIGNATURE}": self.sign(manifest)}
        write_folder(self.run / path, {**files, MANIFEST: manifest, **signature})
        return Written(path, hashlib.sha256(manifest).hexdigest())
