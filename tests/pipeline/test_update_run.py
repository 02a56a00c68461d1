"""The end of `add`, and of `rebase --replace`: whatever cuts them short, the next start finishes them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from persona_rlhf.cli.console import open_run
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.config.training import BaseSettings
from persona_rlhf.models.base import weights_hash
from persona_rlhf.pipeline import update_run
from persona_rlhf.pipeline.run_dir import PAIRS, RunDir, before, check_replacement, finish_replacement, replace_run
from persona_rlhf.pipeline.update_run import Added, add, complete_addition, mark_trained, rebase
from persona_rlhf.release import integrity
from persona_rlhf.release.earlier_adapters import BASE, other_adapter, restore, result_of, set_aside
from persona_rlhf.release.integrity import write_run_manifest
from persona_rlhf.release.results import read_results, write_results
from persona_rlhf.release.verify import verify
from tests.pipeline.cut_short import DONE, KILLED, cut_short
from tests.release import conftest as small
from tests.story.experiment import listing

base, run = small.base, small.run
NEW, CHANGED = "Ada", "ada"


def index(users):
    return [(pseudonym(user), user.encode().hex()) for user in users]


@pytest.fixture
def joining(run, tmp_path) -> tuple[Path, Path]:
    """A run without NEW, where CHANGED was held back; both are trained in the run inside. And the run with both."""
    whole, path = run.path, tmp_path / "joined"
    users = [result.user_id for result in read_results(whole)]
    for place in (whole, path, path / "state/adding"):
        if place != whole:
            shutil.copytree(whole, place)
        (place / "state").mkdir(exist_ok=True)
        (place / "state/identity.json").write_text(json.dumps({PAIRS: "", "users per chunk": "9"}))
    inner = path / "state/adding"
    results = {result.user_id: result for result in read_results(whole)}
    for place, kept in ((path, [u for u in users if u != NEW]), (inner, [NEW, CHANGED])):
        lines = [results[user] for user in kept]
        if place == path:
            held = {"status": "held_back", "alpha": 0.0, "path": None, "manifest_sha256": None}
            lines = [replace(line, **held) if line.user_id == CHANGED else line for line in lines]
        write_results(place, lines)
        for user, result in results.items():
            if result.path is not None and (user not in kept or (place == path and user == CHANGED)):
                shutil.rmtree(place / result.path)
        RunDir(place).change_users(index(kept))
        (place / "screening.jsonl").write_text(
            "".join(f'{{"user_id": "{user}", "reason": "r", "action": "a"}}\n' for user in kept)
        )
        (place / "metrics.jsonl").write_text("".join(json.dumps({"user_id": user}) + "\n" for user in kept * 2))
        write_run_manifest(place)
    assert verify(path) == verify(inner) == []
    mark_trained(path, "more.jsonl")
    return path, whole


def adapters(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in (run / "adapters").rglob("*") if file.is_file()}


def check(path: Path, whole: Path, others: dict[str, bytes], at: object = None) -> None:
    """The run is whole, and what was there of others is there byte by byte."""
    assert verify(path) == [], at
    assert adapters(path) == adapters(whole), at
    lines = dict.fromkeys((whole / "results.jsonl").read_bytes().splitlines())
    own = (path / "results.jsonl").read_bytes().splitlines()
    assert set(own) == set(lines), at
    assert len(own) == len(lines), at
    users = [result.user_id for result in read_results(path)]
    assert users[-1] == NEW, at
    assert list(RunDir(path).selection.user_digests) == index(users), at
    assert RunDir(path).sources == ["more.jsonl"], at
    for name, each in (("metrics.jsonl", 2), ("screening.jsonl", 1)):
        told = [json.loads(line)["user_id"] for line in (path / name).read_text().splitlines()]
        assert sorted(told) == sorted(users * each), at
    assert [entry.event for entry in integrity.read(path)] == ["added"], at
    assert not list(path.rglob("*adding*")), at


def test_users_are_joined_and_nobody_elses_line_changes(joining):
    path, whole = joining
    lines = (path / "results.jsonl").read_bytes().splitlines()
    others = adapters(path)
    complete_addition(path)
    check(path, whole, others)
    now = (path / "results.jsonl").read_bytes().splitlines()
    assert [old for old, new in zip(lines, now, strict=False) if old != new] == [
        lines[1]
    ]  # the changed user's, in place


def test_a_changed_user_who_is_held_back_loses_his_adapter(joining):
    path, _ = joining
    complete_addition(path)
    inner = path / "state/adding"
    shutil.copytree(path, path.with_name("inner"))
    path.with_name("inner").rename(inner)
    held = {"status": "held_back", "alpha": 0.0, "path": None, "manifest_sha256": None}
    old = {result.user_id: result for result in read_results(path)}[NEW]
    assert old.path is not None
    shutil.rmtree(inner / old.path)
    write_results(inner, [replace(old, **held)])
    mark_trained(path, "other.jsonl")
    complete_addition(path)
    assert not (path / old.path).exists()
    assert verify(path) == []
    assert RunDir(path).sources == ["more.jsonl", "other.jsonl"]


def test_with_keep_earlier_a_user_who_is_held_back_keeps_the_adapter_and_the_way_back_stays(joining):
    path, _ = joining
    mark_trained(path, "more.jsonl", keep_earlier=True)
    complete_addition(path)
    old = result_of(path, NEW)
    assert {user: other_adapter(path, user).adapter for user in (NEW, CHANGED)} == {NEW: BASE, CHANGED: BASE}
    assert other_adapter(path, CHANGED).result.status == "held_back"
    inner = path / "state/adding"
    shutil.copytree(path, path.with_name("inner"))
    path.with_name("inner").rename(inner)
    held = {"status": "held_back", "alpha": 0.0, "path": None, "manifest_sha256": None}
    shutil.rmtree(inner / old.path)
    write_results(inner, [replace(result_of(inner, NEW), **held)])
    RunDir(inner).change_users([(pseudonym(NEW), "other pairs")])
    mark_trained(path, "other.jsonl", keep_earlier=True)
    complete_addition(path)
    assert result_of(path, NEW) == old
    assert (path / old.path).exists()
    assert verify(path) == []
    assert (pseudonym(NEW), "other pairs") in RunDir(path).selection.user_digests  # not trained again
    assert other_adapter(path, NEW).adapter == BASE
    assert restore(path, NEW, BASE).status == "skipped"
    assert verify(path) == []


def test_without_it_earlier_adapters_go_with_the_one_that_they_preceded(joining):
    path, _ = joining
    set_aside(path, {NEW: None, "../../etc": None})
    complete_addition(path)
    assert other_adapter(path, NEW) is None
    assert other_adapter(path, "../../etc") is not None


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_killed_before_any_change_it_is_finished_by_the_next_start(joining, tmp_path, keep):
    path, whole = joining
    mark_trained(path, "more.jsonl", keep)
    others = adapters(path)
    for at in count(1):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        met = cut_short(lambda copy=copy: complete_addition(copy), at)
        assert met in (DONE, KILLED)
        with open_run(copy, "verify", 0, shared=True):
            pass
        for left_over in copy.glob("state/.adding.*"):
            shutil.rmtree(left_over)  # the next `add` removes it
        check(copy, whole, others, at)
        if keep:
            assert [other_adapter(copy, user).adapter for user in (NEW, CHANGED)] == [BASE, BASE], at
        if met == DONE:
            assert at > 40
            break


def test_a_run_takes_the_place_of_another(tmp_path):
    for at in count(1):
        place = tmp_path / str(at)
        old, new = place / "run", place / "run.rebased"
        for folder in (old, new):
            (folder / "state").mkdir(parents=True)
            (folder / "name").write_text(folder.name)
        met = cut_short(lambda old=old, new=new: replace_run(old, new), at)
        finish_replacement(old)
        told = [(folder / "name").read_text() for folder in (old, before(old)) if folder.exists()]
        assert told == (["run"] if not before(old).exists() else ["run.rebased", "run"])  # before the mark, or whole
        assert not list(place.rglob("replaced.json"))
        if met == DONE:
            assert at >= 5
            break


def test_only_a_run_beside_it_takes_its_place_and_only_once(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="only a run beside"):
        check_replacement(tmp_path / "run", tmp_path / "elsewhere/run")
    (tmp_path / "run.before").mkdir()
    with pytest.raises(InputError, match="move it away first"):
        check_replacement(tmp_path / "run", tmp_path / "run.rebased")


def test_a_run_that_is_not_finished_or_shares_delta_takes_nobody(run):
    config = {
        "name": "n",
        "base": {"model": "data/base"},
        "policy": {"documents": ["configs/policy/tier_one.yaml"]},
        "users": {"path": "data/users"},
        "gate": {"family": "all"},
    }
    (run.path / "config.yaml").write_text(json.dumps(config))
    before = listing(run.path)
    with pytest.raises(InputError, match=r"gate\.family: this run shares delta"):
        add(run.path, "data/users")
    identity = {"base": weights_hash(BaseSettings(model="data/base")), "users per chunk": "1"}
    (run.path / "state/identity.json").write_text(json.dumps(identity))
    with pytest.raises(InputError, match="the weights of the base that the run has"):
        rebase(run.path, "data/base", run.path.with_name("new"))
    (run.path / "state/identity.json").unlink()
    assert listing(run.path) == before
    (run.path / "manifest.json").unlink()
    for start in (lambda: add(run.path, "x"), lambda: rebase(run.path, "x", run.path)):
        with pytest.raises(InputError, match="this run is not finished"):
            start()


def recertify_under(run: Path, *hashes: str) -> None:
    """Records recertifications under policies of these hashes."""
    facts = {"documents": [], "tested": 1, "passed": 0, "looks": 1}
    integrity.append_all(run, [(integrity.RECERTIFIED, facts | {"policy_hash": policy}) for policy in hashes])


def test_after_a_recertification_under_other_documents_no_adapter_is_trained_by_the_old_ones(run):
    RunDir(run.path).state.mkdir(exist_ok=True)
    (run.path / "state/identity.json").write_text(json.dumps({"policy": "old", "users per chunk": "1"}))
    recertify_under(run.path, "old", "new")
    before = listing(run.path)
    for start in (lambda: add(run.path, "x"), lambda: rebase(run.path, "x", run.path.with_name("new"))):
        with pytest.raises(InputError, match="last recertified under policy new, but trains under old"):
            start()
    assert listing(run.path) == before
    recertify_under(run.path, "old")
    RunDir(run.path).need_newest_documents("users are added")


def test_an_addition_that_a_recertification_overtook_is_not_joined(joining, monkeypatch):
    path, _ = joining
    identity = json.loads((path / "state/identity.json").read_text())
    (path / "state/identity.json").write_text(json.dumps(identity | {"policy": "old"}))
    others = adapters(path)

    def recertified_meanwhile(run: Path, *_: object) -> Added:
        recertify_under(run, "new")
        return Added(read_results(run / "state/adding"), 0, 0)

    monkeypatch.setattr(update_run, "_train_addition", recertified_meanwhile)
    with pytest.raises(InputError, match="last recertified under policy new"):
        add(path, "more.jsonl")
    assert adapters(path) == others
    assert not list(path.rglob("*adding*"))
