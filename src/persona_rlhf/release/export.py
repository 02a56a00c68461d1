"""Adapters leave: written into the run when they are judged, copied out of it when they are asked for."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.preferences.identity import slug
from persona_rlhf.release.folder import write_folder
from persona_rlhf.release.manifest import MANIFEST, DataInfo, Provenance, manifest_of, rendered
from persona_rlhf.release.outcome import Written
from persona_rlhf.release.results import Result, read_results
from persona_rlhf.release.verify import adapter_faults

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from persona_rlhf.evaluation.measures import Measures
    from persona_rlhf.training.fleet import AdaptedModel
    from persona_rlhf.training.settings import LoraSettings

ADAPTERS = "adapters"


class HeldBack(Exception):  # noqa: N818 - it is a result, not an error: the CLI exits 3
    """The user's adapter may not leave; the message says why."""


@dataclass(frozen=True, slots=True)
class Exporter:
    """Writes the adapters of one run. `lora_alpha` stays the config's integer, whatever alpha is released."""

    run: Path
    adapted: AdaptedModel
    lora: LoraSettings
    provenance: Provenance

    def write(
        self,
        user_id: str,
        flat: Float[Tensor, " params"],
        verdict: Verdict,
        measures: Measures | None,
        data: DataInfo,
    ) -> Written:
        """Writes RUN/adapters/SLUG, whole or not at all."""
        from persona_rlhf.release.card import card
        from persona_rlhf.release.peft_folder import adapter_config, adapter_tensors, peft_files, target_modules

        assert verdict.admitted and verdict.alpha > 0, f"{user_id} is held back"  # noqa: PT018
        base = self.adapted.base
        linear = [name for name, module in base.model.named_modules() if hasattr(module, "weight")]
        targets = target_modules(self.adapted.spans, {name.removesuffix(".frozen") for name in linear})
        config = adapter_config(self.provenance.base, self.lora.rank, self.lora.alpha, targets)
        files = peft_files(config, adapter_tensors(flat, list(self.adapted.spans.values()), verdict.alpha))
        files["README.md"] = card(self.provenance, data, verdict, measures).encode()
        manifest = rendered(manifest_of(user_id, self.provenance, data, verdict, files))
        path = f"{ADAPTERS}/{slug(user_id)}"
        write_folder(self.run / path, {**files, MANIFEST: manifest})
        return Written(path, hashlib.sha256(manifest).hexdigest())


def find_user(run: Path, user_id: str) -> Result:
    """A user's line. Raises InputError where the run does not know him."""
    results = read_results(run)
    for result in results:
        if result.user_id == user_id:
            return result
    hint = did_you_mean(user_id, (result.user_id for result in results))
    raise InputError([Problem(str(run), None, "--user", f"no user `{user_id}` in this run{hint}")])


def export(run: Path, user_id: str, to: Path) -> Path:
    """Copies a released adapter, and nothing else of the run, to the folder `to`, which must be new or empty.

    Raises HeldBack where the user was not released or his folder does not verify, InputError for an unknown user or a
    folder that is taken.
    """
    result = find_user(run, user_id)
    if result.status != "released" or result.path is None:
        raise HeldBack(f"`{user_id}` is not released ({result.status}): {result.reason}")
    source = run / result.path
    faults = adapter_faults(source, result)
    if faults:
        raise HeldBack(f"the adapter of `{user_id}` does not verify: {'; '.join(faults)}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError([Problem(str(to), None, "--to", "something stands there already; name a new or empty folder")])
    if to.is_dir():
        to.rmdir()
    write_folder(to, {file.name: file.read_bytes() for file in sorted(source.iterdir())})
    return to


def remove_adapter(run: Path, user_id: str) -> None:
    """Takes a user's adapter out of the run, as when a new judgement holds him back."""
    shutil.rmtree(run / ADAPTERS / slug(user_id), ignore_errors=True)
