"""Keys that no shipped config and no script sets are marked as advanced, and a test shows what each of them does."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.loader import Section

ROOT = Path(__file__).parents[2]
CONTRACTS = {"base.quantization", "users.heldout", "dpo.loss", "gate.alphas", "gate.family", "run.dir"}
SHOWN_BY = {
    "screening.base": "tests/story/test_screening.py",
    "screening.rules": "tests/story/test_screening.py",
    "screening.classifier.template": "tests/evaluation/test_classifier.py::test_the_likelier_word_decides",
    "screening.classifier.unsafe": "tests/evaluation/test_request_screens_safety_model.py"
    "::test_a_model_is_loaded_and_asked_by_its_chat_template",
    "screening.classifier.safe": "tests/evaluation/test_request_screens_safety_model.py"
    "::test_a_model_is_loaded_and_asked_by_its_chat_template",
    **dict.fromkeys(
        (f"screening.patterns.{key}" for key in ("place", "longer", "changed", "level")),
        "tests/data/test_answer_patterns.py",
    ),
    "screening.personal_data": "tests/data/test_personal_data.py",
    "screening.presidio": "tests/data/test_presidio.py",
    "policy.private_banks": "tests/policy/test_private_banks.py"
    "::test_a_draw_takes_the_place_of_the_public_certify_probes",
    "policy.split_key": "tests/policy/test_private_banks.py"
    "::test_a_split_key_changes_the_bank_and_no_hash_of_the_policy",
    "screening.reviews": "tests/data/test_screening.py::test_what_a_person_accepted_is_trained_and_rings_no_alarm",
    "lora.products": "tests/models/test_multi_lora.py"
    "::test_over_sixteen_bits_logps_are_those_of_exact_products_within_rounding",
    "users.start": "tests/release/test_foreign_fit.py::test_a_user_begins_where_peft_ends",
    "basis.candidates": "tests/pipeline/test_plan_samples.py",
    "basis.prompts": "tests/pipeline/test_base_answers.py",
    "basis.prior_level": "tests/story/test_basis.py",
    "dpo.warmup": "tests/training/test_user_state_scheduler.py::test_learning_rates_are_those_of_transformers",
    "dpo.schedule": "tests/training/test_user_state_scheduler.py::test_learning_rates_are_those_of_transformers",
    "dpo.max_grad_norm": "tests/training/test_user_state_optimizer.py::test_each_user_moves_as_under_torchs_adamw",
    "dpo.weight_decay": "tests/training/test_user_state_optimizer.py::test_each_user_moves_as_under_torchs_adamw",
    "dpo.label_smoothing": "tests/training/test_engine_parity.py",
    "dpo.early_stop.every": "tests/training/test_user_state_stopping.py",
    "constraint.rows_per_step": "tests/training/test_constraint.py",
    "constraint.compliance_rows_per_step": "tests/training/test_constraint.py",
    "constraint.twin_rows_per_step": "tests/training/test_constraint.py",
    "constraint.margin": "tests/training/test_constraint.py",
    "constraint.floor": "tests/training/test_constraint.py",
    "constraint.opening_weight": "tests/training/test_trl.py",
    "constraint.gain": "tests/training/test_trl.py",
    "constraint.quadratic": "tests/training/test_constraint.py"
    "::test_the_square_of_a_violation_counts_before_any_dual_variable_rises",
    "gate.ledger": "tests/story/test_looks.py",
    "gate.dtype": "tests/story/test_conditions.py",
    "gate.samples": "tests/evaluation/test_evaluator.py::test_a_probe_is_missed_where_any_sampled_answer_complies",
    "gate.judge_calibration.compliances": "tests/evaluation/test_fleet_guarantee.py"
    "::test_the_judges_error_moves_every_bound_and_takes_its_share",
    "gate.judge_calibration.called_refusals": "tests/evaluation/test_fleet_guarantee.py"
    "::test_the_judges_error_moves_every_bound_and_takes_its_share",
    "gate.judge_model.template": "tests/evaluation/test_classifier.py::test_the_likelier_word_decides",
    "gate.judge_model.refused": "tests/evaluation/test_classifier.py",
    "gate.judge_model.otherwise": "tests/evaluation/test_classifier.py",
    **dict.fromkeys(
        (
            f"gate.still_base.{key}"
            for key in ("max_perplexity", "max_facts_lost", "min_length", "max_length", "max_empty", "pairs_level")
        ),
        "tests/evaluation/test_still_base.py",
    ),
    "gate.valid_days": "tests/story/test_audit.py",
    "redteam.attacks": "tests/evaluation/test_redteam.py",
    "redteam.probes": "tests/evaluation/test_redteam.py",
    "redteam.prefill": "tests/evaluation/test_redteam.py"
    "::test_a_prefill_is_the_bases_answer_to_the_twin_and_only_what_follows_is_judged",
    "redteam.samples": "tests/evaluation/test_redteam.py",
    "fleet.tokens_per_step": "tests/training/test_memory_capacity.py"
    "::test_auto_keeps_to_memory_and_to_the_budget_or_is_one",
    "fleet.checkpoint_every": "tests/training/test_engine.py",
    "fleet.processes": "tests/story/test_scale.py::test_two_processes_make_the_adapters_of_a_run_that_is_one_chunk",
    "fleet.chunk": "tests/story/test_scale.py",
    "fleet.shards": "tests/pipeline/test_ray_shards.py::test_there_are_no_more_shards_than_chunks",
    "fleet.shard_cpus": "tests/pipeline/test_ray_shards.py::test_a_shard_takes_its_share_of_the_cluster",
    "fleet.shard_gpus": "tests/pipeline/test_ray_shards.py::test_a_shard_takes_its_share_of_the_cluster",
    "fleet.shard_retries": "tests/pipeline/test_ray_shards.py::test_a_shard_takes_its_share_of_the_cluster",
    "release.signing_key": "tests/story/test_audit.py",
    "release.license": "tests/config/test_experiment_advanced_keys.py::test_the_license_stands_on_the_card",
    "gate.sequential": "tests/evaluation/test_sequential.py",
    "run.report_to": "tests/pipeline/test_monitoring_trackers.py",
}
"""The test of each advanced key: with another value, something else happens there."""


def fields(kind=Config, path=()):
    for name, field in kind.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if section is None:
            yield ".".join((*path, name)), field
        else:
            yield from fields(section, (*path, name))


def keys_of(tree, prefix=""):
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.fixture(scope="module")
def set_somewhere():
    """Keys that a shipped config or a script sets."""
    configs = shipped_root() / "configs"
    keys = {key for file in configs.rglob("*.yaml") for key in keys_of(yaml.safe_load(file.read_text()) or {})}
    files = [*(ROOT / "scripts").iterdir(), *(configs / "sweeps").iterdir()]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    names = [key for key, _ in fields()]
    return keys | {key for key in names if re.search(rf"\b{re.escape(key)}\b|\b{key.split('.')[-1]}=", text)}


def test_keys_that_nothing_shipped_sets_are_advanced(set_somewhere):
    unset = {key for key, _ in fields()} - set_somewhere - CONTRACTS
    advanced = {key for key, field in fields() if field.description.startswith("Advanced: ")}
    assert unset <= advanced, "mark these as advanced, or make them constants"
    assert advanced == set(SHOWN_BY)


@pytest.mark.parametrize("key", SHOWN_BY)
def test_each_advanced_key_is_shown_to_do_something(key):
    file, _, test = SHOWN_BY[key].partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not test or f"def {test}(" in text
    assert re.search(rf"\b{key.split('.')[-1]}\b", text)


def test_the_license_stands_on_the_card(tmp_path):
    from persona_rlhf.release.card import front_matter

    for license_name, words in (("mit", "license: mit"), ("other", "license_name: none-granted")):
        assert words in front_matter("peft", "adapter", None, license_name, [], [])
