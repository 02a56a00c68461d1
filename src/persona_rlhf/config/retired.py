"""Config keys of earlier versions that are fixed values today or have another name, and keys that are new.

Configs of runs that an earlier version wrote are read without them. A new config that sets one is rejected, with the
value that holds now or the new name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from persona_rlhf.common.errors import Problem
from persona_rlhf.config.loader import Tree, YamlDocument

RETIRED: Mapping[str, Any] = {
    "screening.false_alarms": 0.01,
    "constraint.opening_tokens": 8,
    "constraint.smoothing": 0.9,
    "constraint.ceiling": 10.0,
    "gate.requirement_prompts": 100,
    "gate.runs": 1,
    "gate.judge_calibration.delta_share": 0.1,
    "evaluation.requirement_prompts": 100,
    "redteam.merged_pairs": 8,
}
"""Each retired key (all retired in 0.2) with the value that is fixed now. The code beside each value is its reason."""

ADDED: Mapping[str, Any] = {
    "dpo.anchor": 0.0,
    "screening.personal_data": "keep",
    "gate.still_base": None,
    "lora.products": "float32",
}
"""Keys that runs of earlier versions lack, with the value that does as those runs did; a new config has other
defaults."""

_REPLACEMENTS = {"gate.runs": "looks are counted instead: name one `gate.ledger` in all runs over the same users"}


OLD_JUDGE = "gate.classifier"
"""The second judge's key until 0.2: beside the string rules, or null for the rules alone."""


class RetiredValue(NamedTuple):
    """A retired key as a config states it: its dotted name and its value there."""

    key: str
    value: Tree

    @property
    def is_fixed_value(self) -> bool:
        """Whether the config states the value that holds today."""
        return not isinstance(self.value, bool) and self.value == RETIRED[self.key]


def remove_retired(tree: Tree) -> list[RetiredValue]:
    """Takes all retired keys out of a config's tree, in place, and returns them. The old judge gets its new keys."""
    removed = []
    gate = tree.get("gate") if isinstance(tree, dict) else None
    if isinstance(gate, dict) and "classifier" in gate:
        model = gate.pop("classifier")
        gate |= {"judge": "rules"} if model is None else {"judge": "both", "judge_model": model}
    for key in RETIRED:
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            removed.append(RetiredValue(key, section.pop(name)))
    return removed


def add_missing(tree: Tree) -> None:
    """Gives the config of an earlier run the values of `ADDED` where it lacks them, in place."""
    for key, value in ADDED.items():
        section_name, name = key.split(".")
        section = tree.setdefault(section_name, {}) if isinstance(tree, dict) else None
        if isinstance(section, dict):
            section.setdefault(name, value)


def retired_problems(document: YamlDocument) -> list[Problem]:
    """One problem for each retired key of a new config; takes these keys out of the document."""
    problems = []
    gate = document.tree.get("gate") if isinstance(document.tree, dict) else None
    if isinstance(gate, dict) and "classifier" in gate:
        file, line = document.place(tuple(OLD_JUDGE.split(".")))
        sentence = "this key was renamed in 0.2; write gate.judge_model, beside gate.judge: both"
        problems.append(Problem(file, line, OLD_JUDGE, sentence))
    for removed in remove_retired(document.tree):
        file, line = document.place(tuple(removed.key.split(".")))
        sentence = (
            f"this key was retired in 0.2: the value is always {RETIRED[removed.key]}; remove the key, or use 0.1"
            + (f"; {_REPLACEMENTS[removed.key]}" if removed.key in _REPLACEMENTS else "")
        )
        problems.append(Problem(file, line, removed.key, sentence))
    return problems
