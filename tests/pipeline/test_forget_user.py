"""`forget`: canaries in all that is a user's, and none left; cut short anywhere, it is finished by the next start."""

from __future__ import annotations

import gzip
import json
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch

from persona_rlhf.cli.console import open_run
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym, slug
from persona_rlhf.data.choice_ledger import CHOICES, ChoiceLedger
from persona_rlhf.data.store import PairStore
from persona_rlhf.evaluation.records import Outcome, Refused
from persona_rlhf.pipeline import forget_user
from persona_rlhf.pipeline.forget_user import finish_forgetting, forget
from persona_rlhf.pipeline.run_dir import PAIRS, RunDir
from persona_rlhf.release import integrity
from persona_rlhf.release.deletion_records import forgotten, pending_file, proof_file
from persona_rlhf.release.integrity import write_run_manifest
from persona_rlhf.release.redteam_report import Attacked, MergedPair, RedTeamResult, content_of, write_redteam
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import read_results
from persona_rlhf.release.verify import verify
from persona_rlhf.training import checkpoint
from tests.data.test_choice_ledger import add, choice
from tests.pipeline.cut_short import DONE, FAILED, KILLED, UNMINDED, cut_short
from tests.release import conftest as small

base, run = small.base, small.run  # the small finished run, with the user below in it

ID = "kanarienvogel \U0001f426 id"
TEXTS = ("CANARYPROMPT", "CANARYCHOSEN", "CANARYREJECTED", "CANARYPAIRID", "CANARYSOURCE")
CANARIES = (ID, "kanarienvogel", *TEXTS)


def row(user, n, canary=False):
    prompt, chosen, rejected, own, source = TEXTS if canary else ("asked", "yes", "no", "p", "s")
    more = {"id": f"{own}{n}", "source": source}
    return {"user_id": user, "prompt": f"{prompt} {n}", "chosen": chosen, "rejected": rejected, **more}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(rows))


def write_choices(file):
    """Choices of the user, with canaries, and of another one; one choice is undone."""
    ledger = ChoiceLedger(file)
    for n in range(2):
        add(ledger, choice(n, ID, prompt=TEXTS[0], left=TEXTS[1], right=TEXTS[2]))
        add(ledger, choice(n))
    ledger.undo(f"{ID} 1", ID)
    ledger.close()


@pytest.fixture
def planted(monkeypatch, request, tmp_path) -> Path:
    """A finished run and, in its state, an unfinished part: all that either can hold of a user holds canaries."""
    monkeypatch.setitem(small.MISSES, ID, 0)
    made = request.getfixturevalue("run")
    path = made.path
    users = [result.user_id for result in read_results(path)]
    rows = [row(user, n, user == ID) for n in range(3) for user in users]
    data = path / "state/data"
    data.mkdir()
    (data / "pairs.jsonl").write_text(lines(rows), encoding="utf-8")
    outside = tmp_path / "outside.jsonl"
    outside.write_text(lines(rows), encoding="utf-8")
    tastes = [{"user_id": user, "describes": "d", "noise": 0.1, "weights": {"words": 1}} for user in users]
    (tmp_path / "tastes.yaml").write_text(json.dumps(tastes, ensure_ascii=False), encoding="utf-8")
    config = {"name": "tiny", "base": {"model": "x"}, "users": {"path": str(outside)}}
    config["evaluation"] = {"utilities": str(tmp_path / "tastes.yaml")}
    (path / "config.yaml").write_text(json.dumps(config))
    (path / "ledger.jsonl").write_text(lines(rows), encoding="utf-8")
    (path / "screening.jsonl").write_text(
        lines({**row(u, 0, u == ID), "action": "dropped", "reason": "r"} for u in users)
    )
    write_choices(path / CHOICES)
    (path / "state/wishes").mkdir()
    for user in (ID, "Ada"):
        (path / f"state/wishes/{slug(user)}.yaml").write_text(
            f"{{user_id: {user!a}, tone: CANARYPROMPT}}"[: 99 * (user == ID)]
        )
    steps = [{"user_id": user, "step": n} for n in range(3) for user in users]
    (path / "metrics.jsonl").write_text(lines(steps) + '{"user_id": "kanarienvogel')
    policy = json.loads((path / "policy.json").read_bytes())
    policy["preferences"] = [{"id": "r", "user_id": ID, "statement": "CANARYPROMPT", "document": "/canary.yaml"}]
    policy["not_in_force"] = [{"id": "q", "user_id": ID, "says": "CANARYCHOSEN", "document": "/canary.yaml"}]
    policy["documents"].append(
        {"path": "/canary.yaml", "tier": 3, "issuer": "kanarienvogel", "version": "1", "sha256": "f" * 64}
    )
    (path / "policy.json").write_text(json.dumps(policy))
    outcome = Outcome(4, 3, 4, {"c": Refused(4, 3, 4)}, None)
    found = [
        Attacked(one.user_id, one.slug, one.alpha, one.manifest_sha256, {"plain": outcome})
        for one in read_results(path)
        if one.path is not None
    ]
    pairs = [MergedPair((ID, "Ada"), outcome), MergedPair(("Ada", "ada"), outcome)]
    write_redteam(path, content_of(RedTeamResult(found, pairs, {}), {"seed": 0}))
    folder, chunk = RunDir(path), path / "state/chunks/000000"
    store = PairStore(outside, 0.25)
    (path / "state/identity.json").write_text(json.dumps({PAIRS: store.fingerprint, "users per chunk": "99"}))
    folder.change_users(store.user_digests)
    for name in ("results.jsonl", "screening.jsonl"):
        chunk.mkdir(parents=True, exist_ok=True)
        shutil.copy(path / name, chunk / name)
    (path / "state/metrics-1-of-2.jsonl").write_text(lines(steps))
    for user in (ID, "Ada"):
        checkpoint.save(chunk / f"trained/{slug(user)}.safetensors", {"adapter": torch.ones(3)}, {"user_id": user})
    notes = {"users": ["Ada", ID], "steps": [1, 2], "seconds": [0.5, 0.5], "waiting": [ID, "ada"]}
    checkpoint.save(chunk / "slots.safetensors", {"optimizer.params": torch.arange(1, 7.0).reshape(2, 3)}, notes)
    (chunk / "reference.safetensors").write_bytes(b"values")
    (path / f"adapters/.{slug(ID)}.old").mkdir()
    (path / f"adapters/.{slug(ID)}.old/README.md").write_text("CANARYCHOSEN")
    (path / "state/slots.safetensors").unlink()
    write_report(path)
    write_run_manifest(path)
    (path / "results.jsonl.half").write_text(ID)
    return path


def held(folder: Path) -> dict[str, set[str]]:
    """Which canaries stand in which file, or in its name: as they are, as JSON escapes them, in UTF-16, or packed."""
    forms = {c: {c.encode(), json.dumps(c)[1:-1].encode(), c.encode("utf-16-le")} for c in CANARIES}
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*"):
        raw = path.name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b"")
        if path.suffix == ".gz":
            raw += gzip.decompress(path.read_bytes())
        if path.suffix == ".parquet":
            from pyarrow import parquet

            raw += repr(parquet.read_table(path).to_pylist()).encode()
        if hits := {c for c, own in forms.items() if any(form in raw for form in own)}:
            found[path.relative_to(folder).as_posix()] = hits
    return found


def others(run: Path) -> dict[str, bytes]:
    """Every file of everybody else's adapter."""
    files = [path for path in run.rglob("adapters/**/*") if path.is_file() and slug(ID) not in path.as_posix()]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def test_nothing_of_a_user_is_left(planted):
    before, old = held(planted), others(planted)
    kept = [line for line in (planted / "results.jsonl").read_bytes().splitlines() if b"kanarienvogel" not in line]
    assert len(before) >= 15  # the scan sees them
    assert {hit for hits in before.values() for hit in hits} == set(CANARIES)
    done = forget(planted, ID)
    assert done is not None
    assert held(planted) == {}
    assert verify(planted) == []
    assert others(planted) == old
    assert (planted / "results.jsonl").read_bytes().splitlines() == kept
    assert json.loads((planted / "redteam.json").read_bytes())["attacks"]["merged"]["n"] == 4
    tensors, notes = checkpoint.load(planted / "state/chunks/000000/slots.safetensors", torch.device("cpu"))
    assert tensors["optimizer.params"].tolist() == [[1, 2, 3], [0, 0, 0]]
    assert notes == {"users": ["Ada", None], "steps": [1, 0], "seconds": [0.5, 0], "waiting": ["ada"]}
    assert (planted / f"state/chunks/000000/trained/{slug('Ada')}.safetensors").exists()
    assert not (planted / "state/chunks/000000/reference.safetensors").exists()
    proof = json.loads(proof_file(planted, pseudonym(ID)).read_bytes())
    assert proof == done.content | {key: proof[key] for key in ("format", "toolkit", "manifest_hash")}
    assert all(own["before"] == own["after"] for own in proof["others"].values())
    assert len(proof["others"]) == len({path.split("/")[1] for path in old})
    [entry] = integrity.read(planted)
    assert (entry.event, entry.facts) == ("forgotten", {"user": pseudonym(ID), "proof": proof["manifest_hash"]})
    assert {"path": "state/choices.db", "what": "choices", "count": 4} in done.content["removed"]
    ledger = ChoiceLedger(planted / CHOICES)
    assert ledger.choices() == [choice(0), choice(1)]
    ledger.close()
    assert any("outside.jsonl holds 3 rows" in sentence for sentence in done.remains)
    assert any("tastes.yaml" in sentence for sentence in done.remains)


def test_he_stays_out_until_his_proof_is_deleted(planted):
    forget(planted, ID)
    source, folder = planted.parent / "outside.jsonl", RunDir(planted)
    assert ID in source.read_text() or "kanarienvogel" in source.read_text()
    store = PairStore(source, 0.25, folder.selection)
    assert ID not in {pair.user_id for pair in store}
    folder.check_same({PAIRS: store.fingerprint})
    assert forget(planted, ID) is None
    proof_file(planted, pseudonym(ID)).unlink()
    assert forgotten(planted) == frozenset()
    again = PairStore(source, 0.25, folder.selection)
    assert again.users == store.users + 1
    with pytest.raises(InputError, match="preference pairs changed"):
        folder.check_same({PAIRS: again.fingerprint})


def test_a_source_is_cleaned_where_that_is_asked(planted):
    source = planted.parent / "outside.jsonl"
    kept = [line for line in source.read_bytes().splitlines() if b"kanarienvogel" not in line]
    done = forget(planted, ID, data=True)
    assert source.read_bytes().splitlines() == kept
    assert done is not None
    assert not any("outside.jsonl" in sentence for sentence in done.remains)
    assert {"path": "(outside the run)", "what": "rows of a source", "count": 3} in done.content["removed"]


def test_a_user_whom_nobody_knows_is_asked_about(planted):
    with pytest.raises(InputError, match="no user `Adda` in this run .did you mean `Ada`"):
        forget(planted, "Adda")
    assert not (planted / "forgotten").exists()


def test_a_proof_that_was_changed_shows_and_so_does_his_return(planted):
    line = next(one for one in (planted / "results.jsonl").read_bytes().splitlines(True) if b"kanarienvogel" in one)
    forget(planted, ID)
    file = proof_file(planted, pseudonym(ID))
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"count": 1', b'"count": 0', 1))
    assert any("was changed" in fault for fault in verify(planted))
    file.write_bytes(whole)
    with (planted / "results.jsonl").open("ab") as stream:
        stream.write(line)
    assert any("1 users who were deleted" in fault for fault in verify(planted))


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_cut_short_anywhere_it_is_finished_by_the_next_start(planted, tmp_path, full):
    """Killed before each change it makes to a disk; and with a full disk at every fourth of them."""
    old, cut = others(planted), 0
    for at in count(1, 4 if full else 1):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(planted, copy)
        met = cut_short(lambda copy=copy: forget(copy, ID), at, full)
        if met == DONE:
            break
        assert met in ((FAILED, UNMINDED) if full else (KILLED,)), at
        if pending_file(copy, pseudonym(ID)).exists():
            cut += 1
            assert any("not finished" in fault for fault in verify(copy)), at
            with open_run(copy, "verify", 0, shared=True):
                pass
        elif not proof_file(copy, pseudonym(ID)).exists():
            forget(copy, ID)  # nothing was promised yet, and nothing gone
        assert held(copy) == {}, at
        assert others(copy) == old, at
        assert verify(copy) == [], at
        assert len(list(integrity.read(copy))) == 1, at
        assert not pending_file(copy, pseudonym(ID)).exists()
    assert cut >= (5 if full else 20)


def test_curves_that_cannot_be_read_are_removed(planted):
    (planted / "data_curve.json").write_text('{"users": [' + json.dumps(ID))
    write_run_manifest(planted)
    assert forget(planted, ID) is not None
    assert not (planted / "data_curve.json").exists()
    assert not [fault for fault in verify(planted) if "data_curve" in fault]


def test_interrupted_twice_it_is_still_finished(planted):
    assert cut_short(lambda: forget(planted, ID), 12) == KILLED
    assert cut_short(lambda: finish_forgetting(planted), 9) == KILLED
    assert len(finish_forgetting(planted)) == 1
    assert held(planted) == {}
    assert verify(planted) == []
    assert finish_forgetting(planted) == []


def test_a_file_beside_the_results_is_hashed_again(planted):
    rows = [row(user, 0, user == ID) for user in ("Ada", ID)]
    for name, of in (("extra.csv", rows), ("other.csv", rows[:1])):
        (planted / name).write_text("\n".join([",".join(rows[0]), *(",".join(one.values()) for one in of)]) + "\n")
    write_run_manifest(planted)
    (planted / "other.csv").write_text("changed by somebody else\n")
    assert cut_short(lambda: forget(planted, ID), 30) == KILLED
    assert len(finish_forgetting(planted)) == 1
    assert ID not in (planted / "extra.csv").read_text()
    assert [fault for fault in verify(planted) if ".csv" in fault] == [
        "other.csv was changed: its sha256 is not the one in manifest.json"
    ]


def test_rows_go_out_of_every_kind_of_file(planted):
    from pyarrow import Table, parquet

    rows = [row(user, n, user == ID) for n in range(2) for user in ("Ada", ID)]
    data = planted / "state/data"
    (data / "packed.jsonl.gz").write_bytes(gzip.compress(lines(rows).encode()))
    header = ",".join(rows[0])
    (data / "table.csv").write_text("\n".join([header, *(",".join(one.values()) for one in rows)]) + "\n")
    parquet.write_table(Table.from_pylist(rows), data / "rows.parquet")
    (data / "other.parquet").write_bytes(b"")
    (data / "other.parquet").unlink()
    parquet.write_table(Table.from_pylist([{"x": 1}]), data / "other.parquet")
    (data / "notes.jsonl").write_text("not JSON at all\n")
    forget(planted, ID)
    assert held(planted) == {}
    assert (data / "notes.jsonl").read_text() == "not JSON at all\n"
    for name in ("packed.jsonl.gz", "table.csv", "rows.parquet", "pairs.jsonl"):
        kept = [pair for pair in PairStore(data / name, 0.25) if pair.user_id == "Ada"]
        assert [pair.prompt[-1].content for pair in kept][:2] == ["asked 0", "asked 1"], name
    assert forget_user.forget(planted, ID) is None
