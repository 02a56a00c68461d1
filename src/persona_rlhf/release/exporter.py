"""Writes the adapters of a run as they are judged: PEFT's two files, the card, and the manifest last."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.measures import Measures
from persona_rlhf.preferences.identity import slug
from persona_rlhf.release.card import card
from persona_rlhf.release.export import ADAPTERS
from persona_rlhf.release.folder import write_folder
from persona_rlhf.release.manifest import MANIFEST, DataInfo, Provenance, manifest_of, rendered
from persona_rlhf.release.outcome import Written
from persona_rlhf.release.peft_folder import adapter_files
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.settings import LoraSettings


@dataclass(frozen=True, slots=True)
class Exporter:
    """Writes the adapters of one run. `lora_alpha` stays the config's integer, whatever alpha is released.

    `nested` puts each into one of 256 subfolders: no folder system likes tens of thousands side by side.
    """

    run: Path
    adapted: AdaptedModel
    lora: LoraSettings
    provenance: Provenance
    nested: bool = False

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
        files = adapter_files(self.adapted, flat, verdict.alpha, self.lora, self.provenance.base)
        files["README.md"] = card(self.provenance, data, verdict, measures).encode()
        manifest = rendered(manifest_of(user_id, self.provenance, data, verdict, files))
        name = slug(user_id)
        path = f"{ADAPTERS}/{name[-2:]}/{name}" if self.nested else f"{ADAPTERS}/{name}"
        write_folder(self.run / path, {**files, MANIFEST: manifest})
        return Written(path, hashlib.sha256(manifest).hexdigest())
