"""`data import` of preference sets: hand-made rows in the published columns, and every fault of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.data.check import check
from persona_rlhf.data.importers import import_file
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.preference_import import SetChoices, SetImport
from persona_rlhf.data.preference_sets import preference_sets
from tests.data import preference_rows as rows
from tests.data.preference_rows import ROWS, Row

CALLERS = {"hh-rlhf": SetChoices(user="all"), "ultrafeedback": SetChoices(user="gpt-4")}  # they name no users


def written(path: Path, *lines: Row | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def imported(folder: Path, name: str, *lines: Row | str, choices: SetChoices | None = None) -> SetImport:
    source = written(folder / "source.jsonl", *lines)
    summary = import_file(name, source, folder / "out.jsonl", choices=choices or CALLERS.get(name))
    assert isinstance(summary, SetImport)
    assert summary.pairs + sum(summary.left_out.values()) == summary.comparisons
    return summary


def pairs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sides(path: Path) -> list[tuple[str, str, str]]:
    return [(pair["user_id"], pair["chosen"], pair["rejected"]) for pair in pairs(path)]


def test_every_set_of_the_table_has_rows_here() -> None:
    assert ROWS.keys() == preference_sets().keys()


@pytest.mark.parametrize("name", ROWS)
def test_the_pairs_of_a_set_are_read_by_data_check(tmp_path: Path, name: str) -> None:
    summary = imported(tmp_path, name, *ROWS[name])
    assert summary.rows == len(ROWS[name])
    checked = check([summary.path])
    assert checked.pairs == summary.pairs > 0
    assert checked.unknown_columns == checked.read_as == {}
    assert checked.screened_out == {}
    licence, *_ = summary.sentences()
    assert preference_sets()[name].licence in licence


def test_community_alignment_compares_the_preferred_answer_with_three_others_in_each_turn(tmp_path: Path) -> None:
    summary = imported(tmp_path, "community-alignment", rows.community())
    first, *_, last = pairs(summary.path)
    assert first == {
        "user_id": "w1",
        "prompt": "Plan a walk.",
        "chosen": "walk b",  # without the token that ends a text
        "rejected": "walk a",
        "id": "c1/first/response_b/response_a",
        "place": "2/4",
        "source": "community-alignment",
    }
    assert [turn["content"] for turn in last["prompt"]] == ["Plan a walk.", "walk b", "And if it rains?"]
    assert [turn["role"] for turn in last["prompt"]] == ["user", "assistant", "user"]
    assert (last["chosen"], last["rejected"]) == ("rain d", "rain c")
    assert (summary.pairs, summary.comparisons, summary.left_out) == (6, 6, {})


def test_community_alignment_is_a_csv_file(tmp_path: Path) -> None:
    with (tmp_path / "community.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows.community())
        table.writeheader()
        table.writerows([rows.community(), rows.community(first_turn_response_c="", annotator_id="w2")])
    summary = import_file("community-alignment", tmp_path / "community.csv", tmp_path / "out.jsonl")
    assert isinstance(summary, SetImport)
    assert (summary.pairs, summary.users, summary.left_out) == (11, 2, {"an empty answer": 1})


def test_a_turn_after_one_without_a_choice_has_no_prompt(tmp_path: Path) -> None:
    lost = rows.community(first_turn_preferred_response=None)
    gap = rows.community(**{f"fourth_turn_{part}": text for part, text in (("prompt", "More?"), ("response_a", "x"))})
    gap |= {"fourth_turn_response_b": "y", "fourth_turn_preferred_response": "response_a"}
    summary = imported(tmp_path, "community-alignment", lost, gap)
    assert summary.pairs == 6
    assert summary.left_out == {
        "no choice in `first_turn_preferred_response`": 1,
        "a turn after one without a choice": 2,
    }


def test_prism_compares_the_best_answers_of_a_turn_and_goes_on_after_the_chosen_one(tmp_path: Path) -> None:
    summary = imported(tmp_path, "prism", rows.prism())
    assert sides(summary.path) == [
        ("user3", "Yes.", "No."),
        ("user3", "Perhaps.", "No."),
        ("user3", "It warms.", "It is wet."),
    ]
    assert [turn["content"] for turn in pairs(summary.path)[-1]["prompt"]] == ["Is tea good?", "Yes.", "Why?"]
    assert pairs(summary.path)[0]["created_at"] == "2023-11-22T15:50:10"
    assert summary.left_out == {"a tie": 1}
    close = imported(tmp_path, "prism", rows.prism(), choices=SetChoices(min_gap=40))
    assert (close.pairs, close.left_out) == (2, {"a tie": 1, "scores less than 40 apart": 1})


def test_personalllm_has_a_user_per_reward_model(tmp_path: Path) -> None:
    summary = imported(tmp_path, "personalllm", rows.personalllm())
    assert (summary.pairs, summary.users) == (70, 10)
    best = {user: chosen for user, chosen, _ in sides(summary.path)}
    assert best == dict.fromkeys(rows.REWARD_MODELS, "bird 1") | {"gemma_2b": "bird 8"}


def test_a_pair_of_personal_reward_bench_keeps_its_split(tmp_path: Path) -> None:
    [pair] = pairs(imported(tmp_path, "personal-reward-bench", rows.bench()).path)
    assert (pair["split"], pair["chosen"], pair["rejected"]) == ("heldout", "So long", "Go")
    assert [turn["role"] for turn in pair["prompt"]] == ["user", "assistant", "user"]


def test_a_battle_counts_where_both_answer_the_same_conversation(tmp_path: Path) -> None:
    other = [*rows.arena()["conversation_a"], {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    another = [*rows.arena()["conversation_b"], *other[2:]]
    lines = [rows.arena(), rows.arena(winner="tie"), rows.arena(winner="tie (bothbad)"), rows.arena(winner="model_c")]
    longer = rows.arena(conversation_a=other, conversation_b=another)
    summary = imported(tmp_path, "arena", *lines, longer)
    assert pairs(summary.path) == [
        {
            "user_id": "arena_user_1",
            "prompt": "Tell a joke.",
            "chosen": "Another joke.",
            "rejected": "A joke.",
            "id": "q9/b/a",
            "created_at": "2023-04-24T15:53:11.500000+00:00",
            "place": "2/2",
            "source": "arena",
        }
    ]
    assert summary.left_out == {"a tie": 2, "an unknown label in `winner`": 1, "a wrong `prompt`": 1}


def test_a_worker_compares_summaries_of_a_post(tmp_path: Path) -> None:
    [pair] = pairs(imported(tmp_path, "tldr", rows.tldr()).path)
    assert (pair["user_id"], pair["chosen"], pair["rejected"]) == ("wk", "shoe lost", "a shoe")
    assert pair["prompt"] == "Summarise this post.\n\nShoe\n\nI lost a shoe."
    news = rows.tldr(info={"id": "n", "article": "News.", "site": "s", "title": "T"})
    assert imported(tmp_path, "tldr", rows.tldr(), news).left_out == {"no prompt in `its template`": 1}


def test_transcripts_become_conversations_of_one_user(tmp_path: Path) -> None:
    other = rows.hh(rejected="\n\nHuman: Ho\n\nAssistant: No")
    summary = imported(tmp_path, "hh-rlhf", rows.hh(), other, rows.hh(chosen="no turns at all"))
    [pair] = pairs(summary.path)
    assert [turn["content"] for turn in pair["prompt"]] == ["Hi", "Hello", "A fish?"]
    assert (pair["user_id"], pair["chosen"], pair["rejected"]) == ("all", "Cod.", "Cow.")
    assert sum(summary.left_out.values()) == 2


def test_the_best_completion_is_chosen_over_each_other(tmp_path: Path) -> None:
    summary = imported(tmp_path, "ultrafeedback", rows.ultra())
    assert sides(summary.path) == [("gpt-4", "two", "one"), ("gpt-4", "two", "three")]


def test_thumbs_and_ratings_of_a_user_to_a_prompt_belong_together_in_any_order(tmp_path: Path) -> None:
    lines = [
        rows.thumb(),
        rows.thumb(user_id="u2"),
        rows.thumb(prompt="A hill?"),
        rows.thumb(completion="x", label=False),
    ]
    summary = imported(tmp_path, "kto", *lines, rows.thumb(completion="Po"), rows.thumb(user_id="u2", label=False))
    assert sides(summary.path) == [("u1", "Rhine", "x"), ("u1", "Po", "x")]
    assert summary.left_out == {"a tie": 1, "fewer than two answers": 1, "equal answers": 1}
    summary = imported(tmp_path, "ratings", *ROWS["ratings"], rows.rating(response="Elbe", rating="n/a"))
    assert sides(summary.path) == [("u1", "Rhine", "Rome")]
    assert summary.left_out == {"scores less than 1 apart": 1, "an answer without a score": 1}


def test_columns_of_your_data_take_the_place_of_ours(tmp_path: Path) -> None:
    line = {"annotator": 7, "q": "A river?", "good": "Rhine", "bad": "Rome"}
    choices = SetChoices({"user": "annotator", "prompt": "q", "chosen": "good", "rejected": "bad"})
    assert sides(imported(tmp_path, "trl", line, choices=choices).path) == [("7", "Rhine", "Rome")]
    task = rows.studio(data={"prompt": "A river?", "text1": "Rhine", "text2": "Rome"})
    choices = SetChoices({"left": "data.text1", "right": "data.text2"})
    assert sides(imported(tmp_path, "label-studio", task, choices=choices).path)[0] == ("10", "Rhine", "Rome")
    with pytest.raises(InputError, match=r"has no role `usr` \(did you mean `user`\?\)"):
        imported(tmp_path, "trl", line, choices=SetChoices({"usr": "annotator"}))


@pytest.mark.parametrize("column", ["tools", "images", "system", "history"])
def test_a_column_whose_content_a_pair_would_lose_costs_the_pair(tmp_path: Path, column: str) -> None:
    summary = imported(tmp_path, "trl", rows.trl(), rows.trl(**{column: ["text"]}))
    assert (summary.pairs, summary.left_out) == (1, {f"`{column}` would be left out of the text": 1})


def test_annotators_of_a_task_are_users_and_a_skipped_one_counts(tmp_path: Path) -> None:
    summary = imported(tmp_path, "label-studio", rows.studio(), rows.studio(annotations=[]))
    assert sides(summary.path) == [("10", "Rhine", "Rome"), ("11", "Rome", "Rhine")]
    assert summary.left_out == {
        "no choice in `item.result.[type=pairwise].value.selected`": 1,
        "no judgement in `annotations`": 1,
    }
    owner = rows.studio()
    owner["data"]["user_id"] = "ana"
    assert {user for user, _, _ in sides(imported(tmp_path, "label-studio", owner).path)} == {"ana"}


def test_a_judgement_without_a_choice_costs_no_other_one(tmp_path: Path) -> None:
    task = rows.studio()
    task["annotations"] = task["annotations"][::-1]  # the skipped one is the first
    summary = imported(tmp_path, "label-studio", task)
    assert sides(summary.path) == [("11", "Rome", "Rhine"), ("10", "Rhine", "Rome")]
    tied = rows.personalllm(**{f"response_{n}_gemma_2b": 1.0 for n in range(1, 9)})
    summary = imported(tmp_path, "personalllm", tied)
    assert (summary.pairs, summary.users, summary.left_out) == (63, 9, {"a tie": 28})


def test_a_ranking_prefers_its_first_answer_to_each_later_one(tmp_path: Path) -> None:
    summary = imported(tmp_path, "argilla", rows.argilla())
    assert sides(summary.path) == [("7f", "Po", "Rhine"), ("7f", "Po", "Rome"), ("8f", "Rhine", "Rome")]
    tied = rows.argilla()
    tied["responses"]["ranking"] = [
        {"value": [{"value": name, "rank": 1} for name in ("response_a", "response_b")], "user_id": "u"}
    ]
    assert imported(tmp_path, "argilla", rows.argilla(), tied).left_out == {"a tie": 1}


USER_COLUMNS = {
    "community-alignment": "annotator_id", "prism": "user_id", "personal-reward-bench": "user_id", "arena": "judge",
    "tldr": "worker", "kto": "user_id", "ratings": "user_id", "trl": "user_id",
}  # fmt: skip


@pytest.mark.parametrize(("name", "column"), USER_COLUMNS.items())
def test_a_row_without_its_user_is_counted_and_a_file_without_users_is_an_error(
    tmp_path: Path, name: str, column: str
) -> None:
    lost = [{key: value for key, value in row.items() if key != column} for row in ROWS[name]]
    summary = imported(tmp_path, name, *ROWS[name], *lost)
    assert summary.left_out[f"no user in `{column}`"] >= len(lost)
    assert f"(first at {tmp_path / 'source.jsonl'}:{len(lost) + 1})" in "\n".join(summary.sentences())
    (tmp_path / "out.jsonl").write_text("before")
    with pytest.raises(InputError) as error:
        imported(tmp_path, name, *lost)
    [problem] = error.value.problems
    assert (problem.file, problem.line) == (str(tmp_path / "source.jsonl"), 1)
    assert f"no user in `{column}`" in problem.sentence
    assert preference_sets()[name].title in problem.sentence
    assert (tmp_path / "out.jsonl").read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "source.jsonl"]


@pytest.mark.parametrize("name", ROWS)
def test_broken_rows_cost_one_row_each_and_another_format_is_one_error_with_file_and_line(
    tmp_path: Path, name: str
) -> None:
    summary = imported(tmp_path, name, {"x": "y"}, '{"half": ', "5", *ROWS[name])
    assert summary.left_out["a row that cannot be read"] == 2
    assert sum(summary.left_out.values()) >= 3
    with pytest.raises(InputError) as error:
        imported(tmp_path, name, {"x": "y"}, {"x": "z"})
    [problem] = error.value.problems
    assert (problem.file, problem.line) == (str(tmp_path / "source.jsonl"), 1)
    assert "No pair is left of 2 rows" in problem.sentence


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("community-alignment", rows.community(first_turn_response_a="walk b"), "equal answers"),
        ("community-alignment", rows.community(first_turn_preferred_response="response_e"),
         "an unknown label in `first_turn_preferred_response`"),
        ("community-alignment", rows.community(first_turn_prompt="  "), "an empty prompt"),
        ("community-alignment", rows.community(first_turn_response_a="EMPTY STRING"), "an empty answer"),
        ("prism", rows.prism(conversation_history="none"), "no judgement in `conversation_history`"),
        ("personalllm", rows.personalllm(response_2=""), "an empty answer"),
        ("personalllm", rows.personalllm(response_2=None), "an empty answer"),
        ("personal-reward-bench", rows.bench(rejected=None), "no answer in `rejected`"),
        ("tldr", rows.tldr(choice=2), "an unknown label in `choice`"),
        ("tldr", rows.tldr(summaries=[{"text": " x"}, {"text": "x "}]), "equal answers"),
        ("ultrafeedback", rows.ultra(completions=[]), "no answer in `completions.{answer}.response`"),
        ("kto", rows.thumb(prompt="Alone?"), "fewer than two answers"),
        ("kto", rows.thumb(completion=None), "no answer in `completion`"),
        ("trl", rows.trl(chosen="Rome"), "equal answers"),
        ("trl", rows.trl(chosen=" "), "an empty answer"),
        ("trl", rows.trl(user_id="x" * 200), "a wrong `user_id`"),
        ("trl", rows.trl(chosen=["Rhine"]), "a wrong `chosen`"),
        ("trl", rows.trl(created_at="soon"), "a wrong `created_at`"),
        ("label-studio", rows.studio(data={"left": "a", "right": "b"}), "no prompt in `data.prompt`"),
        ("argilla", rows.argilla(fields={"prompt": "A river?"}), "no answer in `fields.{answer}`"),
    ],
)  # fmt: skip
def test_a_row_that_makes_no_pair_is_counted_with_its_reason(tmp_path: Path, name: str, line: Row, reason: str) -> None:
    whole = imported(tmp_path, name, *ROWS[name])
    assert reason not in whole.left_out
    summary = imported(tmp_path, name, *ROWS[name], line)
    assert summary.left_out[reason] >= 1
    assert summary.pairs >= whole.pairs


def test_users_with_few_pairs_are_left_out_of_the_file(tmp_path: Path) -> None:
    lines = [
        rows.trl(prompt=f"river {n}?", user_id=user) for user in ("a", "b", "ü") for n in range({"b": 1}.get(user, 3))
    ]
    source = written(tmp_path / "source.jsonl", *lines)
    summary = import_file("trl", source, tmp_path / "out.jsonl", min_pairs=2)
    assert isinstance(summary, SetImport)
    assert [user for user, _, _ in sides(summary.path)] == ["a"] * 3 + ["ü"] * 3
    assert (summary.pairs, summary.users, summary.left_out) == (6, 2, {"of a user with fewer than 2 pairs": 1})
    with pytest.raises(InputError, match=r"no pair is left, .* of a user with fewer than 4 pairs \(7\)"):
        import_file("trl", source, tmp_path / "out.jsonl", min_pairs=4)
    assert len(pairs(tmp_path / "out.jsonl")) == 6


def test_the_files_of_a_folder_state_their_splits(tmp_path: Path) -> None:
    for name, prompt in (("train.jsonl", "A river?"), ("test.jsonl", "A hill?")):
        (tmp_path / "set").mkdir(exist_ok=True)
        written(tmp_path / "set" / name, rows.trl(prompt=prompt))
    import_file("trl", tmp_path / "set", tmp_path / "out.jsonl")
    assert {(pair.prompt[0].content, pair.split) for pair in read_pairs(tmp_path / "out.jsonl", 0.25)} == {
        ("A river?", "train"),
        ("A hill?", "heldout"),
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["hh-rlhf", "SRC", "OUT"], "names no users; --user NAME makes"),
        (["trl", "SRC", "OUT", "--column", "user"], "--column takes ROLE=COLUMN"),
        (["trl", "SRC", "OUT", "--train"], "--train goes with sets of probes"),
        (["cragc25", "SRC", "OUT", "--user", "x"], "the columns of `cragc25` are fixed"),
        (["trl", "nowhere.jsonl", "OUT"], "there is no such file"),
        (["trl", "SRC", "SRC"], "would replace its source"),
        (["community-alignmnt", "SRC", "OUT"], "did you mean `community-alignment`?"),
        (["trl", "SRC", "OUT", "--min-pairs", "9"], "no pair is left"),
    ],
)
def test_calls_that_do_not_go_exit_with_2_and_write_nothing(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    source = written(tmp_path / "source.jsonl", rows.trl())
    places = {"SRC": str(source), "OUT": str(tmp_path / "out.jsonl")}
    outcome = CliRunner().invoke(app, ["data", "import", *(places.get(word, word) for word in arguments)])
    assert outcome.exit_code == 2
    assert sentence in " ".join(outcome.output.split()).replace("│ ", "")
    assert not (tmp_path / "out.jsonl").exists()
    assert json.loads(source.read_text()) == rows.trl()


def test_json_names_licence_columns_and_reasons(tmp_path: Path) -> None:
    source = written(tmp_path / "source.jsonl", rows.community(), rows.community(annotator_id=None))
    call = ["data", "import", "community-alignment", str(source), str(tmp_path / "out.jsonl"), "--json"]
    outcome = CliRunner().invoke(app, call)
    assert outcome.exit_code == 0
    printed = json.loads(outcome.stdout)
    assert (printed["format"], printed["licence"], printed["pairs"]) == ("community-alignment", "CC-BY-4.0", 6)
    assert printed["columns"]["user"] == "annotator_id"
    assert printed["left_out"] == {"no user in `annotator_id`": 2}


TEXTS = st.one_of(st.none(), st.sampled_from(["", " ", "yes", "no", "Rhine"]), st.integers(-2, 2), st.booleans())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(ROWS)))
def test_no_change_of_a_row_loses_count_or_breaks_the_file(tmp_path_factory: Any, data: Any, name: str) -> None:
    """Some values of the rows are replaced; what is written can still be read, and every comparison has its count."""
    folder = tmp_path_factory.mktemp("rows")
    changed = [{key: data.draw(TEXTS) if data.draw(st.integers(0, 9)) == 0 else value for key, value in row.items()}
               for row in ROWS[name]]  # fmt: skip
    summary = imported(folder, name, *ROWS[name], *changed)
    assert len(read_pairs(summary.path, 0.25)) == summary.pairs
