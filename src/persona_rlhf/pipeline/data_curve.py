"""`evaluate RUN --data-curve`: held-out accuracy by number of pairs, from users' labels alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.run_lock import locks_run
from persona_rlhf.config.experiment import read_run_config
from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.data.store import PairStore
from persona_rlhf.evaluation.data_curve import UserCurve
from persona_rlhf.pipeline.data_need import curves_of
from persona_rlhf.pipeline.monitoring import OnProgress, UserCounter, silent
from persona_rlhf.pipeline.run_dir import PAIRS, RunDir
from persona_rlhf.release.data_curve_file import DataCurve, write_data_curve
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import RunResults
from persona_rlhf.training.reward_basis import load_basis
from persona_rlhf.training.subset_accuracy import LabelledUser, TextReward

MOST_USERS = 200
"""Users of a run whose curves are computed, drawn by the seed."""


@locks_run("evaluate --data-curve")
def data_curve(run: Path, on_progress: OnProgress = silent) -> tuple[DataCurve, Path]:
    """Computes the curves of a run's users and writes RUN/data_curve.json and the report; no base is loaded.

    Pairs that the screen took out are left out, and ties. Raises InputError where the run is not finished, its pairs
    changed since, its basis cannot be read, or no user has a pair on both sides.
    """
    config, run_dir = read_run_config(run), RunDir(run)
    run_dir.need_finished("its curves are computed")
    basis = None if config.basis is None else load_basis(config.basis.file)
    store = PairStore(config.users.path, config.users.heldout, run_dir.selection)
    run_dir.check_same({PAIRS: store.fingerprint})
    numbers = [number for number, user in enumerate(store.user_digests) if user is not None]
    numbers = sorted(Random(config.seed).sample(numbers, min(MOST_USERS, len(numbers))))
    users = labelled_users(store, numbers, _screened_out(run))
    if not users:
        sentence = "no user has both a preference to train on and a held-out one, so there is no curve"
        raise InputError([Problem(str(run), None, "--data-curve", sentence)])
    results = {result.user_id: result for result in RunResults(run)}
    reward, counter = TextReward.of(basis, users), UserCounter("fitting", len(users), on_progress)
    curves = list[UserCurve]()
    for done, user in enumerate(users, 1):
        curves += curves_of(reward, user, results.get(user.user_id))
        counter(done)
    curve = DataCurve("features" if basis is None else "basis", curves)
    file = write_data_curve(run, curve)
    write_report(run)
    return curve, file


def _screened_out(run: Path) -> set[tuple[str, str, int]]:
    """User, file and line of the pairs that no adapter was trained on."""
    with (run / "screening.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    out = ("dropped", "quarantined")
    return {(row["user_id"], row["file"], row["line"]) for row in rows if row["action"] in out}


def labelled_users(store: PairStore, numbers: Iterable[int], out: set[tuple[str, str, int]]) -> list[LabelledUser]:
    """The users of these numbers who have preferences on both sides, without the pairs in `out` and without ties."""
    users = []
    for number in numbers:
        pairs = [
            pair for pair in store.of(range(number, number + 1)) if (pair.user_id, pair.file, pair.line) not in out
        ]
        train, heldout = _part(pairs, "train"), _part(pairs, "heldout")
        if train and heldout:
            users.append(LabelledUser(train[0].user_id, train, heldout))
    return users


def _part(pairs: Sequence[PreferencePair], split: str) -> list[PreferencePair]:
    return [pair for pair in pairs if pair.split == split and not pair.tie]
