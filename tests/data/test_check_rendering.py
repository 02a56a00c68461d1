from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.check import first_pair, rendered
from tests.data.families import tokenizer_for


def _file(tmp_path: Path, **row: object) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"user_id": "u", "prompt": "the question", "chosen": "yes", "rejected": "no", **row}))
    return path


def test_a_pair_is_shown_as_the_model_sees_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_for("qwen3")
    view = rendered(first_pair(_file(tmp_path)), "Qwen/Qwen3-0.6B", tokenizer)
    content = view.to_json()
    prompt = "<|im_start|>user\nthe question<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert content["prompt"]["text"] == prompt
    assert content["chosen"]["text"] == "yes<|im_end|>"
    assert content["rejected"]["text"] == "no<|im_end|>"
    begins = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert content["prompt"]["tokens"] == content["chosen"]["begins"] == content["rejected"]["begins"] == begins
    assert (content["chosen"]["tokens"], content["prompt"]["begins"]) == (
        len(tokenizer.encode("yes")),
        0,
    )
    assert content["place"].endswith("p.jsonl:1")
    assert json.loads(json.dumps(content)) == content
    screen = io.StringIO()
    Console(file=screen, width=100).print(view.panel())
    shown = screen.getvalue()
    for words in (
        "as Qwen/Qwen3-0.6B sees it",
        "<|im_start|>assistant",
        f"chosen: {content['chosen']['tokens']} tokens, from token {begins} on",
    ):
        assert words in shown


def test_a_text_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    view = rendered(first_pair(_file(tmp_path, chosen="a\x1b[2Jb [bold]c")), "b", tokenizer_for("llama3"))
    screen = io.StringIO()
    Console(file=screen, width=100).print(view.panel())
    assert "\x1b[2J" not in screen.getvalue()
    assert "a\\x1b[2Jb [bold]c" in screen.getvalue()


def test_a_pair_that_the_template_does_not_take_names_the_row(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the question"}]
    with pytest.raises(InputError, match=r"p\.jsonl:1: prompt: .*System role not supported"):
        rendered(first_pair(_file(tmp_path, prompt=turns)), "b", tokenizer_for("gemma2"))
    with pytest.raises(InputError, match=r"p\.jsonl:1: chosen"):
        first_pair(_file(tmp_path, chosen=None))
