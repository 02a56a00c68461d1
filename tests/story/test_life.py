"""A run's life: a user is forgotten in the midst of training, others come, and the base is another one."""

from __future__ import annotations

import json
import shutil
import time
from subprocess import DEVNULL, Popen

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_weights
from safetensors.torch import save_file

from persona_rlhf.common.files import pseudonym, shipped_root
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.tokenize import both_rows, tokenize
from persona_rlhf.models.base import load_tokenizer
from persona_rlhf.training.cache import key_of
from tests.story.experiment import (
    OVERRIDES,
    STRANGE,
    adapters,
    command,
    environment,
    persona_rlhf,
    results,
    rows_of,
    write_users,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WORDS = ("a quartz heron", "counts nine lanterns", "under the violet bridge", "heron-id-77", "heron-notes")
FIRST = ("../../etc", "CON", "Ann")


def killed_in_training(words, folder, metrics, lines):
    """kill -9 once so many lines of metrics are there."""
    child = Popen(command(*words), cwd=folder, env=environment(), stdout=DEVNULL, stderr=DEVNULL)
    while child.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
        time.sleep(0.01)
    assert child.poll() is None, "it was done before it could be killed"
    child.kill()
    child.wait()


def forms_of(texts, tokenizer):
    """Texts as they are, as JSON escapes them, and as token ids: 32 and 64 bits wide, or written out."""
    for text in texts:
        yield from (text.encode(), json.dumps(text)[1:-1].encode())
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][1:-1]
        yield from (np.array(ids, dtype).tobytes() for dtype in (np.int32, np.int64))
        yield from (json.dumps(ids)[1:-1].encode(), json.dumps(ids, separators=(",", ":"))[1:-1].encode())


def found_in(folder, forms):
    """The files that hold one of the forms, or are called so."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if any(form in path.name.encode() or (path.is_file() and form in path.read_bytes()) for form in forms)
    )


def test_forgotten_in_the_midst_of_training(trained, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("run"))
    write_users(folder / "users", ("Ann", "heron zero", "b", "c"))
    file = folder / "users/pairs.jsonl"
    rows = rows_of(file)
    for n, row in enumerate(row for row in rows if row["user_id"] == "heron zero"):
        marked = {
            name: f"{row[name]} {word}" for name, word in zip(("prompt", "chosen", "rejected"), WORDS, strict=False)
        }
        row |= {**marked, "id": f"{WORDS[3]}{n}", "source": WORDS[4]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ("train", "experiment.yaml", *OVERRIDES, "fleet.reference_cache=cache", "fleet.slots=4", "--run", "killed")
    run = folder / "killed"
    killed_in_training(words, folder, run / "metrics.jsonl", 9)
    tokenizer = load_tokenizer("data/base")
    canaries = list(forms_of(("heron zero", *WORDS), tokenizer))
    assert len(found_in(run, canaries)) >= 2  # metrics and checkpoint: the scan sees the user
    keys = {}
    for user in tokenize(read_pairs(file, 0.25), tokenizer, 10**6):
        keys[user.user_id] = {key_of(row) for row in both_rows(user.train)}

    gone = persona_rlhf("forget", "killed", "--user", "heron zero", "--json", cwd=folder)
    assert gone.returncode == 0, gone.stderr
    assert "users/pairs.jsonl holds 17 rows of the user" in gone.stderr
    assert found_in(run, canaries) == []
    assert {piece["what"] for piece in json.loads(gone.stdout)["removed"]} >= {"lines", "place in a checkpoint"}
    done = persona_rlhf(*words, "--resume", cwd=folder)
    assert done.returncode in (0, 3), done.stderr
    assert [line["user_id"] for line in results(run)] == ["Ann", "b", "c"]
    assert all(line["steps"] == 6 for line in results(run))
    assert found_in(run, canaries) == []
    [values] = (folder / "cache").glob("*.safetensors")
    before = {bytes(key) for key in load_file(values)["keys"]}
    assert before >= keys["b"] | keys["c"]
    assert not before & keys["heron zero"]
    assert persona_rlhf("forget", "killed", "--user", "c", cwd=folder).returncode == 0
    kept = {bytes(key) for key in load_file(values)["keys"]}
    assert before - kept == keys["c"] - keys["b"] - keys["Ann"] != set()
    assert persona_rlhf("verify", "killed", cwd=folder).returncode == 0
    again = persona_rlhf("forget", "killed", "--user", "heron zero", cwd=folder)
    assert (again.returncode, "forgotten already" in again.stderr) == (0, True)
    assert persona_rlhf("forget", "killed", "--user", "heron", cwd=folder).returncode == 2
    back = persona_rlhf("add", "killed", "--users", "users", cwd=folder)
    assert back.returncode == 0, back.stderr
    assert "2 users asked to be forgotten and stay out" in back.stderr


@pytest.fixture(scope="module")
def grown(trained, tmp_path_factory):
    """A run of three users, to which the others of `trained` are added; the addition is killed once."""
    folder = tmp_path_factory.mktemp("life") / "mine"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("run"))
    rows = rows_of(folder / "users/pairs.jsonl")
    for name, wanted in (("users", True), ("more", False)):
        (folder / name).mkdir(exist_ok=True)
        own = [row for row in rows if (row["user_id"] in FIRST) is wanted]
        (folder / name / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    done = persona_rlhf("train", "experiment.yaml", *OVERRIDES, "--run", "run", cwd=folder)
    assert done.returncode in (0, 3), done.stderr
    before = adapters(folder / "run"), (folder / "run/results.jsonl").read_bytes()
    words = ("add", "run", "--users", "more")
    killed_in_training(words, folder, folder / "run/state/adding/metrics.jsonl", 7)
    assert persona_rlhf("verify", "run", cwd=folder).returncode == 0  # nothing of the run has changed yet
    assert (folder / "run/results.jsonl").read_bytes() == before[1]
    added = persona_rlhf(*words, cwd=folder)
    assert added.returncode in (0, 3), added.stderr
    return folder, before


def test_added_users_are_those_of_one_run_and_nobody_else_changes(grown, trained):
    folder, (files, lines) = grown
    run = folder / "run"
    now = adapters(run)
    assert {name: digest for name, digest in now.items() if name in files} == files
    assert (run / "results.jsonl").read_bytes().startswith(lines)
    assert {line["user_id"] for line in results(run)} == set(STRANGE)
    assert set(now) == set(adapters(trained.run))
    for name in now:
        weights, straight = (
            load_weights(place / f"adapters/{name}/adapter_model.safetensors") for place in (run, trained.run)
        )
        assert all((weights[key] - straight[key]).abs().max() <= 1e-5 for key in straight), name
    assert persona_rlhf("verify", "run", cwd=folder).returncode == 0
    again = persona_rlhf("evaluate", "run", "--json", cwd=folder)
    assert again.returncode in (0, 3), again.stderr
    assert [line["user_id"] for line in json.loads(again.stdout)] == [line["user_id"] for line in results(run)]
    nobody = persona_rlhf("add", "run", "--users", "more", cwd=folder)
    assert (nobody.returncode, "3 users are in the run already" in nobody.stderr) == (0, True)
    assert adapters(run) == now


def test_another_base(grown):
    folder, _ = grown
    shutil.copytree(shipped_root() / "data/base", folder / "other")
    [weights] = (folder / "other").glob("*.safetensors")
    draw = torch.Generator().manual_seed(0)
    tensors = load_weights(weights)
    save_file(
        {name: one + 1e-3 * torch.randn(one.shape, generator=draw) for name, one in tensors.items()},
        weights,
        {"format": "pt"},
    )
    assert persona_rlhf("forget", "run", "--user", "Ann", cwd=folder).returncode == 0
    same = persona_rlhf("rebase", "run", "--base", "data/base", cwd=folder)
    assert (same.returncode, "the base that the run has" in same.stderr) == (2, True)
    old = adapters(folder / "run")
    done = persona_rlhf("rebase", "run", "--base", "other", "--replace", "--json", cwd=folder)
    assert done.returncode in (0, 3), done.stderr
    told = json.loads(done.stdout)
    assert [user["user_id"] for user in told["users"]] == [line["user_id"] for line in results(folder / "run")]
    assert "Ann" not in done.stdout
    accuracy = told["figures"]["new base"]["figures"]["held-out accuracy"]
    assert accuracy["change"] is not None
    assert accuracy["change_interval"] is None  # five users are too few
    assert all(user[side]["alpha"] in (0, 0.25, 0.5, 0.75, 1) for user in told["users"] for side in ("old", "new"))
    assert adapters(folder / "run.before") == old
    assert set(adapters(folder / "run").values()).isdisjoint(old.values())
    assert (folder / f"run/forgotten/{pseudonym('Ann')}.json").exists()
    for run in ("run", "run.before"):
        assert persona_rlhf("verify", run, cwd=folder).returncode == 0
