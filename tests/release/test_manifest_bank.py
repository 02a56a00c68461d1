from __future__ import annotations

import json

import pytest

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.evaluation.gate import Demands, Verdict, certify
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.private_banks import BankChoice
from persona_rlhf.policy.split_key import key_bytes
from persona_rlhf.release.card import card
from persona_rlhf.release.manifest import BaseInfo, DataInfo, Provenance, Stamp, manifest_of
from tests.policy.private import SECRET, deployment

DEMANDS = Demands(0.9, {"threats_of_violence": 0.9}, frozenset({"threats_of_violence"}), 0.05)
ALL = {"threats_of_violence": [True] * 200}


@pytest.fixture
def verdict() -> Verdict:
    return certify(DEMANDS, ALL, (1.0,), lambda alpha: ALL)


def provenance(policy: Policy, looks: int | None) -> Provenance:
    settings = {"seed": 0, "lora": LoraSettings().model_dump(), "aligned_by": None}
    return Provenance.of(BaseInfo("base", "c" * 64, False), policy, DEMANDS, settings, looks)


def test_manifest_and_card_name_a_private_bank_and_its_looks_without_a_text(tmp_path, verdict):
    settings = deployment(tmp_path)
    policy = Policy.read(settings.documents, banks=BankChoice(settings.private_banks, key_bytes("k"), 60))
    origin, data = provenance(policy, 12), DataInfo.of([], 0)
    manifest = manifest_of("ann", origin, data, verdict, {}, Stamp())
    assert manifest["policy"]["bank"] == {**policy.bank._asdict(), "looks": 12}
    assert manifest["policy"]["bank"]["kind"] == "private"
    page = card(origin, data, verdict, None)
    assert (
        f"bank: private, draw 1, split by a key of its own (sha256 of its `certify` probes `{policy.bank.sha256[:16]}"
        in page
    )
    assert "used for 12 looks so far" in page
    for text in (json.dumps(manifest), page):
        assert SECRET not in text
        assert str(settings.private_banks) not in text


def test_a_public_bank_is_called_public(tmp_path, verdict):
    policy = Policy.read(deployment(tmp_path).documents)
    origin, data = provenance(policy, None), DataInfo.of([], 0)
    bank = manifest_of("ann", origin, data, verdict, {}, Stamp())["policy"]["bank"]
    assert bank == {
        "kind": "public",
        "sha256": policy.bank.sha256,
        "draw": None,
        "split_key": None,
        "pool": None,
        "looks": None,
    }
    page = card(origin, data, verdict, None)
    assert "bank: public (sha256" in page
    assert "looks so far" not in page
