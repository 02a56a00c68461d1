"""The config of an experiment: one YAML file, `a.b=c` overrides, every mistake in both at once; and `init`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import DataPath, ExistingPath, ModelName, atomic_folder, find, shipped_root
from persona_rlhf.config.evaluation import EvaluationSettings, GateSettings, RedTeamSettings
from persona_rlhf.config.loader import (
    KeyPath,
    S,
    Section,
    SourceLocation,
    Tree,
    YamlDocument,
    check_section,
    dump_yaml,
    in_order,
    parse_yaml,
    read_yaml,
)
from persona_rlhf.config.retired import RETIRED, add_missing, remove_retired, retired_problems
from persona_rlhf.config.training import (
    BaseSettings,
    BasisSettings,
    ConstraintSettings,
    DpoSettings,
    FleetSettings,
    LoraSettings,
)


class PolicySettings(Section):
    """`policy`: the rules that training and the gate hold every user's adapter to."""

    documents: list[ExistingPath] = Field(
        min_length=1, description="Policy documents: exactly one of tier one, and those of tiers two and three."
    )
    private_banks: Annotated[Path, Field(strict=False)] | None = Field(
        None,
        description="Advanced: folder outside every repository with banks CATEGORY.jsonl; a draw of them certifies in "
        "place of the documents' `certify` probes, which everybody can read.",
    )
    split_key: Annotated[Path, Field(strict=False)] | None = Field(
        None,
        description="Advanced: file outside every repository with a secret key that splits the documents' probes, but "
        "for `train`, anew. The key itself is never copied.",
    )


class UsersSettings(Section):
    """`users`: the preference pairs of all users."""

    path: DataPath = Field(description="A file of pairs, a folder of such files, or a hub id; rows name their user_id.")
    heldout: float = Field(
        0.25, ge=0, lt=1, description="Share of a user's prompts never trained on, where rows state no split."
    )
    start: ExistingPath | None = Field(
        None,
        description="Advanced: folder of a plain LoRA adapter (PEFT, TRL, Unsloth) that every user begins with; the "
        "reference stays the bare base.",
    )


class GuardSettings(Section):
    """`screening.classifier`: a safety model that calls requests safe or unsafe, with Llama Guard 3's hazard codes."""

    model: ModelName = Field(description="A transformers folder or a hub id, such as meta-llama/Llama-Guard-3-1B.")
    template: ExistingPath | None = Field(
        None, description="Advanced: file of its prompt with {prompt}; without it, its chat template is used."
    )
    unsafe: str = Field(
        "\n\nunsafe", min_length=1, description="Advanced: its text for a forbidden request; codes follow."
    )
    safe: str = Field("\n\nsafe", min_length=1, description="Advanced: its text for a harmless one.")


class PatternSettings(Section):
    """`screening.patterns`: shares of a user's choices from which on they are reported; nothing is left out for them.

    A user is reported if the share is above the limit with confidence 1 - `level`.
    """

    place: float | None = Field(
        0.8, gt=0, lt=1, description="Advanced: share of choices at the same place (column `place`); null reports none."
    )
    longer: float | None = Field(
        0.9,
        gt=0,
        lt=1,
        description="Advanced: share of choices of the longer answer, in characters; null reports none.",
    )
    changed: float | None = Field(
        0.35,
        gt=0,
        lt=1,
        description="Advanced: share of repeated pairs that are answered otherwise; null reports none.",
    )
    level: float = Field(
        0.05, gt=0, lt=1, description="Advanced: chance of error of the bound of each share, per user."
    )


class ScreeningSettings(Section):
    """`screening`: which requests count as forbidden, and whether pairs that prefer complying with them are trained on.

    A prompt that is a probe of the policy is always forbidden. The classifiers below add to that.
    """

    quarantine: bool = Field(
        True, description="Keep pairs that prefer complying with such requests out of training; off for ablations."
    )
    base: Literal["answer", "likelihood", "off"] = Field(
        "answer",
        description="Advanced: how the base's refusals are found: by its answer, or by their likelihood.",
    )
    rules: ExistingPath | None = Field(
        None,
        description="Advanced: YAML of patterns of forbidden requests by category (data/policy/screen.yaml).",
    )
    classifier: GuardSettings | None = Field(None, description="A safety model whose categories map onto the policy's.")
    patterns: PatternSettings = Field(
        PatternSettings(), description="Choices by place or length, and changed ones, that `data screen` reports."
    )
    personal_data: Literal["keep", "mask", "drop"] = Field(
        "keep",
        description="Advanced: addresses and numbers that name a person: keep them, mask them, or drop their pairs.",
    )
    presidio: str | None = Field(
        None,
        min_length=1,
        description="Advanced: spaCy pipeline (package or folder) with which Presidio also finds names; extra `[pii]`.",
    )
    reviews: ExistingPath | None = Field(
        None,
        description="Advanced: an earlier run's decisions about quarantined pairs (RUN/reviews.jsonl).",
    )

    @field_validator("presidio")
    @classmethod
    def _has_a_use(cls, pipeline: str | None, info: Any) -> str | None:
        if pipeline is not None and info.data.get("personal_data") == "keep":
            raise ValueError("it finds personal data, and `personal_data: keep` trains on it; mask or drop it")
        return pipeline

    @property
    def files(self) -> list[Path]:
        """Files named here whose contents decide which pairs are screened out."""
        template = None if self.classifier is None else self.classifier.template
        return [file for file in (self.rules, template, self.reviews) if file is not None]


class RunSettings(Section):
    """`run`: the folder of a run, and the experiment trackers that follow it."""

    dir: Annotated[Path, Field(strict=False)] | None = Field(
        None, description="Folder that the run is written to; runs/NAME by default, and --run goes before it."
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        [],
        description="Advanced: experiment trackers that get the curves of a one-process run; install their packages.",
    )


class ReleaseSettings(Section):
    """`release`: facts on an adapter's card and manifest that no measurement gives."""

    signing_key: ExistingPath | None = Field(
        None,
        description="Advanced: private key (PEM, by `policy keygen`) that signs every manifest; it is never copied.",
    )
    license: str = Field(
        "other",
        pattern=r"^[a-z0-9][a-z0-9.+-]{0,63}$",
        description="Advanced: license of the adapters, by the hub's name; other grants no license.",
    )


class Config(Section):
    """A whole experiment. Each section goes to the code that it configures; only the CLI and the pipeline see all."""

    name: str = Field(min_length=1, pattern=r"^\w[\w.-]*$", description="Name of the experiment; names the run folder.")
    seed: int = Field(
        0, ge=0, lt=2**63, description="Root of every random choice; a user's choices depend on it and the user id."
    )
    base: BaseSettings
    policy: PolicySettings
    users: UsersSettings
    screening: ScreeningSettings = ScreeningSettings()
    lora: LoraSettings = LoraSettings()
    dpo: DpoSettings = DpoSettings()
    basis: BasisSettings | None = Field(None, description="A reward that users share, for few pairs; null is none.")
    constraint: ConstraintSettings = ConstraintSettings()
    gate: GateSettings = GateSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    redteam: RedTeamSettings = RedTeamSettings()
    fleet: FleetSettings = FleetSettings()
    release: ReleaseSettings = ReleaseSettings()
    run: RunSettings = RunSettings()

    @property
    def run_dir(self) -> Path:
        """The folder of the run if the command line names none."""
        return self.run.dir or Path("runs") / self.name

    @property
    def judged_base(self) -> BaseSettings:
        """The base as the gate judges it, and as it is served: in `gate.dtype`."""
        return self.base if self.gate.dtype is None else self.base.model_copy(update={"dtype": self.gate.dtype})

    def to_yaml(self) -> str:
        """The config with every default written out; reading it back gives the same config."""
        return dump_yaml(self.model_dump(mode="json"))


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file (here, or shipped) with its overrides. Raises InputError with every problem of both."""
    return checked(Config, read_yaml(find(path)), overrides)


def read_run_config(run: Path, overrides: Sequence[str] = (), *, exact: str | None = None) -> Config:
    """Reads the config that a run was trained with, also one of an earlier version (`config/retired.py`).

    `exact` is the prefix of keys that must mean today what they meant for the run: "" (all keys) where users are to be
    trained as the run's were, "gate." where its adapters are to be judged again. Raises InputError with every problem,
    and where the run set such a key, retired since, to another value than the one that is fixed today.
    """
    document = read_yaml(run / "config.yaml")
    retired = remove_retired(document.tree)
    add_missing(document.tree)
    document.problems.extend(
        Problem(
            document.name,
            document.place(tuple(removed.key.split("."))).line,
            removed.key,
            f"this run was trained with {removed.value}, and the value is fixed to {RETIRED[removed.key]} since 0.2; "
            "use the version that wrote the run, or train a new run",
        )
        for removed in retired
        if exact is not None and removed.key.startswith(exact) and not removed.is_fixed_value
    )
    return checked(Config, document, overrides)


def checked(kind: type[S], document: YamlDocument, overrides: Sequence[str]) -> S:
    """A document with overrides, as a section of this kind. Raises InputError with every problem of both."""
    problems = list(document.problems)
    for override in overrides:
        problems += _override(document, override)
    if kind is Config:
        problems += retired_problems(document)
    section, faults = check_section(kind, document)
    problems += faults
    if section is None or problems:
        raise InputError(in_order(problems))
    return section


def _override(document: YamlDocument, override: str) -> list[Problem]:
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
            document.places[tuple(keys[:depth])] = SourceLocation(name, None)
        node = node[key]
    assert isinstance(node, dict)
    node[keys[-1]] = value.tree
    path: KeyPath = tuple(keys)
    for below in [place for place in document.places if place[: len(path)] == path]:
        del document.places[below]
    document.places[path] = SourceLocation(name, None)
    return [problem._replace(line=None) for problem in value.problems]


_USERS = 4


def scaffold(folder: Path) -> None:
    """Writes the experiment into a new or empty folder, whole or not at all. Raises InputError for any other."""
    shipped = shipped_root()
    with atomic_folder(folder, replace=False) as draft:
        (draft / "policy").mkdir()
        for document in sorted((shipped / "configs" / "policy").glob("tier_*.yaml")):
            shutil.copyfile(document, draft / "policy" / document.name)
        (draft / "users").mkdir()
        for users in sorted((shipped / "data" / "users").glob("*.jsonl"))[:_USERS]:
            shutil.copyfile(users, draft / "users" / users.name)
        shutil.copyfile(Path(__file__).with_name("experiment_readme.md"), draft / "README.md")
        config = (shipped / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
        (draft / "experiment.yaml").write_text(_adapted(config), encoding="utf-8")


def _adapted(quickstart: str) -> str:
    """The quickstart's config with the paths and the name of the copy."""
    text = re.sub(r"^#.*\n", "# The sample users of users/, on the bundled tiny base.\n", quickstart, count=1)
    text = text.replace("name: quickstart", "name: experiment")
    return text.replace("configs/policy/", "policy/").replace("path: data/users", "path: users")
