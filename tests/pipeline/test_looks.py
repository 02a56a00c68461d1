"""A look that was closed is not decided again: no repeated judgement releases more than the first verdict allowed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.config.evaluation import ClassifierSettings, GateSettings, StillBaseSettings
from persona_rlhf.config.experiment import read_config, scaffold
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.gate import Demands, SideEffects, certify, release_unjudged
from persona_rlhf.evaluation.ledger import Ledger, LookKey
from persona_rlhf.evaluation.sequential import certify_sequentially
from persona_rlhf.pipeline import looks as module
from persona_rlhf.pipeline.looks import GateLooks, Recorded, gate_looks
from persona_rlhf.policy.clusters import Unit
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.private_banks import Draw, PrivatePool, unit_name

DEMANDS = Demands(pooled=0.9, categories={"c": 0.9}, in_pool=frozenset("c"), delta=0.05)
BASE = {"c": [True] * 400}
ALPHAS = [0.25, 0.5, 1.0]
ADAPTER = torch.ones(1, 3)


@dataclass
class Scripted(Evaluator):
    """An evaluator of adapters that refuse every probe at the alphas of `refusing`, and none at others."""

    refusing: set[float] = field(default_factory=set)
    gate: GateSettings = field(default_factory=lambda: GateSettings(alphas=ALPHAS))
    demands: Demands = DEMANDS
    before: Any = None
    base = SimpleNamespace(weights_hash="0" * 64)
    conditions = ("float32",)
    composition = SimpleNamespace(record=lambda user_id: {})

    def verdicts(self, flat, demands, draws, rows=(), recorded=(), users=()):
        if self.before is not None:
            self.before()

        def refused(alpha):
            return {"c": [alpha in self.refusing] * 400}

        if not self.gate.enabled:
            return [release_unjudged(demands[0], BASE, 1.0, refused(1.0))]
        return [certify(demands[0], BASE, ALPHAS, refused)]

    def base_counts(self, demands):
        return demands.count(BASE, BASE)


@pytest.fixture
def judged(tmp_path):
    """Judges the same adapter by a scripted evaluator; each time in a new program."""

    def judge(*refusing, **settings):
        evaluator = Scripted(set(refusing), **settings)
        looks = GateLooks(evaluator, Ledger(tmp_path / "looks.jsonl"), tmp_path, "bank", "exam", [])
        [look] = looks.judge(["ada"], ADAPTER)
        assert look.spending.look == 1
        return look.verdict

    return judge


def test_a_recorded_failure_is_never_released(judged):
    assert judged().alpha == 0
    for refusing in (ALPHAS, [0.25], []):
        again = judged(*refusing)
        assert (again.alpha, again.admitted, again.certified) == (0, False, False)
        assert again.pooled.refused == again.pooled.base_refused == 400
    assert "earlier verdict at this look of the adapter decides, and it held it back" in judged(*ALPHAS).reason


def test_a_recorded_pass_is_released_at_most_at_its_alpha(judged):
    first = judged(0.25)
    assert (first.alpha, first.admitted) == (0.25, True)
    assert judged(0.25) == first
    climbed = judged(0.25, 0.5)
    assert (climbed.alpha, climbed.certified, climbed.pooled.refused) == (0.25, True, 400)
    assert "an earlier verdict at this look of the adapter allows no more" in climbed.reason
    at_once = judged(*ALPHAS)  # alpha 0.25 is not tested then
    assert (at_once.alpha, at_once.certified) == (0, False)
    assert "allowed alpha 0.25 only, which was not tested now" in at_once.reason


def test_a_repeated_judgement_may_allow_less(judged):
    assert judged(*ALPHAS).alpha == 1
    assert judged(0.25).alpha == 0.25
    assert judged().alpha == 0
    assert judged(*ALPHAS).reason == "passed at the first look"


def test_cut_short_before_the_verdict_nothing_is_decided(judged):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(before=killed)
    assert judged(*ALPHAS).alpha == 1


def test_of_two_programs_at_one_look_the_first_to_end_decides(judged):
    assert judged(*ALPHAS, before=judged).alpha == 0


def test_with_the_gate_off_nothing_is_held_back(judged):
    off = GateSettings(alphas=ALPHAS, enabled=False)
    assert [judged(gate=off).alpha, judged(gate=off).alpha] == [1, 1]


def heldout_of(*tokens):
    """A user with a held-out pair of each of these tokens."""
    pairs = [PairRow(None, Row((1,), (token,)), Row((1,), (0,))) for token in tokens]
    return UserRows("ada", [], pairs)


def test_other_held_out_pairs_are_another_look(tmp_path):
    """They decide the verdict too. A recertification has only their digest, and is the look of the release."""

    def look(rows=(), recorded=(), gate=None):
        evaluator = Scripted(set(ALPHAS), gate=gate or GateSettings(alphas=ALPHAS))
        looks = GateLooks(evaluator, Ledger(tmp_path / "looks.jsonl"), tmp_path, "bank", "exam", [])
        [judged] = looks.judge(["ada"], ADAPTER, rows, recorded)
        return judged.spending

    first, other = look([heldout_of(2, 3)]), look([heldout_of(2)])
    assert (first.look, look([heldout_of(3, 2)]).look, other.look) == (1, 1, 2)
    assert None is not first.heldout != other.heldout is not None
    for spending in (first, other):
        assert look(recorded=[Recorded({}, spending.heldout)]) == spending
    none = look([heldout_of()])
    assert (none.look, none.heldout) == (3, None)
    untested = GateSettings(alphas=ALPHAS, still_base=StillBaseSettings(pairs_level=None))
    assert look([heldout_of(2)], gate=untested) == none


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam") / "mine"
    scaffold(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield read_config("experiment.yaml")


def exam_of(config):
    return module._exam(config, Policy.of(config.policy), Scripted(gate=config.gate))


def changed(config, section, **values):
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_all_that_decides_is_part_of_the_exam(config, monkeypatch, tmp_path):
    first = exam_of(config)
    assert exam_of(changed(config, "gate", ledger=tmp_path / "looks.jsonl", valid_days=3)) == first
    assert exam_of(changed(config, "lora", alpha=config.lora.alpha + 1)) != first
    assert exam_of(changed(config, "gate", judge="rules")) != first
    with monkeypatch.context() as patch:
        patch.setattr(module, "__version__", "another")
        assert exam_of(config) != first
    folder = tmp_path / "judge"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    settings = ClassifierSettings(model=str(folder))
    by_model = exam_of(changed(config, "gate", judge_model=settings))
    moved = folder.rename(tmp_path / "elsewhere")
    settings = changed(config, "gate", judge_model=settings.model_copy(update={"model": str(moved)}))
    assert exam_of(settings) == by_model
    for file in sorted(moved.iterdir()):
        file.write_text("{ }")
        assert exam_of(settings) not in (first, by_model)
        file.write_text("{}")


def test_a_family_is_all_users_of_the_run_with_the_forgotten_ones(config, tmp_path):
    shared = changed(config, "gate", family="all", alphas=ALPHAS, ledger=tmp_path / "looks.jsonl")
    policy, ada, ben = Policy.of(config.policy), pseudonym("ada"), pseudonym("ben")

    def looks_of(run, users, config=shared):
        (tmp_path / run).mkdir(exist_ok=True)
        return gate_looks(config, policy, Scripted(set(ALPHAS), gate=config.gate), tmp_path / run, users)

    looks_of("one", [ada, ben]).judge(["ada"], ADAPTER)
    for other in ([ada], [ben]):
        with pytest.raises(InputError, match="1 of the 1 users in this ledger"):
            looks_of("other", other)
    looks_of("other", [ben], changed(shared, "gate", family="each"))
    (tmp_path / "one/forgotten").mkdir()
    (tmp_path / f"one/forgotten/{ada}.json").touch()
    looks_of("one", [ben]).judge(["ben"], ADAPTER)


def test_a_ledger_with_the_name_of_its_key_is_refused(config, tmp_path):
    for name in ("looks.key", "looks.head"):
        with pytest.raises(InputError, match="keeps its key and its head in files of such names"):
            module.ledger_of(changed(config, "gate", ledger=tmp_path / name), tmp_path)


def test_a_ledger_deleted_with_its_head_shows_against_the_runs_beside_that_named_it(config, tmp_path):
    folder = tmp_path / "private"
    folder.mkdir()
    named = changed(config, "gate", ledger=folder / "looks.jsonl")

    def look(run, config=named):
        place = tmp_path / run
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.yaml").write_text(config.to_yaml())
        [judged] = GateLooks(Scripted(), module.ledger_of(config, place), place, "bank", "exam", []).judge(
            ["ada"], ADAPTER
        )
        return judged.spending.look

    assert look("runs/first") == 1
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"first/audit\.jsonl keeps its head .* no such file; 1 of 1 looks are"):
        look("runs/second")
    assert not list(folder.iterdir())
    assert look("runs/third", changed(config, "gate", ledger=folder / "other.jsonl")) == 1
    assert look("elsewhere/fourth") == 1  # nobody beside it used the ledger


def test_a_ledger_restored_with_its_head_shows_against_the_runs_beside_a_new_one(config, tmp_path):
    folder, backup = tmp_path / "private", tmp_path / "backup"
    folder.mkdir()
    named = changed(config, "gate", ledger=folder / "looks.jsonl")

    def look(run, adapter):
        place = tmp_path / "runs" / run
        place.mkdir(parents=True, exist_ok=True)
        looks = GateLooks(Scripted(), module.ledger_of(named, place), place, "bank", "exam", [])
        [judged] = looks.judge(["ada"], ADAPTER * adapter)
        return judged.spending.look

    assert look("first", 1) == 1
    shutil.copytree(folder, backup)
    assert look("second", 2) == 2
    shutil.rmtree(folder)
    shutil.copytree(backup, folder)
    for run in ("second", "third"):
        with pytest.raises(InputError, match=r"second/audit\.jsonl keeps its head .* 1 of 2 looks are missing"):
            look(run, 3)
    assert look("../elsewhere/fourth", 3) == 2  # nobody beside it knows more
    other = tmp_path / "other"
    other.mkdir()
    named = changed(config, "gate", ledger=other / "looks.jsonl")
    assert look("third", 3) == 1  # heads of another ledger are no concern of this one


@dataclass
class Drawing(Scripted):
    """An evaluator whose looks draw from a pool of 400 units; it keeps the draws of each look."""

    gate: GateSettings = field(default_factory=lambda: GateSettings(alphas=ALPHAS, sequential=True))
    demands: Demands = field(default_factory=lambda: replace(DEMANDS, sequential=True))
    drawn: list[Any] = field(default_factory=list)
    pool: dict[str, Unit] = field(default_factory=lambda: {f"unit {n}": Unit("c", [n]) for n in range(400)})  # type: ignore[assignment]

    def verdicts(self, flat, demands, draws, rows=(), recorded=(), users=()):
        asked: list[int] = []

        def refused(alpha, units):
            asked.extend(unit.places[0] for unit in units if unit.places[0] not in asked)
            return [alpha in self.refusing] * len(units)

        units = [self.pool[name] for name in draws[0]]
        verdict = certify_sequentially(demands[0], BASE, ALPHAS, units, refused, lambda _: SideEffects([], None))
        self.drawn.append(asked)
        return [verdict]


def test_looks_draw_on_until_the_pool_is_used_up(tmp_path):
    evaluator = Drawing({1.0})

    def look(adapter, user="ada"):
        looks = GateLooks(
            evaluator, Ledger(tmp_path / "looks.jsonl"), tmp_path, "bank", "exam", [], pool=list(evaluator.pool)
        )
        [judged] = looks.judge([user], ADAPTER * adapter)
        return judged.verdict, judged.spending

    spent = []
    for n in range(1, 8):
        verdict, spending = look(n)
        spent.append(spending.spent)
        if verdict.looks:
            assert verdict.alpha == 1
        assert spending.pool == 400
        assert spending.drawn == sum(map(len, evaluator.drawn))
    asked = [place for look in evaluator.drawn for place in look]
    assert len(set(asked)) == len(asked) <= 400
    assert "the private pool is used up for this user" in verdict.reason
    assert (verdict.alpha, verdict.admitted) == (0, False)
    assert spent == pytest.approx([spent[0]] * 7)  # passes, and looks that drew nothing, hand their share on
    assert look(1)[0].alpha == 1
    assert evaluator.drawn[-1] == evaluator.drawn[0]
    assert look(1, "ben")[1].drawn == len(evaluator.drawn[0])
    assert evaluator.drawn[-1] != evaluator.drawn[0]


def test_only_units_that_no_draw_certified_on_are_drawn(tmp_path):
    probes = tuple(Probe(f"{n}", "c", f"p{n}", f"t{n}", f"p{n}", None, "certify", "topic") for n in range(400))
    draws = [Draw(n, "", {"c": (f"{n}",)}, f"hash {n}") for n in (1, 2)]
    bank = PrivatePool(tmp_path, probes, tuple(draws))
    evaluator = Drawing()
    evaluator.pool = {unit_name(probe): Unit("c", [n]) for n, probe in enumerate(probes)}
    evaluator.first_look = evaluator.demands.at_look(0.6)
    ledger = Ledger(tmp_path / "looks.jsonl")
    ledger.open([LookKey("ada", "adapter", "hash 2", "exam")])
    pool = module._pool(bank, evaluator, ledger)
    assert set(evaluator.pool) - set(pool) == {unit_name(probes[2])}
    evaluator.pool = dict(list(evaluator.pool.items())[:40])
    with pytest.raises(InputError, match="39 fresh units of `pooled` are in the pool"):
        module._pool(bank, evaluator, ledger)
