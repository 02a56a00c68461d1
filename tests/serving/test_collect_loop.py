"""The loop of feedback in short: choices on the page, pairs for `add`, and a new adapter behind the same page.

The adapter is written as `add` writes it, but not trained; `tests/story/test_collect.py` trains one.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from persona_rlhf.common.files import sha256_of
from persona_rlhf.config.experiment import read_run_config
from persona_rlhf.data.check import check
from persona_rlhf.data.choice_ledger import CHOICES, ChoiceLedger
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.wish_documents import WishDesk
from persona_rlhf.evaluation.gate import certify
from persona_rlhf.pipeline.export_choices import export_choices
from persona_rlhf.release.manifest import DataInfo
from persona_rlhf.release.results import outcome, read_results, write_results
from persona_rlhf.serving.answer_sampler import AnswerSampler
from persona_rlhf.serving.collect import FeedbackPages
from persona_rlhf.serving.collect_links import make_links
from persona_rlhf.serving.comparisons import OpenComparisons, Suggestions
from persona_rlhf.serving.local_engine import local_run
from persona_rlhf.serving.policy_filter import PolicyFilter, policy_of_run
from persona_rlhf.training.engine import TrainedUser
from tests.release.conftest import DEMANDS, measures, refusals
from tests.serving.collect_browser import Browser

USER = "newcomer"


def add(run) -> str:
    """Releases an adapter of the user in the run; the hash of its weights."""
    flat = 0.05 * torch.randn(run.adapted.params_per_user, generator=torch.Generator().manual_seed(9))
    verdict = certify(DEMANDS, refusals(0), (0.5, 1.0), lambda _: refusals(0))
    data = DataInfo.of([replace(pair, user_id=USER) for pair in read_pairs(run.path / "choices.jsonl", 0.25)], 0)
    written = run.exporter.write(USER, flat, verdict, measures(0.7), data)
    trained = TrainedUser(USER, flat, "trained", "", 12, 1.5, 2, {})
    line = outcome(trained, data.pairs, verdict, measures(0.7), written, DEMANDS.in_pool, 0)
    write_results(run.path, [*read_results(run.path), line])
    return sha256_of(run.path / line.path / "adapter_model.safetensors")


def shorter(browser: Browser) -> str:
    """The choice of a user with a written-down taste: of two answers, the one with fewer letters is better."""
    texts = re.findall(r'Answer \d</h2>\n<div class="text" dir="auto">(.*?)</div>', browser.response.text, re.DOTALL)
    left, right = map(len, texts)
    return "tie" if left == right else "left" if left < right else "right"


def test_choices_become_pairs_and_the_next_answers_come_from_the_new_adapter(served_run, log):
    config = read_run_config(served_run.path)
    policy = policy_of_run(served_run.path, config.policy.documents)
    ledger = ChoiceLedger(served_run.path / CHOICES)
    with local_run(served_run.path, config.judged_base, config.lora, 1 << 20, log.append) as served:
        sampler = AnswerSampler(served.generator, served.access, PolicyFilter.of(policy), served.access.weights_hash, 6)
        desk = WishDesk(served_run.path, tuple(config.policy.documents), policy)
        pages = FeedbackPages(served_run.path, sampler, ledger, Suggestions([]), OpenComparisons(set), desk, log.append)
        browser = Browser(pages.app())
        browser.get(f"/enter/{make_links(served_run.path, [USER], 1.0)[USER]}")
        browser.send("/consent")
        for number in range(5, 15):
            browser.send("/ask", prompt=f"w{number} w{number + 1}")
            browser.send("/choose", verdict=shorter(browser))
        first = ledger.choices(USER)
        preferred = [choice for choice in first if choice.pair is not None]
        out = served_run.path / "choices.jsonl"
        assert export_choices(served_run.path, config, ledger, out).chosen == len(preferred)
        assert all(len(pair.chosen) <= len(pair.rejected) for pair in read_pairs(out, 0.25))  # ties are pairs too
        assert check([out]).pairs == len(preferred)
        weights = add(served_run)
        browser.send("/ask", prompt="w5 w6")
        assert "Your assistant was updated" in browser.response.text
        browser.send("/choose", verdict="tie")
    last = ledger.choices(USER)[-1]
    ledger.close()
    assert {author for choice in first for author in (choice.left_by, choice.right_by)} == {"base"}
    assert (last.left_by, last.right_by) == (weights, weights)
    assert log == []
