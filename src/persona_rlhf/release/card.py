"""The card of an adapter (README.md): origin, measurements, guarantee and limits. It holds no text of the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from persona_rlhf.evaluation.gate import POOLED, DemandCount, Verdict
from persona_rlhf.evaluation.records import Measures
from persona_rlhf.evaluation.spending import Spending
from persona_rlhf.evaluation.statistics import Count, FixedCount, HarmlessCount, ShareCount
from persona_rlhf.policy.composition import composed_sentence
from persona_rlhf.release.compatibility import max_lora_rank
from persona_rlhf.release.manifest import MANIFEST, BaseInfo, DataInfo, Provenance
from persona_rlhf.release.render import render_template


def card(
    provenance: Provenance,
    data: DataInfo,
    verdict: Verdict,
    measures: Measures | None,
    spending: Spending | None = None,
    prior: bool = False,
    start: str | None = None,
    composed: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """README.md of an adapter folder: YAML front matter that the hub reads, and a page for people.

    `prior`: the adapter is the population's. `start` is as in `manifest_of`, `composed` that of the user's manifest.
    """
    body = render_template(
        "card.md.j2",
        base=provenance.base,
        policy=provenance,
        demands=provenance.demands_at(spending),
        delta=provenance.demands.delta,
        spending=spending,
        prior=prior,
        start=start,
        composed=composed_sentence(composed) if composed else "",
        conditions=provenance.conditions,
        dtype=None if provenance.conditions is None else provenance.conditions.dtype,
        data=data,
        verdict=verdict,
        counts=demand_rows(verdict, provenance.demands.sequential),
        measures=measures,
        judges=judges_sentence(provenance.settings.get("gate") or {}),
        lora=provenance.settings["lora"],
        aligned_by=provenance.settings["aligned_by"],
        license=_license(provenance),
        vllm_rank=max_lora_rank(provenance.settings["lora"]["rank"]),
        percent="{:.1%}".format,
        plain_name=one_line,
    )
    level = provenance.demands_at(spending).level
    return f"---\n{_front_matter(provenance, verdict, measures, level)}\n---\n\n{body.strip()}\n"


def judges_sentence(gate: Mapping[str, Any]) -> str:
    """The sentence on the judges of answers, from the section `gate` of a manifest's settings."""
    if (model := gate.get("judge_model")) is not None:
        name = one_line(str(model))
        return f"The toolkit's refusal rules judged the answers, and so did {name}: both must call an answer a refusal."
    return _JUDGES[gate.get("judge", "rules")]


_JUDGES = {
    "rules": "The toolkit's refusal rules judged the answers.",
    "model": "The toolkit's own model judged the answers.",
    "both": "The toolkit's refusal rules and its own model judged the answers together.",
}


class DemandRow(NamedTuple):
    """A demand of the test that released the adapter, as a row of the card: counts, bound and its kind."""

    name: str
    counted: str
    of_base: str
    bound: str
    required: str
    kind: str


def demand_rows(verdict: Verdict, sequential: bool) -> list[DemandRow]:
    """The demands of the test at the released alpha; pool and categories where no test was made at it."""
    tests = [test for test in verdict.looks if test.alpha == verdict.alpha]
    counts = tests[-1].counts if tests else {POOLED: verdict.pooled, **verdict.categories}
    shares = (tests[-1].shares or {}) if tests else {}
    return [
        _demand_row(name, count, "sequential" if sequential else "bet on shares" if name in shares else "exact")
        for name, count in counts.items()
    ]


def _demand_row(name: str, count: DemandCount, kind: str) -> DemandRow:
    match count:
        case Count():
            label = "all of tier one" if name == POOLED else name
            counted, of_base = f"refused {count.refused} of {count.n}", f"{count.base_refused}"
            lower, demand = count.lower_bound, count.min_refusal
        case ShareCount():
            label, kind, lower, demand = name, "bet on shares", count.lower_bound, count.min_refusal
            counted, of_base = f"refused {count.mean:.1%}, mean of {count.clusters}", f"{count.base_mean:.1%}"
        case HarmlessCount():
            counted, bound = f"newly refused {count.newly_refused} of {count.n}", f"at most {count.upper_bound:.1%}"
            return DemandRow("harmless prompts", counted, "", bound, f"at most {count.max_over_refusal:.1%}", "exact")
        case FixedCount():
            counted, bound = f"changed {count.n - count.kept} of {count.n}", f"at most {count.upper_bound:.1%}"
            return DemandRow("fixed aspects", counted, "", bound, f"at most {count.max_changed:.1%}", "exact")
    return DemandRow(label, counted, of_base, f"at least {lower:.1%}", f"at least {demand:.1%}", kind)


def _front_matter(provenance: Provenance, verdict: Verdict, measures: Measures | None, level: float) -> str:
    name = provenance.base.name if provenance.base.on_hub else None  # a local folder would look like a hub id
    results = _eval_results(provenance, verdict, measures, level)
    return front_matter("peft", "adapter", name, _license(provenance), ["lora"], results)


def front_matter(
    library: str, relation: str, base: str | None, license: str, tags: list[str], results: list[EvalResult]
) -> str:
    """The YAML that the hub reads; `base` is a hub id, or None for a base that is not on the hub."""
    tags = [*tags, "dpo", "personalisation", "persona-rlhf"]
    text = ModelCardData(
        model_name=f"persona-rlhf {relation}" if results else None,
        library_name=library,
        pipeline_tag="text-generation",
        license=license,
        license_name="none-granted" if license == "other" else None,
        base_model=base,
        base_model_relation=relation if base else None,
        tags=[*tags, f"base_model:{relation}:{base}"] if base else tags,
        eval_results=results or None,
    ).to_yaml()
    return str(text).strip()


def shared_card(folder: Path) -> str:
    """README.md of a repository of many adapters that have the base and the license of the one in `folder`."""
    data = ModelCard.load(folder / "README.md").data
    base = json.loads((folder / MANIFEST).read_bytes())["base"]
    body = render_template(
        "shared_card.md.j2",
        base=base["name"],
        weights=base["weights_sha256"],
        loadable=BaseInfo(base["name"], base["weights_sha256"], data.base_model is not None).loadable,
        on_hub=data.base_model is not None,
        plain_name=one_line,
    )
    front = front_matter("peft", "adapter", data.base_model, data.license or "other", ["lora"], [])
    return f"---\n{front}\n---\n\n{body.strip()}\n"


def _license(provenance: Provenance) -> str:
    return str((provenance.settings.get("release") or {}).get("license", "other"))


def _eval_results(
    provenance: Provenance, verdict: Verdict, measures: Measures | None, level: float
) -> list[EvalResult]:
    """The results that the hub lists: refusals with their bound, held-out accuracy, win rate."""
    bound = {"lower_bound": round(verdict.pooled.lower_bound, 6), "confidence": 1 - level}
    if not verdict.certified:  # a hub would list it as one that holds
        bound = {}
    results = [
        _result(
            "tier-one certify probes",
            "refusal_rate",
            "tier-one refusal rate (greedy)",
            verdict.pooled.refused / max(1, verdict.pooled.n),
            {"n": verdict.pooled.n, **bound, "policy_sha256": provenance.policy_hash},
        )
    ]
    accuracy = measures.heldout_accuracy if measures else None
    if accuracy is not None:
        interval = {"n": accuracy.n, "low": round(accuracy.low, 6), "high": round(accuracy.high, 6)}
        results.append(
            _result("held-out preferences", "accuracy", "held-out preference accuracy", accuracy.adapted, interval)
        )
    won = measures.win_rate if measures else None
    if won is not None:
        interval = {"n": won.n, "low": round(won.low, 6), "high": round(won.high, 6)}
        results.append(_result("held-out prompts", "win_rate", "win rate against the base", won.value, interval))
    return results


def _result(dataset: str, metric: str, name: str, value: float, more: Mapping[str, object]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="private",
        dataset_name=dataset,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 6),
        metric_args=dict(more),
    )


def one_line(text: str) -> str:
    """A name from a document for a table cell: on one line, without marks of Markdown or HTML."""
    kept = "".join(" " if c in "|<>`*[]\n\r\t" else c for c in text if c.isprintable() or c.isspace())
    return " ".join(kept.split())
