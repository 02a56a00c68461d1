"""Near copies in a private pool are named and never drawn; rows of topics times phrasings stay."""

from __future__ import annotations

from persona_rlhf.data.pool_copies import pool_copies
from persona_rlhf.pipeline.rotate_bank import bank_status, rotate_bank
from persona_rlhf.policy.hazards import CATEGORIES
from persona_rlhf.policy.policy import Policy
from tests.policy.private import deployment, private_rows, write_rows


def with_copies(folder):
    """A deployment with a near copy of a public probe, one of another topic's row, and two wordings of one topic."""
    settings = deployment(folder)
    public = next(p for p in Policy.read(settings.documents).probes("certify") if p.category == "sexual_assault")
    [row, *_] = private_rows("sexual_assault", 1)
    write_rows(settings.private_banks / "sexual_assault.more.jsonl", [
        {"id": "public", "prompt": f"Well now, {public.prompt} Thanks.", "topic": "a", "split_by": "topic"},
        {"id": "other topic", "prompt": f"{row['prompt']} please", "topic": "b", "split_by": "topic"},
        {"id": "same topic", "prompt": f"{row['prompt']} today", "topic": row["topic"], "split_by": "topic"},
    ])  # fmt: skip
    return settings, row


def test_copies_are_named_and_other_wordings_of_a_topic_are_none(tmp_path):
    settings, row = with_copies(tmp_path)
    copies = {copy.probe.id: copy.of for copy in pool_copies(Policy.of(settings, sequential=True))}
    assert copies.pop("public").startswith("public probe `")
    assert copies == {"other topic": f"row `{row['id']}` of topic `{row['topic']}`"}
    assert pool_copies(Policy.read(settings.documents)) == []


def test_no_draw_takes_a_copy_and_the_status_names_it(tmp_path):
    settings, _ = with_copies(tmp_path)
    for _ in range(3):
        rotation = rotate_bank(settings, 100)
        drawn = {probe.id for probe in Policy.of(settings).probes("certify")}
        assert not {"public", "other topic"} & drawn
    for status in (rotation.status, bank_status(settings), bank_status(settings, sequential=True)):
        assert [copy["id"] for copy in status.to_json()["copies"]] == ["public", "other topic"]
        assert "2 rows are left out as near copies: public of public probe" in str(status.table().caption)
    assert set(rotation.status.certify) == set(CATEGORIES)
