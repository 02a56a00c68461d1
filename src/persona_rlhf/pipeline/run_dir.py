"""Paths, identity and state of RUN; swap of two runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_path, atomic_write, remove_folder
from persona_rlhf.common.run_lock import LOCK, is_lock, run_lock, tell_nobody
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.retired import RETIRED, add_missing
from persona_rlhf.data.erasure import DataSubject, Trace
from persona_rlhf.data.screening import Dropped, screening_rows
from persona_rlhf.data.store import PairStore, UserSelection, fingerprint_of
from persona_rlhf.evaluation.ledger import LOOKS
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release import integrity
from persona_rlhf.release.deletion_records import FORGOTTEN, forgotten
from persona_rlhf.release.integrity import RUN_MANIFEST, beginning
from persona_rlhf.release.signing import keep_documents

_CHUNK = "users per chunk"
PAIRS = "preference pairs"
SOURCES = "sources.json"
_ALLOWED_BEFORE = (FORGOTTEN, SOURCES)  # files that may lie in the folder of a run before it begins
_END_USER_RULES = ("preferences", "not_in_force")  # of policy.json
_CHUNK_RESULTS = ("results.jsonl", "screening.jsonl")  # of a chunk; joined for the run


class RunDir:
    """Paths of a run, and its identity: the facts that must not change between kill and `--resume`, or shards.

    `audit_run` is the run whose audit trail records this one; it differs for users in training for another run.
    """

    def __init__(self, path: Path, share: WorkShare | None = None, audit_run: Path | None = None) -> None:
        self.path, self.share = path, share or WorkShare()
        self.audit_run = audit_run or path
        self.state = path / "state"
        self.metrics = path / "metrics.jsonl"
        self.bank, self.reference = self.state / "bank.json", self.state / "reference.safetensors"
        self.users = self.state / "users.jsonl"
        self.addition = self.state / "adding"  # a run of its own, of users to be added
        self.addition_trained = self.addition / "joining.json"
        self.start, self.prior = self.state / "start.safetensors", self.state / "prior.safetensors"
        # the base's answers: pairs that all users label; those to probes and harmless prompts
        self.answers, self.base_answers = self.state / "answers.jsonl", self.state / "base_answers.json"
        self._identity, self._ready = self.state / "identity.json", self.state / "ready"
        if self.share.workers > 1:
            self.metrics = self.state / f"metrics-{self.share.name}.jsonl"

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, share: WorkShare | None = None, resume: bool = False, audit_run: Path | None = None
    ) -> Iterator[RunDir]:
        """The locked folder of a run for a training process; a clean exit clears the chunks of a finished run.

        The processes of one run share its lock (`run_lock`). Raises InputError for a folder that `check_place` refuses,
        and where another program is at work there.
        """
        run_dir = cls(path, share, audit_run)
        with run_lock(path, "train", part=run_dir.part):
            run_dir.check_place(resume)
            yield run_dir
            if run_dir.finished:
                shutil.rmtree(run_dir.state / "chunks", ignore_errors=True)

    @property
    def part(self) -> str | None:
        """The name of this process among those that train the run together; None where it is alone."""
        return self.share.name if self.share.workers > 1 else None

    @property
    def begun(self) -> bool:
        """Whether there is a run in the folder."""
        return self._identity.is_file()

    @property
    def ready(self) -> bool:
        """Whether the state that all processes share is written."""
        return self.begun and self._ready.exists()

    @property
    def finished(self) -> bool:
        """Whether the run is whole and sealed."""
        return (self.path / RUN_MANIFEST).is_file()

    def need_finished(self, before: str) -> None:
        """Raises InputError for a run that is not finished; `before` names the act that needs it."""
        if not self.finished:
            sentence = f"this run is not finished; go on with it (train has --resume) before {before}"
            raise InputError([Problem(str(self.path), None, None, sentence)])

    def need_newest_documents(self, before: str) -> None:
        """Raises InputError where the run was last recertified under other documents than it trains by."""
        newest = integrity.newest_policy(self.path)
        if newest is not None and newest != (policy := self._read_identity()["policy"]):
            sentence = f"this run was last recertified under policy {newest[:16]}, but trains under {policy[:16]}: "
            sentence += "a new adapter could undo a revocation; train a new run under the new documents, or recertify "
            sentence += f"this one under its own before {before}"
            raise InputError([Problem(str(self.path), None, "policy.documents", sentence)])

    @property
    def sources(self) -> list[str]:
        """Paths of the pairs of users added since, in the order in which they came."""
        file = self.path / SOURCES
        return list(json.loads(file.read_bytes())) if file.exists() else []

    @property
    def selection(self) -> UserSelection:
        """The users of the run in their order, the forgotten users, and later sources."""
        lines = self.users.read_text(encoding="utf-8").splitlines() if self.users.exists() else []
        try:
            users = [None if user is None else (str(user[0]), str(user[1])) for user in map(json.loads, lines)]
        except (ValueError, LookupError, TypeError) as fault:
            sentence = f"the users of this run cannot be read ({fault}); start a new run with --run"
            raise InputError([Problem(str(self.users), None, None, sentence)]) from fault
        return UserSelection(tuple(users), forgotten(self.path), tuple(self.sources))

    def add_source(self, source: str, without: Collection[Path] = ()) -> None:
        """Makes a file the last source of pairs, and leaves others out."""
        gone = {file.resolve() for file in (Path(source), *without)}
        sources = [*(other for other in self.sources if Path(other).resolve() not in gone), source]
        self.write(self.path / SOURCES, json.dumps(sources, indent=2) + "\n")

    def begin_with(self, other: RunDir) -> None:
        """Copies the sources of pairs and the list of forgotten users from another run, before this one begins."""
        for file in (other.path / SOURCES, *(other.path / FORGOTTEN).glob("*.json")):
            if file.exists():
                place = self.path / file.relative_to(other.path)
                place.parent.mkdir(parents=True, exist_ok=True)
                self.write(place, file.read_text(encoding="utf-8"))

    def change_users(self, users: Sequence[tuple[str, str] | None]) -> None:
        """Replaces the users of the run, by their numbers."""
        self.write(self._identity, _rendered(self._read_identity() | {PAIRS: fingerprint_of(users)}))
        self.write(self.users, _lines(users))

    def begin_as(self, other: RunDir, users: Sequence[tuple[str, str] | None], chunk: int) -> None:
        """Begins a run of other users under the identity of another run, with its shared state copied."""
        self.state.mkdir(parents=True, exist_ok=True)
        for shared in filter(Path.exists, (other.bank, other.start, other.prior, other.answers, other.base_answers)):
            atomic_write(self.state / shared.name, shared.read_bytes())
        changed = {PAIRS: fingerprint_of(users), _CHUNK: str(chunk)}
        self.write(self._identity, _rendered(other._read_identity() | changed))

    def check_place(self, resume: bool) -> None:
        """Raises InputError where a new run would overwrite something, or there is no run to resume.

        A shard resumes a run that another shard began; so does every process of a host but the first.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError([Problem(str(self.path), None, None, "this is a file; --run names a folder")])
        if self.share.rank > 0 or (self.share.shards > 1 and self.begun):
            return
        if resume and not self.begun:
            raise InputError([Problem(str(self.path), None, "--resume", "there is no run here to go on with")])
        if not resume and self.path.is_dir() and not self._vacant:
            sentence = "this run folder is not empty; give --resume to go on with it, or --run another folder"
            raise InputError([Problem(str(self.path), None, None, sentence)])

    @property
    def _vacant(self) -> bool:
        """Whether a new run may begin in the folder."""
        return all(file.name in _ALLOWED_BEFORE or is_lock(file.name) for file in self.path.iterdir())

    def check_same(self, identity: Mapping[str, str]) -> None:
        """Raises InputError where a resumed run would mix two experiments."""
        before = self._read_identity()
        keys = _changed_keys(before.get("config", "{}"), identity["config"]) if "config" in identity else []
        changed = [f"config ({', '.join(keys)})"] if keys else []
        changed += [name for name, value in identity.items() if name != "config" and before.get(name) != value]
        if changed:
            sentence = f"the {' and the '.join(changed)} changed since this run began; start a new run with --run"
            if not RETIRED.keys().isdisjoint(keys):
                sentence += ", or finish this one with the version that began it"
            raise InputError([Problem(str(self.path), None, "--resume", sentence)])

    def begin(self, config: Config, policy: Policy, pairs: PairStore, identity: Mapping[str, str], chunk: int) -> None:
        """Writes identity, users, config and policy; the identity comes first, so that `--resume` works from then."""
        self.state.mkdir(parents=True, exist_ok=True)
        if not self.begun:
            self.write(self._identity, _rendered({**identity, _CHUNK: str(chunk)}))
        if not self.users.exists():
            self.write(self.users, _lines(pairs.user_digests))
        self.write(self.path / "config.yaml", config.to_yaml())
        self.write(self.path / "policy.json", json.dumps(policy.to_json(), indent=2, ensure_ascii=False) + "\n")
        if self.share.rank == 0:
            keep_documents(self.path, policy.documents)
            integrity.append_all(self.audit_run, beginning(self.audit_run, policy, identity, self.share.name))

    def set_ready(self) -> None:
        """Marks the state shared by all processes as written."""
        self._ready.touch()

    def wait_until_ready(self) -> None:
        """Waits until the first process of this host has checked everything; it reports a failure itself."""
        while not self.ready:
            time.sleep(0.1)

    @property
    def base_hash(self) -> str:
        """sha256 of the weights of the run's base."""
        return self._read_identity()["base"]

    @property
    def chunk_size(self) -> int:
        """Users of a chunk, as the run began; another number of processes does not change it."""
        return int(self._read_identity()[_CHUNK])

    def chunk(self, number: int) -> Path:
        """The folder of a chunk: its checkpoints while it is trained, then its part of the run's results."""
        return self.state / "chunks" / f"{number:06d}"

    def is_done(self, number: int) -> bool:
        """Whether a chunk is trained, judged and written."""
        return (self.chunk(number) / "done").exists()

    def finish(self, number: int, dropped: Sequence[Dropped]) -> None:
        """Marks a chunk as done and removes its working files."""
        folder = self.chunk(number)
        self.write(folder / "screening.jsonl", "".join(json.dumps(row) + "\n" for row in screening_rows(dropped)))
        (folder / "done").touch()
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in (*_CHUNK_RESULTS, "done"):
                entry.unlink()

    def wait_for(self, chunks: Iterable[int]) -> None:
        """Waits until other processes have done these chunks."""
        for number in chunks:
            while not self.is_done(number):
                time.sleep(0.2)

    def join(self, chunks: int) -> None:
        """Joins the results of all chunks: RUN/results.jsonl, screening.jsonl and metrics.jsonl."""
        for name in _CHUNK_RESULTS:
            self._join(self.path / name, [self.chunk(number) / name for number in range(chunks)])
        metrics = sorted(self.state.glob("metrics-*.jsonl"))
        if metrics:
            whole = self.path / "metrics.jsonl"
            self._join(whole, [*([whole] if whole.exists() else []), *metrics])
            for part in metrics:
                part.unlink()

    def write(self, file: Path, text: str) -> None:
        """Writes a small file whole or not at all, while other processes may write the same one."""
        atomic_write(file, text.encode("utf-8", "surrogatepass"))

    def _join(self, whole: Path, parts: Sequence[Path]) -> None:
        with atomic_path(whole) as half, half.open("wb") as out:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, out)

    def _read_identity(self) -> dict[str, str]:
        try:
            identity: dict[str, str] = json.loads(self._identity.read_text())
            int(identity[_CHUNK])
        except (OSError, ValueError, KeyError, TypeError) as fault:
            sentence = f"the state of this run cannot be read ({fault}); start a new run with --run"
            raise InputError([Problem(str(self._identity), None, "--resume", sentence)]) from fault
        return identity


def number_of(users: Sequence[tuple[str, str] | None], user: DataSubject) -> int | None:
    """The number of a user among those of a run; None for a user who is not there."""
    return next((number for number, line in enumerate(users) if line is not None and line[0] == user.pseudonym), None)


def addition_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """An interrupted addition with the user in it, which is removed as a whole."""
    inner = RunDir(RunDir(run).addition)
    if number_of(inner.selection.user_digests, user) is not None:
        yield Trace(inner.path, "an addition under way, all of it", 1, partial(remove_folder, inner.path))


def index_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The user's tier-three rules and index line, which goes last; the user's number stays free.

    Before the index line, the log-probabilities of the user's chunk go, if it is in training: they are computed again.
    """
    for file in (run / "policy.json", *sorted((run / "state").rglob("policy.json"))):
        policy = json.loads(file.read_bytes()) if file.is_file() else {}
        if rules := [rule for key in _END_USER_RULES for rule in policy.get(key, ()) if user(rule["user_id"])]:
            yield Trace(file, "tier-three rules of the policy", len(rules), partial(_erase_rules, file, policy, rules))
    run_dir = RunDir(run)
    users = run_dir.selection.user_digests
    if (number := number_of(users, user)) is not None:
        values = run_dir.chunk(number // run_dir.chunk_size) / run_dir.reference.name
        if values.exists():
            yield Trace(values, "the base's log-probabilities of a chunk, all", 1, values.unlink)
        others = [*users[:number], None, *users[number + 1 :]]
        yield Trace(run_dir.users, "index line", 1, partial(run_dir.change_users, others))


def _erase_rules(file: Path, policy: dict[str, Any], rules: list[dict[str, Any]]) -> None:
    """Writes policy.json without a user's rules and their document; its hash stays that of the run's verdicts."""
    documents = {rule["document"] for rule in rules}
    kept = {
        **{key: [rule for rule in policy[key] if rule not in rules] for key in _END_USER_RULES if key in policy},
        "documents": [document for document in policy["documents"] if document["path"] not in documents],
    }
    atomic_write(file, (json.dumps(policy | kept, indent=2, ensure_ascii=False) + "\n").encode())


def identity_of(config: Config, policy: Policy, pairs: PairStore, weights_hash: str) -> dict[str, str]:
    """Everything that decides the results of a run, as hashes but for the config.

    Left out are the place and the number of processes, attacks on released adapters, and other facts in manifests.
    """
    aside: dict[str, Any] = dict.fromkeys(("run", "name", "redteam", "release"), True)
    aside["fleet"] = {"processes", "chunk", "shards", "shard_cpus", "shard_gpus", "shard_retries"}
    basis = {} if config.basis is None else {"files of basis": _digest([config.basis.file, config.basis.prompts])}
    return basis | {
        "config": json.dumps(config.model_dump(mode="json", exclude=aside), sort_keys=True),
        "policy": policy.hash,
        "files of screening": _digest(config.screening.files),
        PAIRS: pairs.fingerprint,
        "base": weights_hash,
    }


def dotted(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested section by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        values |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def _digest(files: Iterable[Path]) -> str:
    """sha256 over the contents of files."""
    digests = (hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _rendered(identity: Mapping[str, str]) -> str:
    return json.dumps(identity, indent=2) + "\n"


def _lines(users: Iterable[tuple[str, str] | None]) -> str:
    return "".join(json.dumps(user) + "\n" for user in users)


def _changed_keys(before: str, now: str) -> list[str]:
    """Dotted keys whose values differ between two configs (JSON)."""
    trees = [json.loads(text) for text in (before, now)]
    for tree in trees:
        add_missing(tree)
    one, two = map(dotted, trees)
    for key, value in RETIRED.items():
        if one.get(key) == value:  # written by an earlier version, and equal to today's constant
            del one[key]
    return sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))


_SWAP = Path("state") / "replaced.json"  # marks a run in the middle of a swap


def before(run: Path) -> Path:
    """The place of a run after another run replaced it."""
    return run.with_name(f"{run.name}.before")


def check_replacement(run: Path, by: Path) -> None:
    """Raises InputError where two renames cannot replace a run by another."""
    if by.resolve().parent != run.resolve().parent:
        sentence = f"only a run beside {run} can take its place; name a folder in {run.parent} with --run"
        raise InputError([Problem(str(by), None, "--replace", sentence)])
    if before(run).exists():
        sentence = "an older run was put there already; move it away first"
        raise InputError([Problem(str(before(run)), None, "--replace", sentence)])


def replace_run(run: Path, by: Path) -> None:
    """Replaces a run by another with two renames; a mark lets `finish_replacement` complete an interrupted swap."""
    with run_lock(run, "rebase --replace"), run_lock(by, "rebase --replace"):
        check_replacement(run, by)
        atomic_write(run / _SWAP, json.dumps({"by": by.name}).encode())
        _finish_replacement(run)


def finish_replacement(run: Path, wait: float = 0.0, tell: Callable[[str], None] = tell_nobody) -> bool:
    """Completes an interrupted swap of two runs; whether there was one.

    Raises InputError where the swap is not interrupted but under way.
    """
    old = run if (run / _SWAP).is_file() else before(run)
    if not (old / _SWAP).is_file():
        return False
    with run_lock(old, "rebase --replace", wait=wait, tell=tell):
        return _finish_replacement(run)


def _finish_replacement(run: Path) -> bool:
    old = run if (run / _SWAP).is_file() else before(run)
    if not (old / _SWAP).is_file():
        return False
    by = run.with_name(json.loads((old / _SWAP).read_bytes())["by"])
    if old == run:
        run.rename(before(run))
    if by.exists() and not run.exists():
        by.rename(run)
    for file in before(run).glob(f"{Path(LOOKS).stem}.*"):  # the new run goes on in the ledger of looks
        file.rename(run / file.name)
    (before(run) / _SWAP).unlink()
    (before(run) / LOCK).unlink(missing_ok=True)  # held by this process; it was made as the lock of RUN
    return True
