"""Personal data that Presidio finds: people's names by a spaCy pipeline of the caller's, and numbers of more countries.

Nothing is downloaded. Presidio's recognizers of mail and web addresses are left out: they fetch a list of domains from
the network, and `personal_data` finds mail addresses itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.data.personal_data import PersonalDatum

_LEAST_SCORE = 0.4  # of a finding: Presidio gives this much to a phone number, and less to numbers of no sure form
_LEFT_OUT = ("EmailRecognizer", "UrlRecognizer", "IpRecognizer", "DateRecognizer")
_NOBODY = frozenset({"LOCATION", "DATE_TIME", "NRP", "ORGANIZATION", "URL"})  # such words name no person
_LONGEST_TEXT = 100_000_000  # characters


class Presidio:
    """The finder. `pipeline` is a spaCy pipeline: an installed package, or a folder."""

    def __init__(self, pipeline: str) -> None:
        """Loads the pipeline, in seconds. Raises InputError where Presidio or the pipeline is missing."""
        try:
            import spacy
            from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
            from presidio_analyzer.nlp_engine import SpacyNlpEngine
        except ImportError as fault:
            raise _problem(f"Presidio is not installed ({fault}): pip install 'persona-rlhf[pii]'") from fault
        if not (spacy.util.is_package(pipeline) or (Path(pipeline) / "meta.json").is_file()):
            raise _problem(f"`{pipeline}` is neither an installed spaCy pipeline nor the folder of one")
        try:
            nlp = spacy.load(pipeline)
        except Exception as fault:  # a pipeline's own code may raise anything
            sentence = f"the spaCy pipeline `{pipeline}` cannot be loaded ({type(fault).__name__}: {fault})"
            raise _problem(sentence) from fault
        nlp.max_length = _LONGEST_TEXT
        engine = SpacyNlpEngine()
        engine.nlp = {nlp.lang: nlp}
        registry = RecognizerRegistry(supported_languages=[nlp.lang])
        registry.load_predefined_recognizers(languages=[nlp.lang], nlp_engine=engine)
        for name in _LEFT_OUT:
            registry.remove_recognizer(name)
        self._language = nlp.lang
        self._analyzer = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[nlp.lang])
        kinds = self._analyzer.get_supported_entities(nlp.lang)
        self._entities = sorted(set(kinds) - _NOBODY)

    def __call__(self, text: str) -> Iterable[PersonalDatum]:
        """The places that Presidio is sure enough of, the surest first."""
        places: list[Any] = self._analyzer.analyze(
            text, language=self._language, entities=self._entities, score_threshold=_LEAST_SCORE
        )
        for place in sorted(places, key=lambda place: (-place.score, place.start)):
            yield PersonalDatum(place.entity_type.lower().replace("_", " "), place.start, place.end)


def _problem(sentence: str) -> InputError:
    return InputError([Problem("config", None, "screening.presidio", sentence)])
