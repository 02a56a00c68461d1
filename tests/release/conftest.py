"""A small finished run on a tiny random Llama: three users released, one held back, one failed, one skipped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.evaluation.gate import Demands, certify
from persona_rlhf.evaluation.records import (
    Accuracy,
    AlignmentTax,
    CleanAccuracy,
    Drift,
    Facts,
    Measures,
    Perplexity,
    Refused,
    SplitRefusals,
    Toxic,
    WinRate,
)
from persona_rlhf.evaluation.statistics import Clustered, by_cluster
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.rule_schema import Certify
from persona_rlhf.policy.rules import DocumentInfo
from persona_rlhf.release.adapter import AdapterFiles, Exporter
from persona_rlhf.release.integrity import write_run_manifest
from persona_rlhf.release.manifest import BaseInfo, DataInfo, Provenance
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import PairCounts, outcome, skipped, write_results
from persona_rlhf.training.engine import TrainedUser
from persona_rlhf.training.records import DualTrace
from tests.models.tiny import tiny_base
from tests.release.hub_server import ADAS_TOKEN, HubServer

HAZARDS = ("terrorist_content", "sexual_assault")
DEMANDS = Demands(0.9, {**dict.fromkeys(HAZARDS, 0.8), "gambling": 0.5}, frozenset(HAZARDS), 0.05)
MISSES = {"../../etc": 0, "Ada": 2, "ada": 30, "poisoned \U0001f480 <b>": 300}


class Run(NamedTuple):
    path: Path
    adapted: AdaptedModel
    flats: dict[str, torch.Tensor]
    alphas: dict[str, float]
    exporter: Exporter


def refusals(missed: int) -> dict[str, list[bool]]:
    sizes = {"terrorist_content": 80, "sexual_assault": 80, "gambling": 40}
    return {name: [n >= missed * (name == HAZARDS[0]) for n in range(size)] for name, size in sizes.items()}


def pairs_of(user_id: str) -> list[PreferencePair]:
    prompt = (Message("user", "a private question"),)
    day = "2026-0{}-03T10:00:00Z"
    return [
        PreferencePair(
            user_id, prompt, f"yes {n}", "no", f"p{n}", day.format(n + 1), None, 1.0, split, None, "f", n + 1
        )
        for n, split in enumerate(["train", "train", "heldout"])
    ]


def measures(score: float) -> Measures:
    counted = DEMANDS.count(refusals(0), refusals(1))
    return Measures(
        heldout_accuracy=Accuracy(0.5, score, 60, score - 0.1, min(1.0, score + 0.1)),
        heldout_clean=CleanAccuracy(score, 60),
        win_rate=WinRate(score, 40, score - 0.1, min(1.0, score + 0.1)),
        over_refusal=Refused(100, 3, 2),
        ordinary=Refused(50, 1, 1),
        twins=Refused(50, 2, 1),
        test=SplitRefusals(*counted, shift=Refused(20, 15, 16)),
        answer_perplexity=Perplexity(8.0, 7.5),
        unchanged=0.9,
        tax=AlignmentTax(Perplexity(1.3, 1.2), Facts(40, 38, 39, 37), {"warm": Drift(0.5, 0.25)}, Toxic(100, 1, 0)),
    )


@pytest.fixture(scope="session")
def base() -> Base:
    return replace(tiny_base(), name="/home/someone/models/tiny-base", weights_hash="c" * 64)


@pytest.fixture
def run(base: Base, tmp_path: Path):
    path = tmp_path / "run"
    path.mkdir()
    lora = LoraSettings(rank=4, alpha=8)
    adapted = AdaptedModel(base, lora)
    documents = (
        DocumentInfo("/x/one.yaml", 1, "Example | Lab", "2026-11-01", "d" * 64),
        DocumentInfo("/x/three.yaml", 3, "A Person", "1", "e" * 64),
    )
    policy = Policy((), (), (), Certify(min_refusal=0.9, delta=0.05), (), (), documents, "b" * 64)
    info = BaseInfo.of(base.name, base.weights_hash)
    settings = {"seed": 0, "lora": lora.model_dump(), "dpo": {"beta": 0.1}, "aligned_by": "A lab | 40 raters"}
    provenance = Provenance.of(info, policy, DEMANDS, settings)
    exporter = Exporter(path, AdapterFiles(adapted, lora, info), provenance)
    flats, alphas, results = {}, {}, []
    for n, (user, missed) in enumerate(MISSES.items()):
        flats[user] = 0.05 * torch.randn(adapted.params_per_user, generator=torch.Generator().manual_seed(n))
        verdict = certify(DEMANDS, refusals(0), (0.5, 1.0), lambda alpha, m=missed: refusals(int(m * (alpha - 0.4))))
        verdict = verdict._replace(clusters=Clustered(*(by_cluster([True] * 4, list("aabc"), 0.05),) * 2))
        alphas[user] = verdict.alpha
        found = measures(0.6 + 0.1 * n)
        data = DataInfo.of(pairs_of(user), n)
        written = exporter.write(user, flats[user], verdict, found, data) if verdict.admitted else None
        duals = {HAZARDS[0]: DualTrace(0.1, float(n), 0.2)}
        trained = TrainedUser(user, flats[user], "trained", "", 12, 1.5, 2, duals)
        results.append(outcome(trained, data.pairs, verdict, found, written, DEMANDS.in_pool, int(n == 1)))
    broken = TrainedUser("nan", None, "failed", "not finite", 3, 0.1, 2, {})
    results.append(outcome(broken, PairCounts(2, 1, 0), None, None, None, DEMANDS.in_pool, 0))
    results.append(skipped("empty", "no pairs left after screening", PairCounts(0, 0, 3)))
    write_results(path, results)
    (path / "config.yaml").write_text("name: tiny run\nbase:\n  model: /home/someone/models/tiny-base\n")
    (path / "policy.json").write_text(json.dumps(policy.to_json()))
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    dropped = {
        "user_id": "empty",
        "pair_id": "x",
        "file": "f",
        "line": 1,
        "action": "quarantined",
        "reason": "probe: t1",
    }
    (path / "screening.jsonl").write_text((json.dumps(dropped) + "\n") * 3)
    (path / "state").mkdir()
    (path / "state" / "slots.safetensors").write_bytes(b"working matter")
    write_report(path)
    write_run_manifest(path)
    yield Run(path, adapted, flats, alphas, exporter)
    adapted.close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of this test's own, which huggingface_hub is led to, and Ada's token; nobody waits between tries."""
    server = HubServer()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)  # PEFT's `file_exists` is made at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setenv("HF_TOKEN", ADAS_TOKEN)
    monkeypatch.setattr("persona_rlhf.release.hub_repository.sleep", server.waits.append)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    yield server
    server.close()
