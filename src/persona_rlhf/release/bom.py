"""A bill of materials of an exported adapter: CycloneDX 1.7 JSON with a model card (ECMA-424, ML-BOM)."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from persona_rlhf.common.clock import now
from persona_rlhf.release.compatibility import WEIGHTS
from persona_rlhf.release.manifest import POPULATION

BOM = "bom.cdx.json"
_ADAPTER, _BASE, _PAIRS, _PROBES = "adapter", "base", "preference-pairs", "certify-probes"


def bill_of_materials(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """`bom.cdx.json`: base, data, policy documents and files of an adapter, with its model card.

    `files` are the other files of the folder. The content follows from them and the manifest, except the timestamp.
    """
    content = bom_content(manifest, {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()})
    content["metadata"]["timestamp"] = now()
    return (json.dumps(content, indent=2) + "\n").encode()


def bom_faults(raw: bytes, manifest: Mapping[str, Any], digests: Mapping[str, str]) -> list[str]:
    """The fault of a bill that does not describe these files (sha256 by name) and this manifest, if it has it.

    Raises ValueError for no JSON.
    """
    content = json.loads(raw)
    if isinstance(content, dict) and isinstance(content.get("metadata"), dict):
        content["metadata"].pop("timestamp", None)
    return [] if content == bom_content(manifest, digests) else [f"{BOM} is not the bill of these files"]


def bom_content(manifest: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """A bill without its timestamp. `digests` are the sha256 of the files of the folder, without the bill."""
    toolkit = manifest["toolkit"]
    documents = [
        {
            "type": "file",
            "bom-ref": f"policy-{document['sha256'][:16]}",
            "name": f"policy document of tier {document['tier']}",
            "version": str(document["version"]),
            "publisher": document["issuer"],
            "hashes": _sha256(document["sha256"]),
        }
        for document in manifest["policy"]["documents"]
    ]
    listed = [
        {"type": "file", "bom-ref": f"file-{name}", "name": name, "hashes": _sha256(digests[name])}
        for name in sorted(digests)
    ]
    components = [_base(manifest), _pairs(manifest), *_probes(manifest), *documents, *listed]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, manifest['manifest_hash'])}",
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "post-build"}],
            "tools": {"components": [{"type": "application", **toolkit}]},
            "component": _adapter(manifest, digests[WEIGHTS]),
            **_supplier(manifest),
        },
        "components": components,
        "formulation": [_formula(manifest)],
        "dependencies": [
            {"ref": _ADAPTER, "dependsOn": sorted(component["bom-ref"] for component in components)},
            *({"ref": component["bom-ref"], "dependsOn": []} for component in components),
        ],
    }


def _adapter(manifest: Mapping[str, Any], weights_sha256: str) -> dict[str, Any]:
    settings = manifest["settings"]
    license_name = (settings.get("release") or {}).get("license", "other")
    lora = settings["lora"]
    return {
        "type": "machine-learning-model",
        "bom-ref": _ADAPTER,
        "name": f"adapter-{manifest['user'][:16]}",
        "version": manifest["manifest_hash"][:16],
        "description": f"A LoRA adapter that DPO trained on {_trained_on(manifest)}.",
        "tags": ["natural language processing", "personalised text generation", "LoRA", "DPO"],
        **_supplier(manifest),
        "hashes": _sha256(weights_sha256),
        "licenses": [{"license": {"name": "none granted" if license_name == "other" else license_name}}],
        "pedigree": {
            "ancestors": [{**_base(manifest), "bom-ref": "pedigree-base"}],
            "notes": f"LoRA of rank {lora['rank']}, released at alpha {manifest['alpha']:g}; the base is unchanged.",
        },
        "modelCard": _model_card(manifest),
        "properties": _properties({
            "manifest_hash": manifest["manifest_hash"],
            "policy_hash": manifest["policy"]["hash"],
            "tier_one_hash": manifest["policy"]["tier_one_hash"],
            "data_fingerprint": manifest["data"]["fingerprint"],
            "base_aligned_by": settings.get("aligned_by"),
        }),
    }  # fmt: skip


def _supplier(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The issuer under whose policy the adapter was released: of the document of the lowest of tiers one and two."""
    documents = sorted(manifest["policy"]["documents"], key=lambda document: document["tier"])
    return {"supplier": {"name": documents[-1]["issuer"]}} if documents else {}


def _trained_on(manifest: Mapping[str, Any]) -> str:
    prior = manifest.get("adapter") == POPULATION
    return "the mean preferences of a population" if prior else "the preference pairs of one person"


def _revealed(manifest: Mapping[str, Any]) -> str:
    return "a population on average" if manifest.get("adapter") == POPULATION else "one person"


def _base(manifest: Mapping[str, Any]) -> dict[str, Any]:
    base = manifest["base"]
    stored = {"quantization": base.get("quantization")}
    return {
        "type": "machine-learning-model",
        "bom-ref": _BASE,
        "name": base["name"],
        "version": base["weights_sha256"][:16],
        "description": "The base. Its sha256 is over its weights, as the toolkit computes it.",
        "properties": _properties({"weights_sha256": base["weights_sha256"], **stored}),
    }


def _pairs(manifest: Mapping[str, Any]) -> dict[str, Any]:
    data = manifest["data"]
    counts = {f"pairs.{name}": number for name, number in data["pairs"].items()}
    kinds = {f"source.{kind}": number for kind, number in data["sources"].items()}
    days = {"first_day": data["first_day"], "last_day": data["last_day"]}
    return {
        "type": "data",
        "bom-ref": _PAIRS,
        "name": "preference pairs of one person",
        "version": data["fingerprint"][:16],
        "data": [
            {
                "type": "dataset",
                "name": "preference pairs of one person",
                "contents": {"properties": _properties({**counts, **kinds, **days})},
                "classification": "personal data",
                "description": f"The adapter was not trained on them. It was trained on {_trained_on(manifest)}."
                if manifest.get("adapter") == POPULATION
                else "The adapter was trained on them.",
                "sensitiveData": ["preferences of one person; no text of them is in this folder"],
            }
        ],
    }


def _probes(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data that the gate tested on; manifests of earlier versions do not name it."""
    bank = manifest["policy"].get("bank")
    if bank is None:
        return []
    return [
        {
            "type": "data",
            "bom-ref": _PROBES,
            "name": "certify probes",
            "version": str(bank["sha256"])[:16],
            "data": [
                {
                    "type": "dataset",
                    "name": "certify probes",
                    "contents": {"properties": _properties({f"bank.{name}": value for name, value in bank.items()})},
                    "description": "Requests of the policy's hazard categories that the gate asked. Not trained on.",
                }
            ],
        }
    ]


def _formula(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the adapter came to be: screening, training and test, in their order."""
    settings, verdict, pairs = manifest["settings"], manifest["verdict"], manifest["data"]["pairs"]
    prior = manifest.get("adapter") == POPULATION
    trained = (
        "The adapter is the mean of a population; the pairs did not train it."
        if prior
        else f"DPO on {pairs['train']} pairs, with a constraint on refusals; {pairs['heldout']} pairs were held out."
    )
    steps = [
        {"name": "screening", "description": f"{pairs['screened_out']} pairs were taken out before training."},
        {"name": "training", "description": trained},
        {
            "name": "test",
            "description": f"The gate asked {verdict['pooled']['n']} certify probes in {len(verdict['looks'])} tests.",
        },
    ]
    used = [_BASE] if prior else [_BASE, _PAIRS]
    return {
        "bom-ref": "formula",
        "workflows": [
            {
                "bom-ref": "workflow",
                "uid": manifest["manifest_hash"],
                "name": "from preference pairs to a released adapter",
                "taskTypes": ["build", "test", "release"],
                "inputs": [{"resource": {"ref": name}} for name in used],
                "outputs": [{"type": "artifact", "resource": {"ref": _ADAPTER}}],
                "steps": steps,
                "properties": _properties({"seed": settings.get("seed")}),
            }
        ],
    }


def _hyperparameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The single values of the sections that train."""
    return {
        f"hyperparameter.{section}.{name}": value
        for section in ("lora", "dpo", "constraint")
        for name, value in sorted((settings.get(section) or {}).items())
        if isinstance(value, (int, float, str))
    }


def _model_card(manifest: Mapping[str, Any]) -> dict[str, Any]:
    verdict = manifest["verdict"]
    demands = {"tier one": verdict["pooled"], **verdict["categories"]}
    units = "topics of certify probes" if verdict.get("counted") == "topics" else "certify probes"
    conditions = manifest.get("conditions") or {}
    tested_on = ", ".join(f"{name} {value}" for name, value in sorted(conditions.items()))
    limits = [
        "The bounds cover requests like the certify probes. Ciphers, long conversations and attacks are not.",
        f"The bounds hold for the computation that was tested: {tested_on or 'not recorded'}.",
        f"Each lower bound has a confidence of {verdict['confidence']:.4f}.",
        f"The bounds allow for a judge error of {verdict.get('judge_error') or 0:.4f}.",
    ]
    if not verdict["certified"]:
        limits = ["The gate certified nothing, so no rate of refusals has a bound."]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "architectureFamily": "transformer",
            "datasets": [] if manifest.get("adapter") == POPULATION else [{"ref": _PAIRS}],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {
                    "type": f"refusal rate on {count['n']} {units}",
                    "slice": name,
                    "value": f"{count['refused'] / max(1, count['n']):.6f}",
                    **(
                        {"confidenceInterval": {"lowerBound": f"{count['lower_bound']:.6f}", "upperBound": "1"}}
                        if verdict["certified"]
                        else {}
                    ),
                }
                for name, count in demands.items()
            ]
        },
        "considerations": {
            "users": ["the person to whom the adapter was released"],
            "useCases": [f"answers in the style that {_revealed(manifest)} prefers, within the rules of the policy"],
            "technicalLimitations": limits,
            "ethicalConsiderations": [
                {
                    "name": "answers to hazardous requests",
                    "mitigationStrategy": f"constrained training; a gate with error at most {verdict['delta']:g} "
                    f"{'certified' if verdict['certified'] else 'did not certify'} the refusals",
                },
                {
                    "name": f"the weights reveal preferences of {_revealed(manifest)}",
                    "mitigationStrategy": "no id and no text of this person is in the folder; the weights are open",
                },
            ],
        },
        "properties": _properties(
            {
                **_hyperparameters(manifest["settings"]),
                **{f"decision_threshold.{name}": count["min_refusal"] for name, count in demands.items()},
            }
        ),
    }


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name and value pairs of the namespace of this toolkit, without unknown ones."""
    return [
        {"name": f"persona-rlhf:{name}", "value": str(value)} for name, value in values.items() if value is not None
    ]
