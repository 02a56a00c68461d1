from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.files import slug
from persona_rlhf.data.feedback import LEDGER
from persona_rlhf.data.pairs import Message, read_pairs
from persona_rlhf.release.results import PairCounts, skipped
from persona_rlhf.release.verify import verify
from persona_rlhf.serving.chat import Chat, ChatTerminal
from persona_rlhf.serving.openai_api import AdmittedAdapter, APIError, TextChunk, Usage
from persona_rlhf.serving.policy_filter import PolicyFilter

USER = skipped("Ada", "", PairCounts(0, 0, 0))
ADAPTER = AdmittedAdapter(USER, Path("adapters"), "")


class Counting:
    """A generator whose answers are numbered; the last words of the question are in them."""

    def __init__(self):
        self.requests = []

    def generate(self, adapter, messages, sampling):
        self.requests.append((None if adapter is None else adapter.slug, messages, sampling))
        if messages[-1].content == "too long":
            raise APIError(400, "The messages are too long.", "context_length_exceeded")
        last = "same" if messages[-1].content == "same" else f"answer {len(self.requests)}"
        return iter(
            [TextChunk(f"{'base' if adapter is None else 'own'} "), TextChunk(last), TextChunk("", "stop", Usage(1, 1))]
        )


@pytest.fixture
def talk(tmp_path):
    """Types lines; what was written, shown and noted."""

    def talk(*lines, compare=False, terminal=False, policy_filter=None):
        generator, shown, notes = Counting(), io.StringIO(), []
        console = Console(file=shown, force_terminal=terminal, width=80)
        policy_filter = policy_filter or PolicyFilter()
        terminal = ChatTerminal(console)
        chat = Chat(tmp_path, USER, lambda _: ADAPTER, generator, policy_filter, terminal, notes.append, 9, compare)
        chat.run(iter(f"{line}\n" for line in lines))
        return generator.requests, shown.getvalue(), notes

    return talk


def saved(folder):
    return read_pairs(folder / LEDGER, 0.0) if (folder / LEDGER).exists() else []


def test_a_conversation_goes_on_with_the_users_answers(talk):
    requests, shown, notes = talk("hello", "", "  and now?  ", "/quit", "never requests")
    assert [model for model, _, _ in requests] == [slug("Ada")] * 2
    assert requests[1][1] == (
        Message("user", "hello"),
        Message("assistant", "own answer 1"),
        Message("user", "and now?"),
    )
    assert shown == "Ada> own answer 1\nAda> own answer 2\n"
    assert requests[0][2].temperature == 0
    assert notes == []


@pytest.mark.parametrize(("command", "chosen"), [("/pair", 1), ("/pair 2", 1), ("/pair 1", 0)])
def test_a_second_answer_and_the_better_of_the_two(talk, tmp_path, command, chosen):
    requests, _, notes = talk("hello", "/retry", command, command, "go on")
    answers = ["own answer 1", "own answer 2"]
    assert requests[1][2].temperature > 0
    assert requests[1][1] == requests[0][1]
    [pair] = saved(tmp_path)
    assert (pair.user_id, pair.prompt, pair.source) == ("Ada", (Message("user", "hello"),), "chat")
    assert (pair.chosen, pair.rejected) == (answers[chosen], answers[1 - chosen])
    assert requests[2][1][1] == Message("assistant", answers[chosen])
    assert "Saved" in notes[0]
    assert "no two answers" in notes[1]


def test_seconds_answers_differ_from_each_other(talk):
    requests, _, _ = talk("hello", "/retry", "/retry")
    assert requests[1][2].seed != requests[2][2].seed


@pytest.mark.parametrize("terminal", [False, True])
def test_beside_the_base_the_better_one_must_be_named(talk, tmp_path, terminal):
    requests, shown, notes = talk("hello", "/pair", "/pair 3", "/pair 2", compare=True, terminal=terminal)
    assert [model for model, _, _ in requests] == [slug("Ada"), None]
    assert "own answer 1" in shown
    assert "base answer 2" in shown
    assert notes[:2] == ["Say which answer is better: /pair 1 or /pair 2."] * 2
    [pair] = saved(tmp_path)
    assert (pair.chosen, pair.rejected) == ("base answer 2", "own answer 1")


def test_what_cannot_be_done_is_said_and_the_chat_goes_on(talk, tmp_path):
    requests, _, notes = talk("/retry", "/pair", "/dance", "too long", "hello", "too long", "same", "/retry", "/pair")
    assert notes[0].startswith("There is no answer yet")
    assert notes[1].startswith("There are no two answers")
    assert notes[2].startswith("There is no command /dance")
    assert notes[3] == notes[4] == "The messages are too long."
    assert notes[5] == "The two answers are the same; nothing is saved."
    assert [message.content for message in requests[-1][1]] == ["hello", "own answer 2", "same"]
    assert saved(tmp_path) == []


def test_the_policy_looks_at_answers_here_too(talk):
    policy_filter = PolicyFilter(
        lambda user_id: "Be kind.", None, lambda prompt, answer: ["rule"] * answer.startswith("own")
    )
    requests, shown, _ = talk("hello", policy_filter=policy_filter)
    assert shown == "Ada> base answer 2\n"
    assert requests[0][1][0] == Message("system", "Be kind.")


def test_an_answer_does_not_move_the_cursor():
    shown = io.StringIO()
    screen = ChatTerminal(Console(file=shown, force_terminal=False))
    evil = "a\x1b[2Jb\x07\x9bc\r[bold]d[/bold]\ne"
    assert screen.show({"x\x1b": iter([TextChunk(evil, "stop")])}) == [evil]
    assert shown.getvalue() == "x\ufffd> a\ufffd[2Jb\ufffd\ufffdc\ufffd[bold]d[/bold]\ne\n"


def test_chat_with_a_released_adapter_through_the_command_line(served_run):
    lines = "w5 w6\n/retry\n/pair\n/quit\n"
    words = ["chat", str(served_run.path), "--user", "Ada", "--compare", "base", "--max-tokens", "6"]
    done = CliRunner().invoke(app.app, words, input=lines)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("Ada> ") == 2
    assert done.stdout.count("the base> ") == 1
    [pair] = saved(served_run.path)
    assert pair.prompt == (Message("user", "w5 w6"),)
    assert not [fault for fault in verify(served_run.path) if LEDGER in fault]  # the run's seal knows that it grows
    refused = CliRunner().invoke(app.app, ["chat", str(served_run.path), "--user", "nan"], input=lines)
    assert refused.exit_code == 3
    assert "not released" in refused.stderr
    assert CliRunner().invoke(app.app, ["chat", str(served_run.path), "--user", "nobody"]).exit_code == 2
