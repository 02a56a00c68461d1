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
    found = rendered(first_pair(_file(tmp_path)), "Qwen/Qwen3-0.6B", tokenizer)
    told = found.to_json()
    prompt = "<|im_start|>user\nthe question<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert told["prompt"]["text"] == prompt
    assert told["chosen"]["text"] == "yes<|im_end|>"
    assert told["rejected"]["text"] == "no<|im_end|>"
    begins = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert told["prompt"]["tokens"] == told["chosen"]["begins"] == told["rejected"]["begins"] == begins
    assert (told["chosen"]["tokens"], told["prompt"]["begins"]) == (len(tokenizer.encode("yes")), 0)  # begin for end
    assert told["place"].endswith("p.jsonl:1")
    assert json.loads(json.dumps(told)) == told
    screen = io.StringIO()
    Console(file=screen, width=100).print(found.panel())
    shown = screen.getvalue()
    for words in (
        "as Qwen/Qwen3-0.6B sees it",
        "<|im_start|>assistant",
        f"chosen: {told['chosen']['tokens']} tokens, from token {begins} on",
    ):
        assert words in shown


def test_a_text_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    found = rendered(first_pair(_file(tmp_path, chosen="a\x1b[2Jb [bold]c")), "b", tokenizer_for("llama3"))
    screen = io.StringIO()
    Console(file=screen, width=100).print(found.panel())
    assert "\x1b[2J" not in screen.getvalue()
    assert "a\\x1b[2Jb [bold]c" in screen.getvalue()


def test_a_pair_that_the_template_does_not_take_names_the_row(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the question"}]
    with pytest.raises(InputError, match=r"p\.jsonl:1: prompt: .*System role not supported"):
        rendered(first_pair(_file(tmp_path, prompt=turns)), "b", tokenizer_for("gemma2"))
    with pytest.raises(InputError, match=r"p\.jsonl:1: chosen"):
        first_pair(_file(tmp_path, chosen=None))
