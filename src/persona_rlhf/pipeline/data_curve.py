"""`evaluate RUN --data-curve`: held-out accuracy by number of pairs, from users' labels alone; the need in `plan`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from persona_rlhf.common.files import slug
from persona_rlhf.common.run_lock import locks_run
from persona_rlhf.config.experiment import read_run_config
from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.data.store import PairStore
from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.data_curve import CurvePoint, DataNeed, UserCurve, data_need
from persona_rlhf.evaluation.prior_gain import interval_of
from persona_rlhf.pipeline.monitoring import OnProgress, UserCounter, silent
from persona_rlhf.pipeline.run_dir import PAIRS, RunDir
from persona_rlhf.release.data_curve_file import DataCurve, write_data_curve
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.training.reward_basis import RewardBasis, load_basis
from persona_rlhf.training.subset_accuracy import SUBSETS, LabelledUser, TextReward, subset_accuracies

MOST_USERS = 200
"""Users of a run whose curves are computed, drawn by the seed."""
_PLANNED, _PLANNED_SUBSETS = 3, 1  # users of a plan and subsets: a plan takes less than a tenth of a run


@locks_run("evaluate --data-curve")
def data_curve(run: Path, on_progress: OnProgress = silent) -> tuple[DataCurve, Path]:
    """Computes the curves of a run's users and writes RUN/data_curve.json and the report; no base is loaded.

    Pairs that the screen took out are left out. Raises InputError where the run is not finished, its pairs changed
    since, or its basis cannot be read.
    """
    config, run_dir = read_run_config(run), RunDir(run)
    run_dir.need_finished("its curves are computed")
    basis = None if config.basis is None else load_basis(config.basis.file)
    store = PairStore(config.users.path, config.users.heldout, run_dir.selection)
    run_dir.check_same({PAIRS: store.fingerprint})
    numbers = [number for number, user in enumerate(store.user_digests) if user is not None]
    numbers = sorted(Random(config.seed).sample(numbers, min(MOST_USERS, len(numbers))))
    users = list(_labelled(store, numbers, _screened_out(run)))
    results = {result.user_id: result for result in RunResults(run)}
    reward, counter = TextReward.of(basis, users), UserCounter("fitting", len(users), on_progress)
    curves = list[UserCurve]()
    for done, user in enumerate(users, 1):
        curves += _curves(reward, user, results.get(user.user_id))
        counter(done)
    curve = DataCurve("features" if basis is None else "basis", curves)
    file = write_data_curve(run, curve)
    write_report(run)
    return curve, file


def planned_need(rows: Sequence[UserRows], basis: RewardBasis | None) -> DataNeed | None:
    """The pairs that users of a plan need, by the first users with both kinds of pairs."""
    users = [
        LabelledUser(user.user_id, [row.pair for row in user.train], [row.pair for row in user.heldout])
        for user in rows
        if user.train and user.heldout
    ][:_PLANNED]
    if not users:
        return None
    reward = TextReward.of(basis, users)
    return data_need([curve for user in users for curve in _curves(reward, user, None, _PLANNED_SUBSETS)])


def _screened_out(run: Path) -> set[tuple[str, str, int]]:
    """User, file and line of the pairs that no adapter was trained on."""
    with (run / "screening.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    out = ("dropped", "quarantined")
    return {(row["user_id"], row["file"], row["line"]) for row in rows if row["action"] in out}


def _labelled(store: PairStore, numbers: Iterable[int], out: set[tuple[str, str, int]]) -> Iterable[LabelledUser]:
    for number in numbers:
        pairs = [
            pair for pair in store.of(range(number, number + 1)) if (pair.user_id, pair.file, pair.line) not in out
        ]
        if pairs:
            yield LabelledUser(pairs[0].user_id, _part(pairs, "train"), _part(pairs, "heldout"))


def _part(pairs: Sequence[PreferencePair], split: str) -> list[PreferencePair]:
    return [pair for pair in pairs if pair.split == split]


def _curves(reward: TextReward, user: LabelledUser, result: Result | None, subsets: int = SUBSETS) -> list[UserCurve]:
    """The user's curve; none for a user without training pairs or held-out pairs."""
    accuracies = subset_accuracies(reward, user, subsets)
    if not accuracies:
        return []
    points = []
    for size, of_prompts in accuracies.items():
        low, high = interval_of([value - 0.5 for value in of_prompts], "base")
        n = len(of_prompts)
        points.append(CurvePoint(size, sum(of_prompts) / n, 0.5 + low, 0.5 + high, n))
    adapter, measured = None, None if result is None else result.measures.heldout_accuracy
    if result is not None and measured is not None and result.status == "released":
        adapter = CurvePoint(result.pairs.train, measured.adapted, measured.low, measured.high, measured.n)
    return [UserCurve(user.user_id, slug(user.user_id), len(user.train), points, adapter)]
