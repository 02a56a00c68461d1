"""`data import chitchat`: small files in the format of the package, with every fault; the real one where pip has it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.data import chitchat
from persona_rlhf.data.chitchat import PACKAGE, WHEEL, import_chitchat, split_of
from persona_rlhf.data.pairs import read_pairs


def message(sender: str, text: str, minute: int = 0) -> dict[str, str]:
    return {"text": text, "timestamp": f"2018-05-02T19:{minute:02}:00Z", "sender": sender}


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    """A conversation in the package's format: lists of one sender's messages, which ` / ` divides here."""
    blocks = [[message(sender, text, n) for text in turn.split(" / ")] for n, (sender, turn) in enumerate(turns)]
    return {
        "start": "2018-05-02T19:00:00",
        "prompt": "Mozart or Beethoven?",
        "ratings": {"witty": 5},
        "messages": blocks,
    }


def named(split: str, count: int) -> list[str]:
    """Ids of conversations in a split."""
    return [name for n in range(200) if split_of(name := f"talk-{n}") == split][:count]


def write(folder: Path, conversations: object) -> Path:
    file = folder / "dataset.json"
    file.write_text(json.dumps(conversations), encoding="utf-8")
    return file


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SEA = "do you love the deep sea"
ANA_AND_BO = conversation(
    ("ana", "morning everyone out there"),
    ("bo", SEA),
    ("ana", "I do so very much / with whales"),
    ("bo", "and is the hill nice"),
    ("ana", "haha / ok"),
)
CY_AND_DI = conversation(("cy", SEA), ("di", "never been near any water"), ("cy", "hm"))


def test_a_turn_becomes_a_pair_with_the_nearest_answer_of_another_person(tmp_path: Path) -> None:
    first, second = named("train", 2)
    out = tmp_path / "new" / "pairs.jsonl"
    outcome = import_chitchat(write(tmp_path, {first: ANA_AND_BO, second: CY_AND_DI}), out)
    ana, di = rows_of(out)
    assert ana == {
        "user_id": "ana",
        "prompt": [{"role": "user", "content": SEA}],  # a prompt begins with the partner
        "chosen": "I do so very much\nwith whales",
        "rejected": "never been near any water",
        "id": f"{first}/2/{second}/1",
        "created_at": "2018-05-02T19:02:00Z",
        "source": "chitchat",
        "split": "train",
    }
    assert (di["user_id"], di["chosen"], di["rejected"]) == ("di", ana["rejected"], ana["chosen"])
    assert (outcome.conversations, outcome.people, outcome.messages, outcome.turns) == (2, 4, 10, 8)
    assert (outcome.pairs, outcome.users, outcome.splits) == (2, 2, {"train": 2, "heldout": 0})
    assert outcome.left_out == {
        "it opens the conversation": 2,
        "fewer than 4 different words": 2,
        "no similar turn that another person answers otherwise": 2,
    }
    assert outcome.pairs + sum(outcome.left_out.values()) == outcome.turns
    assert read_pairs(out, 0.25)


def test_no_answer_comes_from_the_other_split(tmp_path: Path) -> None:
    (first,), (second,) = named("train", 1), named("heldout", 1)
    file = write(tmp_path, {first: ANA_AND_BO, second: CY_AND_DI})
    with pytest.raises(InputError, match=r"no pair is left, .*: no similar turn that another person answers"):
        import_chitchat(file, tmp_path / "new" / "out.jsonl")
    assert not (tmp_path / "new").exists()


def test_a_prompt_is_the_latest_turns_and_begins_and_ends_with_the_partner(tmp_path: Path) -> None:
    talk = [("ana" if n % 2 else "bo", f"turn number {n} of this talk") for n in range(9)]
    talk[-2:] = [("ana", "and so on we go"), ("bo", SEA)]
    first, second = named("train", 2)
    answered = conversation(*talk, ("ana", "yes I like it well"))
    import_chitchat(write(tmp_path, {first: answered, second: CY_AND_DI}), tmp_path / "out.jsonl")
    row = next(row for row in rows_of(tmp_path / "out.jsonl") if row["chosen"] == "yes I like it well")
    assert [turn["content"] for turn in row["prompt"]] == [text for _, text in talk[-5:]]
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user", "assistant", "user"]
    talk[-3] = ("bo", "word " * 118)
    answered = conversation(*talk, ("ana", "yes I like it well"))
    import_chitchat(write(tmp_path, {first: answered, second: CY_AND_DI}), tmp_path / "out.jsonl")
    row = next(row for row in rows_of(tmp_path / "out.jsonl") if row["chosen"] == "yes I like it well")
    assert [turn["content"] for turn in row["prompt"]] == [SEA]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("look at www.example.org for that", "a link, an address or a long number"),
        ("write to me at x@y.net now", "a link, an address or a long number"),
        ("call me on 555-1234 at noon", "a link, an address or a long number"),
        ("a a a a a b c", "fewer than 4 different words"),
        ("!!! ??? :) ...", "fewer than 4 different words"),
        ("hello / how are you doing today", "a greeting"),
        (" ".join(f"word{n}" for n in range(121)), "over 120 words"),
        ("so long a turn that was", "an answer to a turn of over 120 words"),
    ],
)
def test_an_answer_that_teaches_nothing_is_counted(tmp_path: Path, answer: str, reason: str) -> None:
    first, second, third = named("train", 3)
    before = SEA + " word" * 120 if reason.startswith("an answer to") else SEA
    talk = conversation(("bo2", before), ("ana2", answer))
    usual = {first: ANA_AND_BO, second: CY_AND_DI}
    without = import_chitchat(write(tmp_path, usual), tmp_path / "out.jsonl")
    outcome = import_chitchat(write(tmp_path, {**usual, third: talk}), tmp_path / "out.jsonl")
    assert outcome.left_out[reason] == 1 + without.left_out.get(reason, 0)
    assert outcome.pairs == without.pairs == 2


@pytest.fixture
def frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files repeat their words, so all words but those of every turn are compared."""
    monkeypatch.setattr("persona_rlhf.data.similar_turns.COMMON", 1.0)


FILLER = {f"filler-{n}": conversation(("bo", f"filler{n}"), ("bo2", f"some words about topic{n}")) for n in range(20)}


@pytest.mark.usefixtures("frequent")
def test_nearly_the_same_answer_is_no_rejected_one(tmp_path: Path) -> None:
    first, second, third = named("train", 3)
    talks = {
        first: conversation(("bo", SEA), ("ana", "I love it so much")),
        second: conversation(("bo", SEA), ("cy", "yes I love it so much!")),
        third: conversation(("bo", SEA + " today"), ("di", "never been near any water")),
    } | FILLER
    import_chitchat(write(tmp_path, talks), tmp_path / "out.jsonl")
    assert {row["user_id"]: row["rejected"] for row in rows_of(tmp_path / "out.jsonl")} == {
        "ana": "never been near any water",
        "cy": "never been near any water",
        "di": "I love it so much",
    }


@pytest.mark.usefixtures("frequent")
def test_repetitions_of_a_person_and_prompts_on_both_sides_are_counted(tmp_path: Path) -> None:
    train, held = named("train", 3), named("heldout", 2)
    talks = {
        train[0]: conversation(("bo", SEA), ("ana", "I love it so much")),
        train[1]: conversation(("bo", SEA), ("ana", "I LOVE it, so much.")),
        train[2]: conversation(("bo", SEA), ("di", "never been near any water")),
        held[0]: conversation(("bo", SEA), ("ana", "today I like it less")),
        held[1]: conversation(("bo", SEA), ("cy", "oceans are full of plastic")),
    } | FILLER
    outcome = import_chitchat(write(tmp_path, talks), tmp_path / "out.jsonl")
    assert outcome.left_out["the person's earlier answer once more"] == 1
    assert outcome.left_out["held out, with a prompt that is trained"] == 1
    assert Counter((row["user_id"], row["split"]) for row in rows_of(tmp_path / "out.jsonl")) == {
        ("ana", "train"): 1,
        ("di", "train"): 1,
        ("cy", "heldout"): 1,
    }


SENTENCES = [
    f"{a} {b} is {c} here" for a in ("red", "blue", "old") for b in ("sea", "hill", "cat") for c in ("in", "up")
]
MESSAGES = st.tuples(st.sampled_from(["ana", "bo", "../../etc"]), st.sampled_from(SENTENCES))
TALKS = st.dictionaries(
    st.integers(0, 40).map("talk-{}".format), st.lists(MESSAGES, min_size=1, max_size=8), min_size=1, max_size=20
)


@settings(max_examples=60)
@given(TALKS)
def test_no_conversation_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, talks: dict[str, list[tuple[str, str]]]
) -> None:
    folder = tmp_path_factory.mktemp("talks")
    file = write(folder, {name: conversation(*turns) for name, turns in talks.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("persona_rlhf.data.similar_turns.COMMON", 0.5)
        try:
            outcome = import_chitchat(file, folder / "out.jsonl")
        except InputError as fault:
            assert "no pair is left" in str(fault)
            assert [path.name for path in folder.iterdir()] == ["dataset.json"]
            return
    sides: dict[str, set[str]] = defaultdict(set)
    prompts: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows_of(folder / "out.jsonl"):
        first, _, second, _ = row["id"].split("/")
        assert first != second
        assert row["chosen"] != row["rejected"]
        for name in (first, second):
            sides[name].add(row["split"])
            assert split_of(name) == row["split"]
        prompts[row["user_id"], json.dumps(row["prompt"])].add(row["split"])
    assert all(len(splits) == 1 for splits in (*sides.values(), *prompts.values()))
    assert outcome.pairs + sum(outcome.left_out.values()) == outcome.turns
    assert [file.name for file in sorted(folder.iterdir())] == ["dataset.json", "out.jsonl"]


def test_wrong_messages_are_named_by_place_and_nothing_is_written(tmp_path: Path) -> None:
    talk = conversation(("bo", SEA), ("ana", "fine"))
    talk["messages"] += [[message("", "x"), {"text": 3, "timestamp": "soon", "sender": 7}, "x"], "y", [{}]]
    file = write(tmp_path, {"good": ANA_AND_BO, "bad": talk, "none": None, "half": {"messages": {}}})
    with pytest.raises(InputError) as error:
        import_chitchat(file, tmp_path / "out.jsonl")
    assert [problem.key for problem in error.value.problems] == [
        "bad.messages[2][0].sender",
        *(f"bad.messages[2][1].{key}" for key in ("text", "timestamp", "sender")),
        "bad.messages[2][2]",
        "bad.messages[3]",
        *(f"bad.messages[4][0].{key}" for key in ("text", "timestamp", "sender")),
        "none.messages",
        "half.messages",
    ]
    assert not (tmp_path / "out.jsonl").exists()


def wheel(folder: Path, name: str, content: bytes | None) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("chitchat_dataset/__init__.py", "")
        if content is not None:
            archive.writestr("chitchat_dataset/dataset.json", content)
    return folder / name


def test_a_file_other_than_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    first, second = named("train", 2)
    content = json.dumps({first: ANA_AND_BO, second: CY_AND_DI}).encode()
    wrong = wheel(tmp_path / "index", WHEEL, content)
    with pytest.raises(InputError, match=r"not the pinned .*pip download --no-deps chitchat-dataset==0.9.0"):
        import_chitchat(wrong.parent, out)
    newer = wheel(tmp_path, "chitchat_dataset-1.0.0-py3-none-any.whl", content)
    with pytest.raises(InputError, match=r"holds chitchat_dataset-1.0.0-.*whl, not chitchat-dataset==0.9.0; get it by"):
        import_chitchat(tmp_path, out)
    outcome = import_chitchat(newer, out)
    assert outcome.pairs == 2
    assert f"is not {PACKAGE}" in outcome.package
    monkeypatch.setitem(chitchat.PINNED, ".whl", chitchat.sha256_of(wrong))
    assert import_chitchat(wrong.parent, out).package == f"{WHEEL} is {PACKAGE}: its sha256 is as pinned."
    empty = wheel(tmp_path, "empty.whl", None)
    with pytest.raises(InputError, match="there is no readable chitchat_dataset/dataset.json in it"):
        import_chitchat(empty, out)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nowhere", None, "no such file; get it by `pip download --no-deps chitchat-dataset==0.9.0`"),
        ("data.csv", b"", "no .whl or .json file"),
        ("data.whl", b"PK", "not a zip file"),
        ("data.json", b"[]", "must be an object of conversations"),
        ("data.json", b"{}", "must be an object of conversations"),
        ("data.json", b'{"a":\n}', "data.json:2: it is not JSON"),
        ("data.json", b'{"a": "\xff"}', "it is not UTF-8"),
        ("data.json", b"[" * 100_000, "it is not JSON"),
        ("folder", None, "holds neither"),
    ],
)
def test_files_that_do_not_go(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        import_chitchat(tmp_path / name, tmp_path / "out.jsonl")


def test_the_command_counts_leaves_out_small_users_and_tells_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = named("train", 3)
    hill = "which hill did they climb"
    talks = {
        first: ANA_AND_BO,
        second: CY_AND_DI,
        third: conversation(("bo", hill), ("ana", "the one by our town")),
        "other": conversation(("bo", hill), ("ed", "none that I remember now")),
    }
    monkeypatch.setattr(chitchat, "split_of", lambda name: "train")
    monkeypatch.setattr(chitchat, "_INTERVAL", 0.0)
    command = ["data", "import", "chitchat", str(write(tmp_path, talks)), str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, [*command, "--min-pairs", "2", "--json"])
    assert done.exit_code == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["pairs"], outcome["users"], outcome["users_by_pairs"]) == (2, 1, {"20": 0, "100": 0})
    assert outcome["left_out"]["of a user with fewer than 2 pairs"] == 2
    assert "4 of 4 conversations read" in done.stderr
    assert "turns compared" in done.stderr
    assert "2 pairs of 1 users written" in done.stderr
    done = CliRunner().invoke(app, ["data", "import", "xstest", "x", "y", "--min-pairs", "2"])
    assert done.exit_code == 2
    assert "probes belong to no user" in done.stderr


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_package_gives_its_published_counts(tmp_path: Path) -> None:
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(tmp_path), PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        pytest.skip(f"no package index here: {pip.stderr.strip()[-200:]}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    words = ["data", "import", "chitchat", str(tmp_path), str(tmp_path / "out.jsonl"), "--json"]
    done = subprocess.run([sys.executable, "-m", "persona_rlhf", *words], capture_output=True, text=True, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    outcome = json.loads(done.stdout)
    assert outcome["package"].endswith("its sha256 is as pinned.")
    assert (outcome["conversations"], outcome["people"], outcome["messages"]) == (7168, 1315, 258_145)
    assert (outcome["pairs"], outcome["users"], outcome["users_by_pairs"]) == (62_905, 1033, {"20": 336, "100": 99})
    assert outcome["pairs"] + sum(outcome["left_out"].values()) == outcome["turns"]
