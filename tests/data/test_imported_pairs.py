from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.imported_pairs import write_pairs


@given(
    st.lists(st.tuples(st.sampled_from("abü"), st.text(max_size=30)), max_size=30),
    st.integers(1, 5),
)
def test_the_rows_of_users_with_few_are_removed_in_place(
    tmp_path_factory: object, rows: list[tuple[str, str]], min_pairs: int
) -> None:
    """As a list in memory would be filtered."""
    folder = tmp_path_factory.mktemp("out")  # type: ignore[attr-defined]
    objects = [{"user_id": user, "text": text.encode("utf-8", "replace").decode()} for user, text in rows]
    counts = {user: sum(row["user_id"] == user for row in objects) for user in "abü"}
    kept = [row for row in objects if counts[row["user_id"]] >= min_pairs]
    left_out: dict[str, int] = {}
    out = folder / "out.jsonl"
    try:
        written = write_pairs(Path("src"), out, iter(objects), min_pairs, left_out)
    except InputError:
        assert not kept
        assert not list(folder.iterdir())
        return
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]] == kept
    assert written == {user: count for user, count in counts.items() if count >= min_pairs}
    assert sum(left_out.values()) == len(objects) - len(kept)
