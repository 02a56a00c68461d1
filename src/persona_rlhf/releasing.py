"""The end of the line: a cohort is judged, measured, and those of its adapters that may leave are written."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from persona_rlhf.config import Config
from persona_rlhf.evaluation.measures import Measures
from persona_rlhf.evaluation.retreat import Retreat
from persona_rlhf.inputs.problems import InputError
from persona_rlhf.preparation import Chunk, Prepared
from persona_rlhf.release import audit
from persona_rlhf.release.exporter import Exporter
from persona_rlhf.release.manifest import BaseInfo, Provenance, Stamp
from persona_rlhf.release.outcome import outcome
from persona_rlhf.release.results import Result
from persona_rlhf.release.revocation import last_day
from persona_rlhf.release.trail import ended, judged
from persona_rlhf.training.engine import TrainedUser

_WRITERS = 8
_FEW = 1_000  # users whose folders lie side by side; those of more lie in subfolders by hash
_ON_PAPER = {"seed", "screening", "lora", "dpo", "constraint", "gate", "release"}  # sections that a manifest repeats


def release(
    ready: Prepared,
    run: Path,
    chunk: Chunk,
    cohort: Sequence[TrainedUser],
    retreat: Retreat | None = None,
    trail: Path | None = None,
) -> list[Result]:
    """Judges a cohort, measures it at the alpha that the gate allows, and writes the adapters that may leave.

    Where users begin as the provider's adapter, those who have strayed too far from it go back first (`retreat`).
    Every verdict, and what became of everybody, goes into the audit trail of `run`, or of another run that is to have
    these users (`trail`).

    Where that raises, each user is judged alone, and one who raises again has failed; where all do, it is not theirs.
    """
    try:
        return _released(ready, run, chunk, cohort, retreat, trail or run)
    except (InputError, OSError):
        raise
    except Exception:
        results = []
        for user in cohort:
            try:
                results += _released(ready, run, chunk, [user], retreat, trail or run)
            except Exception as fault:
                reason = f"could not be judged ({type(fault).__name__}: {fault})"
                failed = user._replace(adapter=None, status="failed", reason=reason)
                results += _released(ready, run, chunk, [failed], retreat, trail or run)
        if len(cohort) > 1 and all(result.status == "failed" for result in results):
            raise
        return results


def _released(
    ready: Prepared, run: Path, chunk: Chunk, cohort: Sequence[TrainedUser], retreat: Retreat | None, trail: Path
) -> list[Result]:
    rows = {user.user_id: user for user in chunk.rows}
    config, examination, adapted = ready.config, ready.examination, ready.adapted
    sound = {user.user_id: user.adapter for user in cohort if user.adapter is not None}
    verdicts, measures, back = {}, dict[str, Measures](), dict[str, float]()
    if sound:
        flat = torch.stack(list(sound.values())).to(adapted.base.device)
        if retreat is not None:
            flat, shares = retreat(flat)
            back = dict(zip(sound, shares, strict=True))
            sound = dict(zip(sound, flat, strict=True))
        verdicts = dict(zip(sound, examination.verdicts(flat), strict=True))
        alphas = [verdict.alpha for verdict in verdicts.values()]
        found = examination.measures(flat, [rows[user_id] for user_id in sound], alphas)
        measures = dict(zip(verdicts, found, strict=True))
    base = BaseInfo.of(adapted.base.name, adapted.base.weights_hash, config.base.quantization)
    papers = Provenance.of(base, ready.policy, examination.demands, on_paper(config))
    head = audit.append_all(trail, [judged(user_id, verdict) for user_id, verdict in verdicts.items()])
    stamp = Stamp(head, last_day(config.gate.valid_days))
    nested = ready.pairs.users > _FEW
    exporter = Exporter(run, adapted, config.lora, papers, nested, stamp, ready.sign)

    def written(user: TrainedUser) -> Result:
        verdict, found = verdicts.get(user.user_id), measures.get(user.user_id)
        data = chunk.data_of(rows[user.user_id])
        place = None
        if verdict is not None and verdict.admitted:
            place = exporter.write(user.user_id, sound[user.user_id], verdict, found, data)
        pool, against = examination.demands.in_pool, chunk.against_policy(user.user_id)
        result = outcome(user, data.pairs, verdict, found, place, pool, against)
        return replace(result, retreat=back.get(user.user_id, 0.0))

    with ThreadPoolExecutor(_WRITERS) as writers:  # a disk that is asked to keep many folders keeps them together
        results = list(writers.map(written, cohort))
    audit.append_all(trail, map(ended, results))
    return results


def on_paper(config: Config) -> dict[str, Any]:
    """The settings that a manifest repeats; of files and local models the names, for the way to them is nobody's
    business."""
    settings = config.model_dump(mode="json", include=_ON_PAPER)
    del settings["release"]["signing_key"]
    settings["aligned_by"] = config.base.aligned_by
    for section, classifier in (("gate", config.gate.classifier), ("screening", config.screening.classifier)):
        if classifier is not None:
            settings[section]["classifier"] = BaseInfo.of(classifier.model, "").name
    for key in ("rules", "reviews"):
        if (file := settings["screening"][key]) is not None:
            settings["screening"][key] = Path(file).name
    return settings
