"""Rows in the published columns of each preference set; every text is made up."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def community(**change: Any) -> Row:
    """A conversation of two turns, as a row of filtered_community_alignment.csv."""
    row: Row = {"conversation_id": "c1", "assigned_lang": "en", "annotator_id": "w1", "annotator_country": "nowhere"}
    row |= {"first_turn_prompt": "Plan a walk.", "first_turn_preferred_response": "response_b"}
    row |= {f"first_turn_response_{letter}": f"walk {letter}<|end_of_text|>" for letter in "abcd"}
    row |= {"first_turn_feedback": "short", "second_turn_prompt": "And if it rains?"}
    row |= {f"second_turn_response_{letter}": f"rain {letter}" for letter in "abcd"}
    row |= {"second_turn_preferred_response": "response_d", "is_pregenerated_first_prompt": "True"}
    row |= {f"{turn}_turn_{part}": None for turn in ("third", "fourth") for part in ("prompt", "preferred_response")}
    return {**row, **change}


def prism(**change: Any) -> Row:
    """A conversation of two turns, as a row of conversations.jsonl."""

    def answer(turn: int, place: int, text: str, score: int, chosen: bool) -> Row:
        about = {"turn": turn, "role": "model", "within_turn_id": place, "model_name": "m", "model_provider": "p"}
        return {**about, "content": text, "score": score, "if_chosen": chosen}

    history = [
        {"turn": 0, "role": "user", "content": "Is tea good?"},
        answer(0, 0, "Yes.", 90, True),
        answer(0, 1, "No.", 12, False),
        answer(0, 2, "Perhaps.", 90, False),
        {"turn": 1, "role": "user", "content": "Why?"},
        answer(1, 0, "It warms.", 70, True),
        answer(1, 1, "It is wet.", 40, False),
    ]
    row: Row = {"conversation_id": "c7", "user_id": "user3", "conversation_type": "unguided"}
    row |= {"opening_prompt": "Is tea good?", "conversation_turns": 2, "conversation_history": history}
    return {**row, "generated_datetime": "2023-11-22T15:50:10", **change}


REWARD_MODELS = (
    "gemma_2b", "gemma_7b", "mistral_raft", "mistral_ray", "mistral_weqweasdas", "llama3_sfairx", "oasst_deberta_v3",
    "beaver_7b", "oasst_pythia_7b", "oasst_pythia_1b",
)  # fmt: skip


def personalllm(**change: Any) -> Row:
    """Eight answers with the scores of ten reward models; the scores of `gemma_2b` rise, and all others fall."""
    row: Row = {"prompt_id": 5, "subset": "s", "prompt": "Name a bird."}
    for answer in range(1, 9):
        row |= {f"response_{answer}": f"bird {answer}", f"response_{answer}_model": "m"}
        row |= {f"response_{answer}_{model}": -0.5 * answer for model in REWARD_MODELS}
        row[f"response_{answer}_gemma_2b"] = 0.5 * answer
    return {**row, **change}


def bench(**change: Any) -> Row:
    """A pair of PersonalRewardBench."""
    context = [
        {"role": "user", "content": "Hello"},
        {"role": "model", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    sides = {side: {"role": "model", "content": text} for side, text in (("chosen", "So long"), ("rejected", "Go"))}
    return {
        "user_id": "u4",
        "conversation_id": "c",
        "context": context,
        **sides,
        "split": "val",
        "flip": True,
        **change,
    }


def arena(**change: Any) -> Row:
    """A battle of Chatbot Arena."""

    def talk(answer: str) -> list[Row]:
        return [{"role": "user", "content": "Tell a joke."}, {"role": "assistant", "content": answer}]

    row: Row = {"question_id": "q9", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "arena_user_1"}
    row |= {"conversation_a": talk("A joke."), "conversation_b": talk("Another joke."), "turn": 1, "anony": True}
    return {**row, "language": "English", "tstamp": 1682351591.5, **change}


def tldr(**change: Any) -> Row:
    """A comparison of two summaries."""
    info = {"id": "t3_x", "post": "I lost a shoe.", "title": "Shoe", "subreddit": "shoes"}
    summaries = [{"text": " a shoe", "policy": "ref", "note": None}, {"text": " shoe lost", "policy": "s", "note": ""}]
    row: Row = {"info": info, "summaries": summaries, "choice": 1, "worker": "wk", "batch": "batch3"}
    return {**row, "split": "train", "extra": {"confidence": 8}, **change}


def hh(**change: Any) -> Row:
    """A pair of transcripts."""
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A fish?\n\nAssistant:"
    return {"chosen": f"{start} Cod.", "rejected": f"{start} Cow.", **change}


def ultra(**change: Any) -> Row:
    """Three completions with overall scores."""
    completions = [
        {"model": "m", "response": text, "overall_score": score, "annotations": {"honesty": {"Rating": "3"}}}
        for text, score in (("one", 6.5), ("two", 8.0), ("three", 7.0))
    ]
    return {"source": "flan", "instruction": "Count.", "models": ["m"], "completions": completions, **change}


def thumb(**change: Any) -> Row:
    """One answer with a thumb."""
    return {"user_id": "u1", "prompt": "A river?", "completion": "Rhine", "label": True, **change}


def rating(**change: Any) -> Row:
    """One answer with a rating."""
    return {"user_id": "u1", "prompt": "A river?", "response": "Rhine", "rating": 4, **change}


def trl(**change: Any) -> Row:
    """A pair of TRL with a user column."""
    return {"user_id": "u1", "prompt": "A river?", "chosen": "Rhine", "rejected": "Rome", "score_chosen": 1, **change}


def studio(**change: Any) -> Row:
    """A task with annotations of two people, one of whom skipped it."""

    def annotation(user: Any, selected: str, **more: Any) -> Row:
        pairwise = {"id": "r", "from_name": "pw", "to_name": "left,right", "type": "pairwise"}
        reason = {"id": "s", "from_name": "why", "to_name": "left", "type": "textarea", "value": {"text": ["clear"]}}
        result = [reason, {**pairwise, "value": {"selected": selected}}]
        return {"id": 3, "completed_by": user, "result": result, "created_at": "2026-03-09T22:16:08.728353Z", **more}

    annotations = [annotation(10, "left"), annotation({"id": 11, "email": "x@example.org"}, "right")]
    annotations.append({"id": 4, "completed_by": 12, "result": [], "was_cancelled": True})
    data = {"prompt": "A river?", "left": "Rhine", "right": "Rome"}
    return {"id": 1, "data": data, "annotations": annotations, "predictions": [], "project": 8, **change}


def argilla(**change: Any) -> Row:
    """A record with the rankings of two people."""
    fields = {"prompt": "A river?", "response_a": "Rhine", "response_b": "Rome", "response_c": "Po"}
    rankings = [
        {"value": ["response_c", "response_a", "response_b"], "user_id": "7f"},
        {"value": [{"value": "response_b", "rank": 2}, {"value": "response_a", "rank": 1}], "user_id": "8f"},
    ]
    responses = {"ranking": rankings, "comment": [{"value": "good", "user_id": "7f"}]}
    row: Row = {"id": "r1", "fields": fields, "metadata": {}, "suggestions": {}, "responses": responses, "vectors": {}}
    return {**row, "_server_id": None, **change}


ROWS: dict[str, list[Row]] = {
    "community-alignment": [community()],
    "prism": [prism()],
    "personalllm": [personalllm()],
    "personal-reward-bench": [bench()],
    "arena": [arena()],
    "tldr": [tldr()],
    "hh-rlhf": [hh()],
    "ultrafeedback": [ultra()],
    "kto": [thumb(), thumb(user_id="u2"), thumb(completion="Rome", label=False), thumb(user_id="u2", label=False)],
    "ratings": [rating(), rating(response="Rome", rating="2"), rating(response="Po", rating=3.5)],
    "trl": [trl()],
    "label-studio": [studio()],
    "argilla": [argilla()],
}
