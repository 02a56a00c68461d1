"""Which adapters of a run may be served at this moment: asked again and again, since a day may change the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from persona_rlhf.apps.writing import Declined
from persona_rlhf.release.admission import refusals_to_release
from persona_rlhf.release.manifest import MANIFEST, read_manifest
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.training.settings import LoraSettings

RECHECK_SECONDS = 10.0
"""How old an answer may be: an edited file or a revocation stops an adapter that is in use after this at the latest."""


class Admitted:
    """The users of a run, by slug, whose adapters fit a base (by the hash of its weights) and these LoRA settings.

    `tell` hears why an adapter is not served, for the people who run the server; its user hears only that it is not.
    """

    def __init__(
        self,
        run: Path,
        weights_hash: str,
        lora: LoraSettings,
        tell: Callable[[str], None],
        only: Collection[str] | None = None,
    ) -> None:
        """`only` these users are kept, of a run of many. Raises InputError where the run has no results."""
        self.run, self._base, self._lora, self._tell = run, weights_hash, lora.model_dump(mode="json"), tell
        self.results = {one.slug: one for one in RunResults(run) if only is None or one.slug in only}
        self._checked: dict[str, tuple[float, bool]] = {}
        self._lock = threading.Lock()

    def check(self, slug: str, again: bool = False) -> Result:
        """The line of a user who may be served, looked at anew where the last look is old, or `again` is asked.

        Raises Declined where he may not.
        """
        with self._lock:
            moment, fine = self._checked.get(slug, (-RECHECK_SECONDS, False))
            if again or time.monotonic() - moment >= RECHECK_SECONDS:
                reasons = self.reasons(slug)
                fine = not reasons
                self._checked[slug] = (time.monotonic(), fine)
                if reasons:
                    self._tell(f"{slug} is not served: {'; '.join(reasons)}")
        if not fine:
            raise Declined(403, "The adapter behind this model may not be served at present.", "adapter_not_served")
        return self.results[slug]

    def folder(self, slug: str) -> Path:
        """Where the adapter of a released user lies."""
        path = self.results[slug].path
        assert path is not None, f"{slug} is not released"
        return self.run / path

    def reasons(self, slug: str) -> list[str]:
        """Why a user's adapter may not be served; an empty list where it may."""
        result = self.results.get(slug)
        if result is None:
            return ["the run has no such user"]
        reasons = refusals_to_release(self.run, result)
        if reasons:
            return reasons
        manifest, faults = read_manifest(self.folder(slug) / MANIFEST)
        return faults if manifest is None else self._misfits(manifest)

    def _misfits(self, manifest: dict[str, Any]) -> list[str]:
        reasons = []
        if manifest["base"]["weights_sha256"] != self._base:
            reasons.append("it was released for another base: the hash of the weights is not that of this one")
        if manifest["settings"]["lora"] != self._lora:
            reasons.append("it was trained with other LoRA settings than those of this run's config")
        return reasons
