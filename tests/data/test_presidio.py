"""`screening.presidio`: names by a spaCy pipeline, beside the kinds that have a form of their own.

The first tests need no Presidio. The others make a small pipeline, and are skipped where the extra `[pii]` is missing.
"""

from __future__ import annotations

import importlib.util
import socket
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import ScreeningSettings
from persona_rlhf.data.personal_data import PersonalDatum, masked, treat
from persona_rlhf.data.presidio import Presidio
from tests.data.test_personal_data import _pair

needs_presidio = pytest.mark.skipif(
    importlib.util.find_spec("presidio_analyzer") is None, reason="needs presidio-analyzer: pip install '.[pii]'"
)


def ada(text: str) -> list[PersonalDatum]:
    """A finder of one name, and of all digits."""
    place = text.find("Ada")
    digits = [PersonalDatum("number", n, n + 1) for n, letter in enumerate(text) if letter.isdigit()]
    return [*digits, *([PersonalDatum("person", place, place + 3)] if place >= 0 else [])]


def test_another_finder_adds_to_the_forms_and_overrules_none() -> None:
    assert masked("Ada: +44 20 7946 0958, 7", ada) == "[person]: [phone number], [number]"
    assert masked("Ada: +44 20 7946 0958, 7") == "Ada: [phone number], 7"


def test_a_pair_with_a_name_is_masked_and_the_finding_repeats_none() -> None:
    pair = _pair("Who is Ada?", "A person.", "Ada it is.")
    [finding] = treat([pair], "mask", ada).findings
    assert (finding.pair.prompt[0].content, finding.pair.rejected) == ("Who is [person]?", "[person] it is.")
    assert finding.reason == "personal data: person in `prompt`; person in `rejected`"
    assert treat([pair], "drop", ada).pairs == []
    assert treat([pair], "mask").pairs == [pair]


def test_a_finder_without_a_use_is_a_mistake() -> None:
    with pytest.raises(ValidationError, match="mask or drop it"):
        ScreeningSettings(presidio="en_core_web_sm")
    assert ScreeningSettings(presidio="en_core_web_sm", personal_data="mask").presidio == "en_core_web_sm"


def test_without_presidio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(InputError, match=r"persona-rlhf\[pii\]"):
        Presidio("en_core_web_sm")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    import spacy

    nlp = spacy.blank("en")
    patterns = [{"label": "PERSON", "pattern": "Ada Lovelace"}, {"label": "GPE", "pattern": "Paris"}]
    nlp.add_pipe("entity_ruler").add_patterns(patterns)
    folder = tmp_path_factory.mktemp("pipeline") / "en"
    nlp.to_disk(folder)
    return str(folder)


@needs_presidio
def test_names_and_numbers_are_found_without_the_network(pipeline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    presidio = Presidio(pipeline)
    text = "Ada Lovelace of Paris, ada@mail.example.org, wallet 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa, on www.example.org."
    assert masked(text, presidio) == "[person] of Paris, [email], wallet [crypto], on www.example.org."
    assert masked("In 1984, 12345678 people came at 192.168.0.1.", presidio) == (
        "In 1984, 12345678 people came at 192.168.0.1."
    )


@needs_presidio
@pytest.mark.parametrize("name", ["no_such_pipeline", "folder", "damaged"])
def test_a_pipeline_that_cannot_be_used_is_named(tmp_path: Path, pipeline: str, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/meta.json").write_text("{")
    with pytest.raises(InputError, match=name):
        Presidio(name if name.startswith("no") else str(tmp_path / name))
