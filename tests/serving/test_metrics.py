from __future__ import annotations

import hashlib
import json

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from persona_rlhf.common.files import slug
from persona_rlhf.serving.access import METRICS_READER, make_tokens, read_tokens
from persona_rlhf.serving.local_engine import AdapterCache, BatchingEngine, LocalGenerator
from persona_rlhf.serving.metrics import ServerMetrics
from persona_rlhf.serving.openai_api import TextChunk, Usage
from persona_rlhf.serving.policy_filter import PolicyFilter
from persona_rlhf.serving.server import Gateway
from tests.serving.conftest import slugs
from tests.serving.live import live

ADA = slug("Ada")


def samples(text):
    return {
        (one.name.removeprefix("persona_rlhf_"), *(one.labels[key] for key in sorted(one.labels))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if not one.name.endswith("_created")
    }


def test_an_answer_is_counted_at_its_end():
    metrics = ServerMetrics(lambda: {"waiting_answers": 3})
    chunks = [TextChunk("a"), TextChunk("", "stop", Usage(5, 3), filtered="fallback")]
    assert list(metrics.counted("ann", chunks)) == chunks
    list(metrics.counted("ann", chunks[1:]))
    metrics.count_request("", "/../etc/passwd", 404)
    metrics.count_request("ann", "/v1/models/x", 200)
    assert samples(metrics.text().decode()) == {
        ("tokens_total", "prompt", "ann"): 10,
        ("tokens_total", "completion", "ann"): 6,
        ("policy_filtered_answers_total", "fallback", "ann"): 2,
        ("requests_total", "other", "404", ""): 1,
        ("requests_total", "/v1/models", "200", "ann"): 1,
        ("waiting_answers",): 3,
    }


@pytest.fixture
def made(tmp_path):
    return make_tokens(tmp_path / "tokens", [*slugs(), METRICS_READER])


def test_a_server_is_counted_and_only_the_metrics_token_reads_it(access, made, fleet, log, tmp_path):
    engine = BatchingEngine(fleet.adapted)
    cache = AdapterCache(access, list(fleet.adapted.spans.values()), budget=1 << 30)
    generator = LocalGenerator(fleet.adapted.base, cache, engine)
    redirect = PolicyFilter(redirect=lambda prompt: "Ask your doctor." if prompt == "w9" else None)
    hashes, metrics = read_tokens(tmp_path / "tokens"), ServerMetrics(generator.figures)
    app = Gateway(generator, access, hashes, log.append, redirect, metrics=metrics).app()
    with live(app, log.append) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

        def bearer(token):
            return {"Authorization": f"Bearer {token}"}

        for word, stream in (("w5", False), ("w6", True), ("w9", False)):
            body = {"model": ADA, "messages": [{"role": "user", "content": word}], "max_tokens": 2, "stream": stream}
            assert client.post("/v1/chat/completions", json=body, headers=bearer(made[ADA])).status_code == 200
        for token in ("nobody", made[ADA]):
            assert client.get("/metrics", headers=bearer(token)).status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/v1/models", headers=bearer(made[METRICS_READER])).status_code == 401
        response = client.get("/metrics", headers=bearer(made[METRICS_READER]))
    engine.close()
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    keys = {one["slug"]: one["key"] for one in map(json.loads, (tmp_path / "tokens").read_text().splitlines())}
    ada = hashlib.sha256(keys[ADA].encode()).hexdigest()[:12]
    counted = samples(response.text)
    assert counted["requests_total", "/v1/chat/completions", "200", ada] == 3
    assert counted["requests_total", "/metrics", "401", ""] == 3
    assert counted["policy_filtered_answers_total", "redirect", ada] == 1
    assert 2 <= counted["tokens_total", "completion", ada] <= 4
    assert (counted["adapters_in_memory",], counted["waiting_answers",]) == (1, 0)
    assert counted["adapter_bytes_in_memory",] == cache.bytes > 0
    for secret in (*slugs(), *made.values(), *keys.values()):
        assert secret not in response.text
    assert log == []
