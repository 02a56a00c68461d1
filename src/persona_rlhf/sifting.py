"""What the screen of a config takes out of its users' pairs, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from persona_rlhf.config import Config
from persona_rlhf.evaluation.calibration import Calibrated
from persona_rlhf.materials import Materials
from persona_rlhf.preparation import chunks_of, prepare, prepare_users
from persona_rlhf.screens import screens_table

_USERS = 256  # at a time


class Sifted(NamedTuple):
    """How many users and pairs were screened; what was done with how many pairs and why; users with an alarm."""

    users: int
    pairs: int
    found: dict[tuple[str, str], int]
    alarmed: int
    screens: Sequence[Calibrated]

    def to_json(self) -> dict[str, Any]:
        found = [{"action": action, "why": why, "pairs": n} for (action, why), n in self.found.items()]
        screens = [own.to_json() for own in self.screens]
        return {"users": self.users, "pairs": self.pairs, "alarmed": self.alarmed, "found": found, "screens": screens}


def sift(config: Config, materials: Materials) -> Sifted:
    """Screens all pairs as `train` would. Raises InputError for whatever is wrong."""
    ready = prepare(config, materials)
    pairs, alarmed, found = 0, 0, Counter[tuple[str, str]]()
    for users in chunks_of(ready.pairs.users, _USERS):
        chunk = prepare_users(ready, ready.pairs.of(users))
        pairs += chunk.pairs
        found.update((one.action, one.kind) for one in chunk.dropped)
        alarmed += len({one.pair.user_id for one in chunk.dropped if one.alarming})
    return Sifted(ready.pairs.users, pairs, dict(found.most_common()), alarmed, ready.screens)


def render(sifted: Sifted) -> list[Table]:
    """The tables of `data screen`: what was found, and how well each screen tells."""
    table = Table(title=f"{sifted.users:,} users, {sifted.pairs:,} pairs; {sifted.alarmed:,} users with an alarm")
    for name, side in (("action", "left"), ("why", "left"), ("pairs", "right")):
        table.add_column(name, justify="right" if side == "right" else "left")
    for (action, why), n in sifted.found.items():
        table.add_row(action, why, f"{n:,}")
    return [table, screens_table(sifted.screens)]
