"""`data check`: what is in preference files, and what a base sees of one pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from persona_rlhf.boundary import print_json, print_table
from persona_rlhf.preferences.check import check, render


def check_data(paths: Sequence[Path], base: str | None, as_json: bool) -> None:
    """Checks the files and prints what is in them; with a `base` also their first pair as that model sees it.

    Raises InputError naming every bad row, and where the base cannot be had or does not take the pair.
    """
    summary, pair = check(paths), None
    if base is not None:
        from persona_rlhf.preferences.rendering import first_pair, rendered
        from persona_rlhf.training.base import load_tokenizer

        pair = rendered(first_pair(paths[0]), base, load_tokenizer(base))
    if as_json:
        print_json(summary.to_json() | ({} if pair is None else {"rendered": pair.to_json()}))
        return
    print_table(render(summary))
    if pair is not None:
        print_table(pair.panel())
