from __future__ import annotations

from typing import Any

import pytest

from persona_rlhf.data.pairs import Message, PreferencePair, RowNotes, parse_row

FRUIT = (Message("user", "Name a fruit."),)
ANSWERS = {"chosen": "An apple.", "rejected": "A stone."}


def turn(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def sharegpt(by: str, value: str) -> dict[str, str]:
    return {"from": by, "value": value}


ASKED = turn("user", "Name a fruit.")
APPLE, STONE = turn("assistant", "An apple."), turn("assistant", "A stone.")
WHOLE = {"chosen": [ASKED, APPLE], "rejected": [ASKED, STONE]}


def good(**row: Any) -> PreferencePair:
    parsed = parse_row({"user_id": "ana", **row}, "f.jsonl", 1)
    assert isinstance(parsed, PreferencePair), parsed
    return parsed


def faults(**row: Any) -> str:
    parsed = parse_row({"user_id": "ana", **row}, "f.jsonl", 1)
    assert isinstance(parsed, list), parsed
    return "\n".join(map(str, parsed))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": APPLE, "rejected": STONE},  # Axolotl, chat_template.default
        {"messages": [ASKED], "chosen": APPLE, "rejected": STONE},
        {"prompt": ASKED, "chosen": [APPLE], "rejected": "A stone."},
        {
            "conversations": [sharegpt("human", "Name a fruit.")],
            "chosen": sharegpt("gpt", "An apple."),
            "rejected": sharegpt("gpt", "A stone."),
        },  # LLaMA-Factory, sharegpt
        {"instruction": "Name a fruit.", **ANSWERS},  # LLaMA-Factory, alpaca
        {"instruction": "Name a fruit.", "input": "", "system": "", "history": [], **ANSWERS},
        {"question": "Name a fruit.", **ANSWERS},  # Axolotl, intel
        {"input": "Name a fruit.", **ANSWERS},  # Axolotl, icr
        {"instruction": "Name a fruit.", "chosen_response": "An apple.", "rejected_response": "A stone."},  # argilla
        WHOLE,  # argilla_chat, TRL's implicit prompt
        {"prompt": "Name a fruit.", **WHOLE},  # UltraFeedback, ORPO-DPO-mix
        {"prompt": "Name a fruit. ", **WHOLE},
        {"prompt": [ASKED], "messages": [ASKED, APPLE], **WHOLE},
        {"messages": [ASKED, APPLE], **WHOLE},
        {"prompt": [turn("user", [{"type": "text", "text": "Name a fruit."}])], **ANSWERS},
        {"prompt": [turn("user", [{"type": "text", "text": "Name a fruit.", "image": None}])], **ANSWERS},
        {"prompt": [{**ASKED, "tool_calls": None}], "chosen": [{**APPLE, "tool_calls": []}], "rejected": [STONE]},
        {"prompt": str([ASKED]), "chosen": str([APPLE]), "rejected": str([STONE])},  # pandas' to_csv
        {"prompt": "Name a fruit.", "chosen": str([ASKED, APPLE]), "rejected": str([ASKED, STONE])},
        {"prompt": '[{"role": "user", "content": "Name a fruit."}]', **ANSWERS},
        {"prompt": "Name a fruit.", "chosen": '{"role": "assistant", "content": "An apple."}', "rejected": str(STONE)},
        {"prompt": "Name a fruit.", "tools": "[]", "images": [], **ANSWERS},
    ],
)  # fmt: skip
def test_the_layouts_of_other_trainers_are_the_same_pair(row: dict[str, Any]) -> None:
    assert good(**row) == good(prompt="Name a fruit.", **ANSWERS)
    assert good(**row).prompt == FRUIT


def test_system_texts_and_histories_come_before_the_prompt() -> None:
    system, red = Message("system", "Be brief."), "A red one?"
    turns = (system, *FRUIT, Message("assistant", "An apple."), Message("user", red))
    history = [["Name a fruit.", "An apple."]]
    assert good(instruction=red, history=history, system="Be brief.", **ANSWERS).prompt == turns
    assert good(prompt=[ASKED, APPLE, turn("user", red)], system="Be brief.", **ANSWERS).prompt == turns
    assert good(prompt="Name a fruit.", system="Be brief.", **ANSWERS).prompt == (system, *FRUIT)
    assert good(prompt="Name a fruit.", system="Be brief.", **WHOLE).prompt == (system, *FRUIT)
    told = {name: [turn("system", "Be brief."), *turns] for name, turns in WHOLE.items()}
    for more in ({}, {"prompt": "Name a fruit."}, {"prompt": [ASKED]}, {"system": "Be brief."}):
        assert good(**told, **more).prompt == (system, *FRUIT)
    assert "system: differs from the system message of `chosen`" in faults(system="Be long.", **told)
    assert "history: must be a list of [question, answer], not [['a']]" in faults(
        prompt="p", history=[["a"]], **ANSWERS
    )


def test_a_conversation_of_several_turns_beside_its_first_question() -> None:
    more = [ASKED, APPLE, turn("user", "A red one?")]
    pair = good(prompt="Name a fruit.", chosen=[*more, turn("assistant", "A cherry.")], rejected=[*more, STONE])
    assert [message.content for message in pair.prompt] == ["Name a fruit.", "An apple.", "A red one?"]
    assert (pair.chosen, pair.rejected) == ("A cherry.", "A stone.")
    sentence = (
        "f.jsonl:1: prompt: is no turn of the user in `chosen`: 'Name a bird.'; leave `prompt` out, or correct it"
    )
    assert sentence in faults(prompt="Name a bird.", **WHOLE)
    assert "must be the same conversation up to the last answer" in faults(
        prompt="Name a fruit.", chosen=[ASKED, APPLE], rejected=[turn("user", "Name a bird."), STONE]
    )


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": [ASKED], "chosen": [turn("assistant", "", tool_calls=[{"function": "f"}])], "rejected": "r"},
         "chosen[0].tool_calls: [{'function': 'f'}] would be left out of the text; write it into `content`"),
        ({"messages": [{**ASKED, "reasoning_content": "hm"}], **ANSWERS}, "messages[0].reasoning_content: 'hm' would"),
        ({"prompt": "p", "tools": [{"name": "f"}], **ANSWERS}, "tools: holds [{'name': 'f'}]; definitions of tools"),
        ({"prompt": "p", "images": ["a.png"], **ANSWERS}, "images: holds ['a.png']; only texts can be trained on"),
        ({"prompt": [turn("user", [{"type": "image"}, {"type": "text", "text": "p"}])], **ANSWERS},
         "prompt[0].content: must be a text"),
        ({"conversations": [sharegpt("observation", "p")], **ANSWERS}, "conversations[0].role: is 'observation'"),
        ({"question": "p", "messages": [ASKED], **ANSWERS}, "`messages` and `question` could be the prompt; rename"),
        ({"prompt": "p", "chosen": str([APPLE]), "rejected": "A stone."},
         "chosen: is the text of a list of messages, and the other answer is none; write both in the same way"),
        ({"prompt": "[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]", **ANSWERS},  # numpy's
         "prompt: begins as the text of a list of messages and cannot be read as one; save the data as JSON lines"),
        ({"prompt": "p", "chosen": f"array([{APPLE}], dtype=object)", "rejected": f"array([{STONE}], dtype=object)"},
         "chosen: begins as the text of a list of messages and cannot be read as one; save the data as JSON lines"),
    ],
)  # fmt: skip
def test_content_that_a_pair_cannot_hold_is_never_left_out_in_silence(row: dict[str, Any], sentence: str) -> None:
    assert f"f.jsonl:1: {sentence}" in faults(**row) or sentence in faults(**row)


@pytest.mark.parametrize(
    "text", ['{"a": 1}', "[1, 2]", '{"role": "user"}', '[{"role": "user", "content":', "{role: x}"]
)
def test_texts_about_json_stay_texts(text: str) -> None:
    pair = good(prompt="Write JSON.", chosen=text, rejected="no")
    assert pair.chosen == text


def test_notes_name_the_layout_and_every_field_that_nothing_reads() -> None:
    notes = RowNotes.none()
    row = {"user_id": "ana", "instruction": "a", "input": "b", "page": 3, "chosen": {**APPLE, "id": 4, "x": None}}
    assert isinstance(parse_row({**row, "rejected": "r"}, "f", 1, notes), PreferencePair)
    assert notes.unknown == {"page": 1, "chosen[].id": 1}
    assert notes.read_as == {"`instruction` and `input` as the prompt": 1}
    assert good(**{**row, "rejected": "r"}).prompt == (Message("user", "a\nb"),)
