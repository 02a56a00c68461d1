"""`forget` and what `serve` and `export --hub` put outside the run: taken out, or named, and the local part first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.files import pseudonym, slug
from persona_rlhf.pipeline.forget_user import forget
from persona_rlhf.release.deletion_records import proof_file
from persona_rlhf.release.engine_layout import write_layout
from persona_rlhf.release.hub import LocalAdapter, repository_uploads, upload, uploads_of
from persona_rlhf.release.results import read_results
from persona_rlhf.release.served_places import SERVED, note_place, served_places
from persona_rlhf.release.verify import verify
from persona_rlhf.serving.access import make_tokens, read_tokens
from tests.pipeline.test_forget_user import ID, base, held, planted, run, write_choices  # noqa: F401  # fixtures
from tests.release.conftest import hub  # noqa: F401  # a fixture
from tests.release.hub_server import Fault


def test_a_ledger_outside_loses_the_user_or_is_named(planted, tmp_path):
    for name in ("here", "gone"):
        (tmp_path / name).mkdir()
        write_choices(tmp_path / name / "choices.db")
        note_place(planted, "ledger", tmp_path / name / "choices.db")
    (tmp_path / "gone/choices.db").rename(tmp_path / "elsewhere.db")
    done = forget(planted, ID)
    assert done is not None
    assert held(tmp_path / "here") == {}
    assert {"path": "(outside the run)", "what": "choices", "count": 4} in done.content["removed"]
    assert [what for what in done.content["remains"] if "ledger" in what] == ["a ledger of choices"]
    assert any(f"{tmp_path / 'gone/choices.db'} has, or had, choices" in sentence for sentence in done.remains)
    assert not (tmp_path / "gone/choices.db").exists()


@pytest.fixture
def served(planted, tmp_path) -> tuple[Path, Path]:
    """A token file and an engine's layout, noted in the run."""
    released = {one.slug: planted / one.path for one in read_results(planted) if one.path is not None}
    tokens, layout = tmp_path / "served/tokens.jsonl", tmp_path / "served/layout"
    tokens.parent.mkdir()
    make_tokens(tokens, released)
    write_layout(layout, "owner/base", 4, released, "127.0.0.1", 8001)
    note_place(planted, "tokens", tokens)
    note_place(planted, "layout", layout)
    note_place(planted, "engine", "http://10.0.0.5:8001")
    return tokens, layout


def test_tokens_and_layouts_lose_the_user_and_engines_are_named(planted, served):
    tokens, layout = served
    others = read_tokens(tokens).slugs - {slug(ID)}
    assert slug(ID) in read_tokens(tokens).slugs
    assert held(tokens.parent)
    done = forget(planted, ID)
    assert done is not None
    assert held(tokens.parent) == {}
    assert read_tokens(tokens).slugs == others
    assert tokens.stat().st_mode & 0o777 == 0o600
    places = {(piece["path"], piece["what"]) for piece in done.content["removed"]}
    assert places >= {("(outside the run)", "tokens"), ("(outside the run)", "adapters of an engine's layout")}
    assert "an engine's memory" in done.content["remains"]
    assert any("http://10.0.0.5:8001 may hold the adapter in its memory" in sentence for sentence in done.remains)
    assert any(f"started from {layout}" in sentence for sentence in done.remains)
    assert not any("token file" in what for what in done.content["remains"])
    assert held(planted) == {}
    assert verify(planted) == []


def test_a_place_that_cannot_be_reached_is_named_and_stops_nothing(planted, served):
    tokens, layout = served
    tokens.rename(tokens.with_name("moved"))
    (layout / "adapters.json").write_text("no list")
    done = forget(planted, ID)
    assert done is not None
    assert {"a token file", "an engine's layout"} <= set(done.content["remains"])
    assert any(str(tokens) in sentence for sentence in done.remains)
    assert any(str(layout) in sentence and "delete it" in sentence for sentence in done.remains)
    assert str(tokens.parent) not in json.dumps(done.content)


def test_a_file_that_may_not_be_written_is_named(planted, served, monkeypatch):
    from persona_rlhf.release import served_places as module

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "atomic_write", forbidden)
    done = forget(planted, ID)
    assert done is not None
    assert "a token file" in done.content["remains"]


def test_a_place_is_noted_once(planted, served):
    before = (planted / SERVED).read_bytes()
    assert note_place(planted, "tokens", served[0]) is None
    assert (planted / SERVED).read_bytes() == before
    assert len(served_places(planted)) == 3


def test_a_hub_that_does_not_answer_keeps_nothing_local_and_is_asked_again(planted, hub):
    [one] = [one for one in read_results(planted) if one.user_id == ID]
    [parcel] = repository_uploads(
        "ada/one", [LocalAdapter(ID, planted / str(one.path))], shared=False, per_user=False, revision="main"
    )
    upload(planted, parcel, False, lambda _: None)
    hub.faults += [Fault(".", 503)] * 60
    done = CliRunner().invoke(app, ["forget", str(planted), "--user", ID])
    assert done.exit_code == 3, done.output
    assert "is forgotten:" in done.stderr
    assert "Not deleted from the hub: " in done.stderr
    assert held(planted) == {}
    assert verify(planted) == []
    assert "an upload" in json.loads(proof_file(planted, pseudonym(ID)).read_bytes())["remains"]
    assert uploads_of(planted, pseudonym(ID))
    hub.faults.clear()
    again = CliRunner().invoke(app, ["forget", str(planted), "--user", "ada"])  # that of another user sees to it too
    assert again.exit_code == 0, again.output
    assert "ada/one: the adapter is deleted" in again.stderr
    assert uploads_of(planted, pseudonym(ID)) == []
    assert verify(planted) == []
