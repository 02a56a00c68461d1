"""The pairs behind the curves of `evaluate RUN --data-curve`."""

from __future__ import annotations

import json

from persona_rlhf.data.store import PairStore
from persona_rlhf.pipeline.data_curve import labelled_users


def test_a_curve_stands_on_preferences_on_both_sides(tmp_path):
    splits = {"ann": ("train", "train", "heldout", "heldout"), "bob": ("train", "train"), "eve": ("heldout",)}
    rows = [
        {"user_id": user, "prompt": f"p{n}", "chosen": "yes", "rejected": "no", "split": split, "tie": n % 2 == 1}
        for user, of_user in splits.items()
        for n, split in enumerate(of_user)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = PairStore(path, 0.25)
    [ann] = labelled_users(store, range(3), set())
    assert (ann.user_id, [pair.line for pair in ann.train], [pair.line for pair in ann.heldout]) == ("ann", [1], [3])
    assert labelled_users(store, range(3), {("ann", str(path), 3)}) == []
