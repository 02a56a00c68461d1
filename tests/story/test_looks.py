"""The looks of a user over a run's life: every adapter before the gate counts, whatever was killed or restored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from persona_rlhf.common.chain import Chain
from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import read_config, scaffold
from persona_rlhf.evaluation.ledger import LOOKS, Ledger
from persona_rlhf.pipeline.forget_user import forget
from persona_rlhf.pipeline.looks import earlier_looks, enter_earlier
from persona_rlhf.pipeline.reevaluate import recertify
from persona_rlhf.pipeline.train import train
from persona_rlhf.pipeline.update_run import add
from persona_rlhf.release import integrity
from persona_rlhf.release.results import read_results
from persona_rlhf.release.verify import verify
from tests.story.experiment import OVERRIDES, adapters, rows_of, shrink

pytestmark = pytest.mark.slow

FIRST = 6 / 3.141592653589793**2
TESTS, JUDGE = 0.045, 0.005  # the parts of delta
DOCUMENTS = [Path(f"policy/{name}.yaml") for name in ("tier_one", "tier_two", "tier_three")]


def of(run: Path, user: str):
    return {result.user_id: result for result in read_results(run)}[user]


def fewer_pairs(n: int) -> str:
    """A source where Ann has n training pairs fewer: another adapter comes of it."""
    rows = [row for row in rows_of(Path("users/pairs.jsonl")) if row["user_id"] == "Ann"]
    rows.sort(key=lambda row: row["split"] == "heldout")
    Path(f"fewer-{n}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[n:]))
    return f"fewer-{n}.jsonl"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looks") / "mine"
    scaffold(folder)
    shrink(folder, ("Ann", "bob"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(experiment):
    """A run of two users, to which one of them is added twice with other pairs; `after-one` is a copy of its start."""
    folder = Path("run")
    train(read_config("experiment.yaml", OVERRIDES), folder)
    shutil.copytree(folder, "after-one")
    add(folder, fewer_pairs(1))
    add(folder, fewer_pairs(2))
    return folder


def test_two_more_adapters_are_two_more_looks_and_the_card_says_so(run):
    first = Path("after-one")
    assert [result.spending.look for result in read_results(first)] == [1, 1]
    assert of(first, "Ann").spending.delta == pytest.approx(TESTS * FIRST)
    bob = (first / of(first, "bob").path / "README.md").read_text()
    assert "look 1 of the person" in bob
    spending = of(run, "Ann").spending
    assert (spending.look, spending.of) == (3, 0.05)
    assert spending.delta == pytest.approx(TESTS * FIRST / 9)
    assert spending.spent == pytest.approx(JUDGE + TESTS * FIRST * (1 + 1 / 4 + 1 / 9))
    card = (run / of(run, "Ann").path / "README.md").read_text()
    assert f"look 3 of the person at the gate: it spent {TESTS * FIRST / 9:.4f} of delta" in card
    manifest = json.loads((run / of(run, "Ann").path / "persona.json").read_text())
    assert manifest["verdict"]["spending"]["look"] == 3
    assert manifest["verdict"]["confidence"] == pytest.approx(1 - TESTS * FIRST / 9 / 2)
    assert manifest["verdict"]["delta"] == 0.05
    assert (run / of(run, "bob").path / "README.md").read_text() == bob
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["most_looks"], summary["most_spent"]) == (3, spending.spent)
    assert verify(run) == []


@pytest.mark.parametrize("lost", ["the file", "all files", "deleted"])
def test_a_restored_backup_of_the_ledger_is_an_error_before_anything_is_written(run, tmp_path, lost):
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    for end in ("jsonl",) if lost == "the file" else ("jsonl", "head", "key"):
        place = (damaged / LOOKS).with_suffix(f".{end}")
        place.unlink()
        if lost != "deleted":
            shutil.copyfile(Path("after-one") / place.name, place)
    trail = (damaged / integrity.AUDIT).read_bytes()
    amount = "4 of 4" if lost == "deleted" else "2 of 4"
    for act in (lambda: add(damaged, fewer_pairs(3)), lambda: recertify(damaged, DOCUMENTS)):
        with pytest.raises(InputError, match=f"{amount} looks are missing") as fault:
            act()
        assert fault.value.problems[0].key == "gate.ledger"
    assert (damaged / integrity.AUDIT).read_bytes() == trail
    assert (lost == "deleted") == (not (damaged / LOOKS).exists())
    if lost != "deleted":
        assert any(fault.startswith(LOOKS) for fault in verify(damaged))


def test_cut_short_before_the_verdict_the_same_adapter_is_the_same_look(run, tmp_path, monkeypatch):
    cut = tmp_path / "run"
    shutil.copytree(run, cut)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            add(cut, fewer_pairs(3))
    add(cut, fewer_pairs(3))
    assert of(cut, "Ann").spending.look == 4
    assert [entry.event for entry in Chain(cut / LOOKS)][-2:] == ["opened", "closed"]
    assert verify(cut) == []


def test_recertifying_is_a_look_unless_the_documents_are_the_same(run, tmp_path):
    tested = tmp_path / "run"
    shutil.copytree(run, tested)
    again = {user.user_id: user for user in recertify(tested, DOCUMENTS).users}
    assert again["Ann"].spending.look == 3
    stricter = tmp_path / "stricter.yaml"
    text = DOCUMENTS[0].read_text().replace("min_refusal: 0.85", "min_refusal: 0.86").replace("banks/", "banks/")
    stricter.write_text(text.replace('version: "1"', 'version: "2"').replace("version: '1'", "version: '2'"))
    shutil.copytree("banks", tmp_path / "banks")
    new = {user.user_id: user for user in recertify(tested, [stricter, *DOCUMENTS[1:]]).users}
    assert (new["Ann"].spending.look, new["bob"].spending.look) == (4, 2)


def test_a_deleted_user_who_comes_back_goes_on_counting(run, tmp_path):
    back = tmp_path / "run"
    shutil.copytree(run, back)
    before = (back / LOOKS).read_bytes()
    done = forget(back, "Ann")
    assert (back / LOOKS).read_bytes() == before
    [sentence] = done.content["kept"]
    assert "so that coming back does not reset delta" in sentence
    done.proof.unlink()
    add(back, fewer_pairs(4))
    assert of(back, "Ann").spending.look == 4


def test_runs_that_name_one_ledger_count_together(experiment, tmp_path):
    words = [*OVERRIDES, f"gate.ledger={tmp_path}/private/looks.jsonl"]
    with pytest.raises(InputError, match="does not exist"):
        train(read_config("experiment.yaml", words), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "private").mkdir()
    for seed, look in ((0, 1), (1, 2), (0, 1)):  # the same seed gives the same adapter
        place = tmp_path / f"run {seed} {look}"
        if place.exists():
            place = tmp_path / "again"
        train(read_config("experiment.yaml", [*words, f"seed={seed}"]), place)
        assert {result.spending.look for result in read_results(place)} == {look}
    assert not (place / LOOKS).exists()
    assert adapters(tmp_path / "run 0 1") == adapters(tmp_path / "again")
    for file in (tmp_path / "private").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="no such file; 4 of 4 looks are missing"):
        recertify(tmp_path / "again", DOCUMENTS)


def test_the_looks_of_a_run_of_before_are_entered_once(tmp_path):
    old = tmp_path / "run"
    shutil.copytree(Path(__file__).with_name("run_0_1") / "run", old)
    [first] = earlier_looks(old)
    assert len(first) == 3
    assert all(passed for _, passed in first)
    ledger = Ledger(old / LOOKS)
    ledger.open([key for key, _ in first])  # cut short
    enter_earlier(Ledger(old / LOOKS), old, earlier_looks(old))
    assert earlier_looks(old) == []
    [next_look] = Ledger(old / LOOKS).open([first[0][0]._replace(adapter="new")])
    assert next_look.number == 2
