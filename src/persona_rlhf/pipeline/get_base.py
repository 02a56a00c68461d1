"""`base get`: a base of the table as a transformers folder in bfloat16, with chat template, licence and card.

With its shipped alignment on request.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_folder
from persona_rlhf.common.version import __version__
from persona_rlhf.config.training import BaseSettings
from persona_rlhf.models.base import weights_hash
from persona_rlhf.models.merge import merge_adapter
from persona_rlhf.models.model_files import read_model, read_tokenizer
from persona_rlhf.pipeline.align_base import ADAPTERS, CARD, base_readme
from persona_rlhf.pipeline.download_base import BaseSource, DownloadedBase, Say

_INTERVAL = 3.0
"""Seconds between two lines about a step."""


class WrittenBase(NamedTuple):
    """A base that `base get` wrote, by its name in the table."""

    name: str
    folder: str
    weights_sha256: str


def write_base(
    name: str, source: BaseSource, downloaded: DownloadedBase, out: Path, say: Say, alignment: Path | None = None
) -> WrittenBase:
    """Writes OUT whole or not at all from the downloaded files, which are removed then.

    The weights are dequantized in float32 and rounded once. The adapters of `alignment` are merged into them.
    Raises InputError for a file that transformers cannot read, and where weights have another hash than the pinned one.
    """
    file = downloaded.weights
    with _heartbeat(f"reading the tokenizer of {file.name}", say):
        tokenizer = read_tokenizer(str(file), file)
    with _heartbeat("dequantizing the weights", say):
        model = read_model(str(file), file, torch.bfloat16, {}).model
    with atomic_folder(out, replace=False) as draft:
        with _heartbeat("writing the folder", say):
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
        weights_sha256 = _verified_hash(name, draft, source.weights_sha256, "gguf")
        page = base_card_text(name, source)
        if alignment is not None:
            with _heartbeat("merging the adapters of the alignment", say):
                _merge_alignment(model, alignment / ADAPTERS, draft)
            facts = json.loads((alignment / CARD).read_text(encoding="utf-8"))
            weights_sha256 = _verified_hash(
                name, draft, facts["aligned"]["sha256"], "peft", f", and take the files of {alignment} as they were"
            )
            (draft / CARD).write_bytes((alignment / CARD).read_bytes())
            page = base_readme(facts, source.licence)
        (draft / "LICENSE").write_bytes(downloaded.licence.read_bytes())
        (draft / "README.md").write_text(page, encoding="utf-8")
    downloaded.remove()
    return WrittenBase(name, str(out), weights_sha256)


def _merge_alignment(model: PreTrainedModel, adapters: Path, folder: Path) -> None:
    """Merges the adapters of all stages in the order of their names, and writes the model anew."""
    with warnings.catch_warnings():  # PEFT asks transformers by a name that will go
        warnings.simplefilter("ignore", FutureWarning)
        for adapter in sorted(file.parent for file in adapters.glob("*/adapter_config.json")):
            model = merge_adapter(PeftModel.from_pretrained(model, adapter))
    model.save_pretrained(folder)


def _verified_hash(name: str, folder: Path, pinned: str, library: str, beside: str = "") -> str:
    """The hash of the written weights. Raises InputError if it is not the pinned one; `beside`: a second remedy."""
    weights_sha256 = weights_hash(BaseSettings(model=str(folder)))
    if weights_sha256 != pinned:
        sentence = (
            f"these weights have the hash {weights_sha256[:16]}..., not {pinned[:16]}...: "
            f"transformers, {library} or safetensors here write others; install the versions of constraints.txt{beside}"
        )
        raise InputError([Problem(name, None, None, sentence)])
    return weights_sha256


def base_card_text(name: str, source: BaseSource) -> str:
    """README.md of a base: front matter for the hub, its origin, and hashes."""
    front = ModelCardData(
        model_name=source.title,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=source.licence,
        base_model=source.hub,
    )
    package = source.package
    return f"""---
{front.to_yaml().strip()}
---

# {source.title}

By {source.authors}; licence {source.licence} (see LICENSE). `persona-rlhf base get {name}` ({__version__}) wrote this
folder in bfloat16. {source.note}

| | |
| --- | --- |
| package | {package.name} {package.version}, {package.file} |
| sha256 of the package | `{package.sha256}` |
| file | {package.weights} |
| weights here (sha256) | `{source.weights_sha256}` |
| the authors' own weights | https://huggingface.co/{source.hub} |
| whose preferences aligned it | {source.aligned_by} |

Ask it first: `persona-rlhf evaluate --base PATH`. Align it: `persona-rlhf base align PATH OUT`.
"""


@contextmanager
def _heartbeat(step: str, say: Callable[[str], None]) -> Iterator[None]:
    """Says at intervals how long a step has lasted; nothing for a short one."""
    started, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(_INTERVAL):
            say(f"{step}: {time.monotonic() - started:.0f} seconds")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
