"""The folder of one run: what it was asked, where its state lies, and whether a resumed run is still the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_rlhf.config import Config
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.pairs import PreferencePair
from persona_rlhf.preferences.screening import Dropped, screening_rows


class RunFolder:
    """Paths of a run, and its identity: what must not change between a kill and `--resume`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state"
        self.metrics = path / "metrics.jsonl"
        self._identity = self.state / "identity.json"

    def check_place(self, resume: bool) -> None:
        """Raises InputError where a new run would overwrite something, or there is no run to go on with."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError([Problem(str(self.path), None, None, "this is a file; --run names a folder")])
        if resume and not self._identity.is_file():
            raise InputError([Problem(str(self.path), None, "--resume", "there is no run here to go on with")])
        if not resume and self.path.is_dir() and any(self.path.iterdir()):
            sentence = "this run folder is not empty; give --resume to go on with it, or --run another folder"
            raise InputError([Problem(str(self.path), None, None, sentence)])

    def check_same(self, identity: Mapping[str, str]) -> None:
        """Raises InputError where a resumed run would mix two experiments."""
        before = json.loads(self._identity.read_text())
        changed = [name for name, value in identity.items() if before.get(name) != value]
        if "config" in changed:
            changed[changed.index("config")] = (
                f"config ({', '.join(_changed_keys(before['config'], identity['config']))})"
            )
        if changed:
            sentence = f"the {' and the '.join(changed)} changed since this run began; start a new run with --run"
            raise InputError([Problem(str(self.path), None, "--resume", sentence)])

    def begin(self, config: Config, policy: Policy, dropped: Sequence[Dropped], identity: Mapping[str, str]) -> None:
        """Writes what was asked: the identity first, so that a kill leaves what `--resume` takes up; then the rest."""
        self.state.mkdir(parents=True, exist_ok=True)
        write_text(self._identity, json.dumps(dict(identity), indent=2) + "\n")
        write_text(self.path / "config.yaml", config.to_yaml())
        write_text(self.path / "policy.json", json.dumps(policy.to_json(), indent=2, ensure_ascii=False) + "\n")
        write_text(self.path / "screening.jsonl", "".join(json.dumps(row) + "\n" for row in screening_rows(dropped)))


def identity_of(config: Config, policy: Policy, pairs: Iterable[PreferencePair], weights_hash: str) -> dict[str, str]:
    """Everything that decides what a run computes, as hashes but for the config; where it is written does not count."""
    asked = config.model_dump(mode="json", exclude={"run", "name"})
    digest = hashlib.sha256()
    for pair in pairs:
        fields = (pair.user_id, pair.prompt, pair.chosen, pair.rejected, pair.split, pair.weight, pair.clean_choice)
        digest.update(json.dumps(fields).encode("utf-8", "surrogatepass"))
    return {
        "config": json.dumps(asked, sort_keys=True),
        "policy": policy.hash,
        "preference pairs": digest.hexdigest(),
        "base": weights_hash,
    }


def _changed_keys(before: str, now: str) -> list[str]:
    """Dotted keys whose values differ between two configs (JSON)."""
    one, two = (_flat(json.loads(text)) for text in (before, now))
    return sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def write_text(file: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    half = file.with_name(file.name + ".half")
    half.write_text(text, encoding="utf-8", errors="surrogatepass")
    half.replace(file)
