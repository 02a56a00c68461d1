from __future__ import annotations

import json
import stat

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.experiment import PolicySettings
from persona_rlhf.evaluation.ledger import Ledger, LookKey
from persona_rlhf.pipeline.rotate_bank import NO_RESET, bank_status, rotate_bank
from persona_rlhf.policy.hazards import CATEGORIES
from persona_rlhf.policy.policy import Policy
from tests.policy.private import SECRET, deployment

EACH = dict.fromkeys(CATEGORIES, 60)


def test_a_rotation_draws_fresh_probes_and_says_how_many_are_left(tmp_path):
    settings = deployment(tmp_path)
    first = rotate_bank(settings, 60)
    assert (first.status.certify, first.status.repeated, first.status.fresh) == (
        EACH,
        {},
        dict.fromkeys(CATEGORIES, 90),
    )
    assert first.status.bank == Policy.of(settings).bank
    one = {probe.prompt for probe in Policy.of(settings).probes("certify")}
    second = rotate_bank(settings, 60)
    two = {probe.prompt for probe in Policy.of(settings).probes("certify")}
    assert one.isdisjoint(two)
    assert (second.status.bank.draw, second.status.fresh) == (2, dict.fromkeys(CATEGORIES, 30))
    third = rotate_bank(settings, 60)
    assert (third.status.repeated, third.status.fresh) == (dict.fromkeys(CATEGORIES, 30), {})
    assert bank_status(settings) == third.status
    assert NO_RESET in third.to_json()["note"]
    assert SECRET not in json.dumps(third.to_json())


def test_a_draw_is_a_file_beside_the_old_one_that_only_its_owner_reads(tmp_path):
    settings = deployment(tmp_path)
    before = rotate_bank(settings, 60).file.read_bytes()
    after = rotate_bank(settings, 60).file
    assert after.name == "draw-0002.json"
    assert (settings.private_banks / "draw-0001.json").read_bytes() == before
    assert stat.S_IMODE(after.stat().st_mode) == 0o600
    assert not list(settings.private_banks.glob(".*"))


def test_nothing_is_written_where_the_demands_need_more_probes(tmp_path):
    settings = deployment(tmp_path)
    with pytest.raises(InputError, match="and there are 20 in split `certify`"):
        rotate_bank(settings, 20)
    assert not list(settings.private_banks.glob("draw-*"))


def test_without_a_private_bank_there_is_nothing_to_rotate(tmp_path):
    settings = deployment(tmp_path).model_copy(update={"private_banks": None})
    with pytest.raises(InputError, match="there is no private bank to rotate"):
        rotate_bank(settings)


def test_a_split_key_is_rotated_where_there_is_no_folder(tmp_path):
    file = tmp_path / "secret" / "key"
    file.parent.mkdir()
    settings = PolicySettings(documents=[shipped_root() / "configs/policy/tier_one.yaml"], split_key=file)
    first = rotate_bank(settings)
    assert first.status.bank == Policy.of(settings).bank
    assert (first.status.bank.kind, first.status.fresh) == ("public", {})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    [key] = file.read_text().split()
    assert key not in json.dumps(first.to_json())
    certify = {probe.id for probe in Policy.of(settings).probes("certify")}
    public = {probe.id for probe in Policy.read(settings.documents).probes("certify")}
    assert sum(first.status.repeated.values()) == len(certify & public)
    rotate_bank(settings)
    assert file.read_text().split()[0] == key
    assert len(file.read_text().split()) == 2
    assert bank_status(settings).bank == Policy.of(settings).bank != first.status.bank


def test_the_state_counts_the_looks_of_a_ledger_at_this_draw_alone(tmp_path):
    settings, ledger = deployment(tmp_path), Ledger(tmp_path / "looks.jsonl")
    for draws in (1, 2):
        rotate_bank(settings, 60)
        bank = Policy.of(settings).bank.sha256
        ledger.open([LookKey(f"user {n}", "adapter", bank, "exam") for n in range(draws)])
    assert bank_status(settings, ledger.file).looks == 2
    assert bank_status(settings).looks is None
    assert "used for 2 looks" in str(bank_status(settings, ledger.file).table().title)


def test_the_state_of_a_pool_says_how_much_of_it_is_drawn(tmp_path):
    settings, ledger = deployment(tmp_path), Ledger(tmp_path / "looks.jsonl")
    one = LookKey("user", "adapter", "bank", "exam")
    ledger.open([one], sequential=True, pool=["a", "b", "c"])
    ledger.close([(one, 1.0)], {one: 2})
    status = bank_status(settings, ledger.file, sequential=True)
    assert (status.drawn, status.bank.pool, status.certify) == (2, 600, dict.fromkeys(CATEGORIES, 150))
    assert "a pool of 600 units" in str(status.table().title)
    assert "2 units drawn by the user with most" in str(status.table().title)
    assert bank_status(settings, sequential=True).drawn is None
