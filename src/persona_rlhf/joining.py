"""The end of `add`: users who were trained in a run of their own, inside the folder of another, become users of that.

The joined run is written file by file, each whole or not at all, and all of it can be done again: from the moment that
everything is trained, judged and sealed, any later start of a program finishes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from persona_rlhf.preferences.identity import pseudonym
from persona_rlhf.release import audit
from persona_rlhf.release.folder import remove_folder, write_file, write_folder, write_lines
from persona_rlhf.release.manifest import read_manifest
from persona_rlhf.release.redteam import REDTEAM
from persona_rlhf.release.report import REPORT, write_report
from persona_rlhf.release.results import RESULTS, Result, RunResults
from persona_rlhf.release.seal import SEAL, seal
from persona_rlhf.run_folder import SOURCES, RunFolder

EVENT = "added"


def begin_joining(run: Path, source: str) -> None:
    """Everything is trained: from here on, it is finished whatever happens."""
    write_file(RunFolder(run).joining, json.dumps({"source": source}).encode())


def join(run: Path) -> None:
    """Makes the users of the run inside users of the run: adapters, lines, report, seal, and one line in the trail."""
    folder = RunFolder(run)
    inner = folder.adding
    new = {result.user_id: result for result in RunResults(inner)}
    _adapters(run, inner, new)
    write_lines(run / RESULTS, _in_place(run / RESULTS, inner / RESULTS))
    for name in ("screening.jsonl", "metrics.jsonl"):
        write_lines(run / name, _others_then(run / name, inner / name, new.__contains__))
    folder.add_source(json.loads(folder.joining.read_bytes())["source"])
    own = {user[0]: user for user in RunFolder(inner).roll.known if user is not None}
    rest = [user if user is None else own.get(user[0], user) for user in folder.roll.known]
    there = {user[0] for user in rest if user is not None}
    folder.change_users([*rest, *(user for name, user in own.items() if name not in there)])
    (run / REDTEAM).unlink(missing_ok=True)  # it is about those who were released before
    write_report(run)
    papers = (read_manifest(inner / SEAL)[0] or {}).get("manifest_hash")
    if not any(entry.facts.get("seal") == papers for entry in audit.read(run) if entry.event == EVENT):
        users = {pseudonym(user): result.manifest_sha256 for user, result in new.items()}
        audit.append(run, EVENT, seal=papers, users=users)
    for name in (RESULTS, "screening.jsonl", "metrics.jsonl", SOURCES, REDTEAM, REPORT, audit.AUDIT):
        seal(run, only=name)
    remove_folder(inner)


def _adapters(run: Path, inner: Path, new: dict[str, Result]) -> None:
    """The new users' adapters; of those who had one before, the old one goes."""
    before = {result.user_id: result.path for result in RunResults(run) if result.user_id in new}
    for user, result in new.items():
        if result.path is not None:
            files = sorted((inner / result.path).iterdir())
            write_folder(run / result.path, {file.name: file.read_bytes() for file in files})
        old = before.get(user)
        if old is not None and old != result.path and (run / old).exists():
            shutil.rmtree(run / old)


def _in_place(file: Path, more: Path) -> Iterator[bytes]:
    """The lines of a file with a line a user: those of changed users in their places, those of new ones at the end."""
    new = {json.loads(line)["user_id"]: line for line in more.read_bytes().splitlines(keepends=True)}
    with file.open("rb") as lines:
        for line in lines:
            yield new.pop(json.loads(line)["user_id"], line)
    yield from new.values()


def _others_then(file: Path, more: Path, is_new: Callable[[str], bool]) -> Iterator[bytes]:
    """The lines of a file but those of the new users, and then theirs."""
    for place, wanted in ((file, False), (more, True)):
        if place.exists():
            with place.open("rb") as stream:
                yield from (line for line in stream if is_new(json.loads(line)["user_id"]) is wanted)
