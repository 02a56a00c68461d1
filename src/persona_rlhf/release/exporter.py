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
from persona_rlhf.release.documents import SIGNATURE
from persona_rlhf.release.export import ADAPTERS
from persona_rlhf.release.folder import write_folder
from persona_rlhf.release.manifest import MANIFEST, DataInfo, Provenance, Stamp, manifest_of, rendered
from persona_rlhf.release.outcome import Written
from persona_rlhf.release.peft_folder import AdapterFiles
from persona_rlhf.release.signing import Signer

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
