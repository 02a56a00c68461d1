"""The config of an experiment: one YAML file, `a.b=c` overrides, and every mistake in both at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from persona_rlhf.evaluation.settings import EvaluationSettings, GateSettings, RedTeamSettings
from persona_rlhf.inputs.bundled import find
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.inputs.section import S, Section, check_section, in_order
from persona_rlhf.inputs.yaml_text import Document, KeyPath, Place, Tree, dump_yaml, parse_yaml, read_yaml
from persona_rlhf.policy.settings import PolicySettings
from persona_rlhf.preferences.settings import ScreeningSettings, UsersSettings
from persona_rlhf.release.settings import ReleaseSettings, RunSettings
from persona_rlhf.training.settings import BaseSettings, ConstraintSettings, DpoSettings, FleetSettings, LoraSettings


class Config(Section):
    """A whole experiment. Each section sits beside the code it turns; only the CLI and the line see them together."""

    name: str = Field(min_length=1, pattern=r"^\w[\w.-]*$", description="Name of the experiment; names the run folder.")
    seed: int = Field(0, ge=0, lt=2**63, description="Root of every random choice; each user draws from it and his id.")
    base: BaseSettings
    policy: PolicySettings
    users: UsersSettings
    screening: ScreeningSettings = ScreeningSettings()
    lora: LoraSettings = LoraSettings()
    dpo: DpoSettings = DpoSettings()
    constraint: ConstraintSettings = ConstraintSettings()
    gate: GateSettings = GateSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    redteam: RedTeamSettings = RedTeamSettings()
    fleet: FleetSettings = FleetSettings()
    release: ReleaseSettings = ReleaseSettings()
    run: RunSettings = RunSettings()

    @property
    def run_dir(self) -> Path:
        """The folder of the run, where the command line names none."""
        return self.run.dir or Path("runs") / self.name

    def to_yaml(self) -> str:
        """The config with every default written out; reading it back gives the same config."""
        return dump_yaml(self.model_dump(mode="json"))


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file (here, or shipped) with its overrides. Raises InputError with every problem of both."""
    return checked(Config, read_yaml(find(path)), overrides)


def checked(kind: type[S], document: Document, overrides: Sequence[str]) -> S:
    """A document with overrides, as a section of this kind. Raises InputError with every problem of both."""
    problems = list(document.problems)
    for override in overrides:
        problems += _override(document, override)
    found, faults = check_section(kind, document)
    problems += faults
    if found is None or problems:
        raise InputError(in_order(problems))
    return found


def _override(document: Document, override: str) -> list[Problem]:
    """Writes `a.b=c` into the document as YAML would have read `c` there; its place is the override itself."""
    name = f"override {override}"
    dotted_key, equals, text = override.partition("=")
    keys = dotted_key.strip().split(".")
    if not equals or not all(keys):
        return [Problem(name, None, None, "an override reads section.key=value, such as dpo.epochs=2")]
    try:
        value = parse_yaml(text, name)
    except InputError as fault:
        return [problem._replace(line=None) for problem in fault.problems]
    node: Tree = document.tree
    for depth, key in enumerate(keys[:-1], 1):
        assert isinstance(node, dict)
        if not isinstance(node.get(key), dict):
            node[key] = {}
            document.places[tuple(keys[:depth])] = Place(name, None)
        node = node[key]
    assert isinstance(node, dict)
    node[keys[-1]] = value.tree
    path: KeyPath = tuple(keys)
    for below in [place for place in document.places if place[: len(path)] == path]:
        del document.places[below]
    document.places[path] = Place(name, None)
    return [problem._replace(line=None) for problem in value.problems]
