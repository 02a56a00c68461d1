"""Paths, identity and state of RUN; swap of two runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_path, atomic_write
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.retired import RETIRED
from persona_rlhf.data.screening import Dropped, screening_rows
from persona_rlhf.data.store import PairStore, UserSelection, fingerprint_of
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release import integrity
from persona_rlhf.release.deletion_records import FORGOTTEN, forgotten
from persona_rlhf.release.integrity import RUN_MANIFEST, beginning
from persona_rlhf.release.signing import keep_documents

# ----------------------------------------------------------------------------------------------------
# A run takes the place of another: two renames, and a mark from which they are finished if a kill comes between.
# ----------------------------------------------------------------------------------------------------

_MARK = Path("state") / "replaced.json"


def before(run: Path) -> Path:
    """Where a run goes whose place another one takes."""
    return run.with_name(f"{run.name}.before")


def check_replacement(run: Path, by: Path) -> None:
    """Raises InputError where a run could not take the place of another by renaming both."""
    if by.resolve().parent != run.resolve().parent:
        sentence = f"only a run beside {run} can take its place; name a folder in {run.parent} with --run"
        raise InputError([Problem(str(by), None, "--replace", sentence)])
    if before(run).exists():
        sentence = "an older run was put there already; move it away first"
        raise InputError([Problem(str(before(run)), None, "--replace", sentence)])


def replace_run(run: Path, by: Path) -> None:
    """Puts a run away and another in its place: from the mark on, `finish_replacement` does it at any later start."""
    check_replacement(run, by)
    atomic_write(run / _MARK, json.dumps({"by": by.name}).encode())
    finish_replacement(run)


def finish_replacement(run: Path) -> bool:
    """Puts a run away that is marked, and the other in its place; whether there was anything to do."""
    old = run if (run / _MARK).is_file() else before(run)
    if not (old / _MARK).is_file():
        return False
    by = run.with_name(json.loads((old / _MARK).read_bytes())["by"])
    if old == run:
        run.rename(before(run))
    if by.exists() and not run.exists():
        by.rename(run)
    (before(run) / _MARK).unlink()
    return True


# ----------------------------------------------------------------------------------------------------
# The folder of one run: what it was asked, where its state lies, and whether a resumed run is still the same one.
# ----------------------------------------------------------------------------------------------------

_CHUNK = "users per chunk"
PAIRS = "preference pairs"
SOURCES = "sources.json"
_SEEDS = (FORGOTTEN, SOURCES)  # what may lie in the folder of a run before it begins
_PARTS = ("results.jsonl", "screening.jsonl")  # of a chunk; they are joined for the run


class RunDir:
    """Paths of a run, and its identity: what must not change between a kill and `--resume`, or between its shards."""

    def __init__(self, path: Path, share: WorkShare | None = None, trail: Path | None = None) -> None:
        self.path, self.share = path, share or WorkShare()
        self.trail = trail or path  # the run whose audit trail tells of this one, which may be a part of it
        self.state = path / "state"
        self.metrics = path / "metrics.jsonl"
        self.bank, self.reference = self.state / "bank.json", self.state / "reference.safetensors"
        self.users = self.state / "users.jsonl"
        self.adding = self.state / "adding"  # a run inside, of users who are to be added
        self.joining = self.adding / "joining.json"  # they are trained, and on their way
        self.start = self.state / "start.safetensors"
        self._identity, self._ready = self.state / "identity.json", self.state / "ready"
        if self.share.workers > 1:
            self.metrics = self.state / f"metrics-{self.share.name}.jsonl"

    @property
    def begun(self) -> bool:
        """Whether there is a run in the folder."""
        return self._identity.is_file()

    @property
    def finished(self) -> bool:
        """Whether the run is whole and sealed."""
        return (self.path / RUN_MANIFEST).is_file()

    @property
    def sources(self) -> list[str]:
        """Where the pairs of users lie who were added since, in the order in which they came."""
        file = self.path / SOURCES
        return list(json.loads(file.read_bytes())) if file.exists() else []

    @property
    def roll(self) -> UserSelection:
        """Whose pairs the run uses: its users in their order, those who asked to be forgotten, and later sources."""
        lines = self.users.read_text(encoding="utf-8").splitlines() if self.users.exists() else []
        try:
            known = [None if user is None else (str(user[0]), str(user[1])) for user in map(json.loads, lines)]
        except (ValueError, LookupError, TypeError) as fault:
            sentence = f"the users of this run cannot be read ({fault}); start a new run with --run"
            raise InputError([Problem(str(self.users), None, None, sentence)]) from fault
        return UserSelection(tuple(known), forgotten(self.path), tuple(self.sources))

    def add_source(self, source: str) -> None:
        """Reads a file after all others from now on."""
        sources = [*(known for known in self.sources if known != source), source]
        self.write(self.path / SOURCES, json.dumps(sources, indent=2) + "\n")

    def begin_with(self, other: RunDir) -> None:
        """Before it begins, a run takes over from another where its pairs lie, and who asked to be forgotten."""
        for file in (other.path / SOURCES, *(other.path / FORGOTTEN).glob("*.json")):
            if file.exists():
                place = self.path / file.relative_to(other.path)
                place.parent.mkdir(parents=True, exist_ok=True)
                self.write(place, file.read_text(encoding="utf-8"))

    def change_users(self, known: Sequence[tuple[str, str] | None]) -> None:
        """Writes down other users than the run began with, by their numbers: it is theirs from now on."""
        self.write(self._identity, _rendered(self._read_identity() | {PAIRS: fingerprint_of(known)}))
        self.write(self.users, _lines(known))

    def begin_as(self, other: RunDir, known: Sequence[tuple[str, str] | None], chunk: int) -> None:
        """Begins a run that is asked the same as another one, of other users; what all share is taken from that."""
        self.state.mkdir(parents=True, exist_ok=True)
        for shared, place in ((other.bank, self.bank), (other.start, self.start)):
            if shared.exists():
                shutil.copyfile(shared, place)
        own = {PAIRS: fingerprint_of(known), _CHUNK: str(chunk)}
        self.write(self._identity, _rendered(other._read_identity() | own))

    def check_place(self, resume: bool) -> None:
        """Raises InputError where a new run would overwrite something, or there is no run to go on with.

        A shard goes on with what the others began; so does any but the first process of a host.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError([Problem(str(self.path), None, None, "this is a file; --run names a folder")])
        if self.share.rank > 0 or (self.share.shards > 1 and self.begun):
            return
        if resume and not self.begun:
            raise InputError([Problem(str(self.path), None, "--resume", "there is no run here to go on with")])
        if not resume and self.path.is_dir() and any(entry.name not in _SEEDS for entry in self.path.iterdir()):
            sentence = "this run folder is not empty; give --resume to go on with it, or --run another folder"
            raise InputError([Problem(str(self.path), None, None, sentence)])

    def check_same(self, identity: Mapping[str, str]) -> None:
        """Raises InputError where a resumed run would mix two experiments."""
        before = self._read_identity()
        changed = [name for name, value in identity.items() if before.get(name) != value]
        if "config" in changed:
            changed.remove("config")
            if keys := _changed_keys(before.get("config", "{}"), identity["config"]):
                changed.insert(0, f"config ({', '.join(keys)})")
        if changed:
            sentence = f"the {' and the '.join(changed)} changed since this run began; start a new run with --run"
            raise InputError([Problem(str(self.path), None, "--resume", sentence)])

    def begin(self, config: Config, policy: Policy, pairs: PairStore, identity: Mapping[str, str], chunk: int) -> None:
        """Writes what was asked: the identity early, so that a kill leaves what `--resume` takes up; then the rest."""
        self.state.mkdir(parents=True, exist_ok=True)
        if not self.begun:
            self.write(self._identity, _rendered({**identity, _CHUNK: str(chunk)}))
        if not self.users.exists():
            self.write(self.users, _lines(pairs.known))
        self.write(self.path / "config.yaml", config.to_yaml())
        self.write(self.path / "policy.json", json.dumps(policy.to_json(), indent=2, ensure_ascii=False) + "\n")
        if self.share.rank == 0:
            keep_documents(self.path, policy.documents)
            integrity.append_all(self.trail, beginning(self.trail, policy, identity, self.share.name))

    def set_ready(self) -> None:
        """What all processes share is on disk."""
        self._ready.touch()

    def wait_until_ready(self) -> None:
        """Waits for the first process of this host to have checked everything; if it fails, it is its to say so."""
        while not (self.begun and self._ready.exists()):
            time.sleep(0.1)

    @property
    def base_hash(self) -> str:
        """sha256 of the weights of the base that the run is on."""
        return self._read_identity()["base"]

    @property
    def chunk_size(self) -> int:
        """Users of a chunk, as the run began with; not what another number of processes would choose."""
        return int(self._read_identity()[_CHUNK])

    def chunk(self, number: int) -> Path:
        """The folder of a chunk: its checkpoints while it is trained, then its part of what the run writes."""
        return self.state / "chunks" / f"{number:06d}"

    def is_done(self, number: int) -> bool:
        """Whether a chunk is trained, judged and written."""
        return (self.chunk(number) / "done").exists()

    def finish(self, number: int, dropped: Sequence[Dropped]) -> None:
        """Marks a chunk as done and clears its working matter away, so that it does not add up."""
        folder = self.chunk(number)
        self.write(folder / "screening.jsonl", "".join(json.dumps(row) + "\n" for row in screening_rows(dropped)))
        (folder / "done").touch()
        for left in folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name not in (*_PARTS, "done"):
                left.unlink()

    def wait_for(self, chunks: Iterable[int]) -> None:
        """Waits until all these chunks are done by other processes."""
        for number in chunks:
            while not self.is_done(number):
                time.sleep(0.2)

    def clear(self) -> None:
        """A finished run needs its chunks no more: what they wrote is joined and sealed."""
        shutil.rmtree(self.state / "chunks", ignore_errors=True)

    def join(self, chunks: int) -> None:
        """Puts the parts of all chunks together: RUN/results.jsonl, screening.jsonl and metrics.jsonl."""
        for name in _PARTS:
            self._join(self.path / name, [self.chunk(number) / name for number in range(chunks)])
        metrics = sorted(self.state.glob("metrics-*.jsonl"))
        if metrics:
            whole = self.path / "metrics.jsonl"
            self._join(whole, [*([whole] if whole.exists() else []), *metrics])
            for part in metrics:
                part.unlink()

    def write(self, file: Path, text: str) -> None:
        """Writes a small file whole or not at all, whoever else writes the same."""
        atomic_write(file, text.encode("utf-8", "surrogatepass"), writer=self.share.name)

    def _join(self, whole: Path, parts: Sequence[Path]) -> None:
        with atomic_path(whole) as half, half.open("wb") as out:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, out)

    def _read_identity(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(self._identity.read_text())
            int(found[_CHUNK])
        except (OSError, ValueError, KeyError, TypeError) as fault:
            sentence = f"the state of this run cannot be read ({fault}); start a new run with --run"
            raise InputError([Problem(str(self._identity), None, "--resume", sentence)]) from fault
        return found


def identity_of(config: Config, policy: Policy, pairs: PairStore, weights_hash: str) -> dict[str, str]:
    """Everything that decides what a run computes, as hashes but for the config; where and by how many it is computed
    does not count, nor how its adapters are attacked afterwards, nor what else their papers say."""
    elsewhere = {"processes", "chunk"}
    aside: dict[str, Any] = {"run": True, "name": True, "redteam": True, "release": True, "fleet": elsewhere}
    asked = config.model_dump(mode="json", exclude=aside)
    return {
        "config": json.dumps(asked, sort_keys=True),
        "policy": policy.hash,
        "files of screening": _digest(config.screening.files),
        PAIRS: pairs.fingerprint,
        "base": weights_hash,
    }


def _digest(files: Iterable[Path]) -> str:
    """sha256 over the contents of files."""
    digests = (hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _rendered(identity: Mapping[str, str]) -> str:
    return json.dumps(identity, indent=2) + "\n"


def _lines(known: Iterable[tuple[str, str] | None]) -> str:
    return "".join(json.dumps(user) + "\n" for user in known)


def _changed_keys(before: str, now: str) -> list[str]:
    """Dotted keys whose values differ between two configs (JSON)."""
    one, two = (_flat(json.loads(text)) for text in (before, now))
    for key, value in RETIRED.items():
        if one.get(key) == value:  # written by an earlier version, and what holds today
            del one[key]
    return sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
