"""Verification of a run or an adapter folder: hashes of all files, and every number that can be recomputed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from persona_rlhf.common.chain import ChainHead
from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import sha256_of, slug
from persona_rlhf.common.run_lock import locks_run
from persona_rlhf.evaluation.records import Conditions
from persona_rlhf.evaluation.statistics import MissedUnits, SequentialBound, share_bound
from persona_rlhf.evaluation.still_base import StillBase
from persona_rlhf.policy.bound import Bound, look_share
from persona_rlhf.policy.composition import composed_sentence
from persona_rlhf.release.attestation import PAPERS, paper_faults, untrusted_export
from persona_rlhf.release.compatibility import CARD, CONFIG, WEIGHTS, lint
from persona_rlhf.release.deletion_records import adapter_folders, forgotten_faults
from persona_rlhf.release.integrity import (
    RUN_MANIFEST,
    AdapterRecord,
    audit_faults,
    ledger_faults,
    recertified_documents,
    run_manifest_faults,
)
from persona_rlhf.release.lifetimes import lapse_sentences, lapsed_here
from persona_rlhf.release.manifest import MANIFEST, POPULATION, read_manifest, uncertified_prompt, user_mark
from persona_rlhf.release.redteam_report import redteam_faults
from persona_rlhf.release.results import RESULTS, Result, RunResults, plain
from persona_rlhf.release.revocation import Revocation, revocation_faults, revoked, revoked_here, today
from persona_rlhf.release.signing import (
    SIGNATURE,
    Trust,
    document_faults,
    untrusted_adapters,
    untrusted_documents,
)

ADAPTER_FILES = (CARD, CONFIG, WEIGHTS)


class TrustedEvidence(NamedTuple):
    """Evidence from outside the folder: audit heads with their keepers, trusted keys, and lists of revocations."""

    heads: Sequence[tuple[str, ChainHead]] = ()
    trust: Trust | None = None
    revoked: Mapping[str, Revocation] = MappingProxyType({})


_NONE = TrustedEvidence()


def verify(folder: Path, witnesses: TrustedEvidence = _NONE) -> list[str]:
    """Every fault of a run folder or a single adapter folder; an empty list if there is none.

    Raises InputError if the folder is neither, or an audit head is given for an adapter, which has no audit.jsonl.
    """
    if is_adapter(folder):
        if witnesses.heads:
            sentence = "a head belongs to the audit.jsonl of a run; give RUN, not an adapter's folder"
            raise InputError([Problem(str(folder), None, "--head", sentence)])
        unsigned = [] if witnesses.trust is None else untrusted_export(folder, witnesses.trust)
        return [*adapter_faults(folder), *unsigned, *(revoked_here(folder, witnesses.revoked) or lapsed_here(folder))]
    if any((folder / name).exists() for name in (RESULTS, RUN_MANIFEST, "policy.json", "config.yaml")):
        return run_faults(folder, witnesses)
    sentence = "this is neither a run nor an adapter folder; give RUN or RUN/adapters/SLUG"
    raise InputError([Problem(str(folder), None, None, sentence)])


def is_adapter(folder: Path) -> bool:
    """Whether a folder is that of an adapter, and not of a run."""
    return any((folder / name).exists() for name in (*ADAPTER_FILES[1:], MANIFEST))


@locks_run("verify", shared=True)
def run_faults(run: Path, witnesses: TrustedEvidence = _NONE) -> list[str]:
    """Faults of a run: of its files, documents, results and audit.jsonl, and of every adapter against its result."""
    faults = run_manifest_faults(run)
    try:
        policy = json.loads((run / "policy.json").read_bytes())
        policy_hash, documents = policy["hash"], policy.get("documents", [])
        faults += document_faults(run, documents, recertified_documents(run))
        trust = witnesses.trust
        faults += [] if trust is None else untrusted_documents(run, documents, trust)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        return [*faults, f"policy.json cannot be read ({fault})"]
    adapters = list[AdapterRecord]()
    try:
        faults += revocation_faults(run, of_run := revoked(run))
        for result in RunResults(run):
            if result.slug != slug(result.user_id):
                faults.append(f"{RESULTS}: the slug `{result.slug}` is not that of its user")
            if result.has_adapter != (result.path is not None):
                faults.append(f"{RESULTS}: {result.slug} is {result.status}, but its path is {result.path}")
            if result.path is None:
                continue
            if result.path not in (f"adapters/{result.slug}", f"adapters/{result.slug[-2:]}/{result.slug}"):
                faults.append(f"{RESULTS}: {result.slug} has the path of another user")
                continue
            adapters.append(AdapterRecord(result.path, result.user_id, result.manifest_sha256))
            faults += [f"{result.path}: {fault}" for fault in adapter_faults(run / result.path, result, policy_hash)]
            digest = result.manifest_sha256 or ""
            if digest in witnesses.revoked and digest not in of_run:  # its own list is no fault: see revocation_notes
                faults.append(f"{result.path}: {witnesses.revoked[digest].sentence()}")
        faults += redteam_faults(run, {adapter.user_id: adapter.manifest_sha256 for adapter in adapters})
        present = {path.relative_to(run).as_posix() for path in adapter_folders(run)}
        extra = sorted(present - {adapter.path for adapter in adapters})
        faults += [f"{path}: no line of {RESULTS} released it" for path in extra]
    except InputError as fault:
        faults += map(str, fault.problems)
    faults += forgotten_faults(run)
    if trust is not None:
        faults += untrusted_adapters(run, [adapter.path for adapter in adapters], documents, trust)
    return faults + audit_faults(run, adapters, witnesses.heads) + ledger_faults(run)


def revocation_notes(run: Path) -> list[str]:
    """The adapters of a run that its list revokes, and lapsed ones: no fault; none of them is exported or served."""
    revocations, notes = revoked(run), list[str]()
    for result in RunResults(run):
        revocation = revocations.get(result.manifest_sha256 or "")
        lapse = lapse_sentences(run, result.slug, result.manifest_sha256) if revocation is None else []
        notes += [f"{result.path}: {sentence}" for sentence in ([revocation.sentence()] if revocation else lapse)]
    return notes


def conditions_of(folder: Path) -> list[str]:
    """The computations that the adapters of a run, or one adapter, were certified in, each as a sentence."""
    adapters = [folder] if (folder / MANIFEST).is_file() else adapter_folders(folder)
    contents = (read_manifest(adapter / MANIFEST)[0] or {} for adapter in adapters)
    sentences = {Conditions(**one["conditions"]).sentence() for one in contents if one.get("conditions")}
    return [f"{sentence[0].upper()}{sentence[1:]}; anything else is not covered." for sentence in sorted(sentences)]


def compositions_of(folder: Path) -> list[str]:
    """The texts before the certify probes of the adapters of a run, or of one adapter, each as a sentence."""
    adapters = [folder] if (folder / MANIFEST).is_file() else adapter_folders(folder)
    contents = (read_manifest(adapter / MANIFEST)[0] or {} for adapter in adapters)
    sentences = {composed_sentence(one["certified_with"]) for one in contents if one.get("certified_with")}
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sorted(sentences)]


def uncertified_prompts(run: Path, prompt_of: Callable[[str], str]) -> list[str]:
    """Sentences on system prompts that stand before requests here and that the gate did not certify.

    `prompt_of` gives the policy's system prompt for a user id, "" for none.
    """
    released = [result for result in RunResults(run) if result.path is not None]
    contents = ((read_manifest(run / str(one.path) / MANIFEST)[0], one.user_id) for one in released)
    sentences = (uncertified_prompt(content, prompt_of(user)) for content, user in contents if content is not None)
    return sorted({f"Here: {sentence}." for sentence in sentences if sentence is not None})


def adapter_faults(folder: Path, result: Result | None = None, policy_hash: str | None = None) -> list[str]:
    """Faults of one adapter folder, also against its result and its run's policy if these are given."""
    faults = undated_faults(folder, result, policy_hash)
    manifest, _ = read_manifest(folder / MANIFEST)
    until = ((manifest or {}).get("verdict") or {}).get("valid_until")
    return faults if until is None or str(until) >= today() else [*faults, f"its verdict expired on {until}"]


def undated_faults(folder: Path, result: Result | None = None, policy_hash: str | None = None) -> list[str]:
    """`adapter_faults` without the expiry of the verdict."""
    manifest, faults = read_manifest(folder / MANIFEST)
    if manifest is None:
        return faults
    try:
        faults += _file_faults(folder, manifest["files"])
        faults += _verdict_faults(manifest)
        if not faults:
            faults += _config_faults(json.loads((folder / CONFIG).read_bytes()), manifest)
            faults += _weight_faults(folder / WEIGHTS, manifest["settings"]["lora"]["rank"])
            faults += [str(finding) for finding in lint(folder) if finding.refused]
            faults += paper_faults(folder, manifest)
        if result is not None:
            faults += _line_faults(folder, manifest, result)
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        faults.append(f"{MANIFEST} lacks a required entry ({type(fault).__name__}: {fault})")
    if policy_hash is not None and manifest.get("policy", {}).get("hash") != policy_hash:
        faults.append("the policy in its manifest is not the one in policy.json")
    return faults


def _file_faults(folder: Path, files: dict[str, Any]) -> list[str]:
    faults = [f"{name} is not among the files of {MANIFEST}" for name in ADAPTER_FILES if name not in files]
    present = {file.name for file in folder.iterdir()}
    beside = {MANIFEST, MANIFEST + SIGNATURE, *PAPERS}
    faults += [f"{name} is not in {MANIFEST}" for name in sorted(present - set(files) - beside)]
    others = [folder / name for name in sorted(present & beside)]
    faults += [f"{file.name} is no regular file" for file in others if file.is_symlink() or not file.is_file()]
    for name, entry in files.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            faults.append(f"{name} is missing")
        elif sha256_of(file) != entry["sha256"]:
            faults.append(f"{name} was changed: its sha256 is not the one in {MANIFEST}")
    return faults


def _verdict_faults(manifest: dict[str, Any]) -> list[str]:
    """Bounds that do not follow from the counts, and a verdict that does not follow from the bounds."""
    verdict = manifest["verdict"]
    kind = SequentialBound if manifest["settings"].get("gate", {}).get("sequential") else Bound
    bound = kind(1 - verdict["confidence"], verdict.get("judge_error", 0.0))  # earlier manifests have no judge_error
    if not 0 <= bound.judge_error < 1:
        return ["the judge error is not between 0 and 1"]
    counts = {"pooled": verdict["pooled"], **verdict["categories"]}
    shares = [look.get("shares") or {} for look in verdict["looks"] if look["alpha"] == manifest["alpha"]]
    faults = []
    for name, count in counts.items():
        shown = _bound_of(count, shares[-1].get(name) if shares else None, bound)
        if shown is None or abs(shown - count["lower_bound"]) > 1e-9:
            faults.append(f"the lower bound of {name} does not follow from its counts")
    pool = [verdict["categories"][name] for name in verdict["pooled_over"]]
    if any(sum(count[key] for count in pool) != verdict["pooled"][key] for key in ("n", "refused", "base_refused")):
        faults.append("the pooled counts are not the sums of their categories")
    passes = all(count["lower_bound"] >= count["min_refusal"] for count in counts.values())
    if verdict["certified"] and not passes:
        faults.append("it is marked certified, but a bound is below the policy's min_refusal")
    released = [look for look in verdict["looks"] if look["passed"] and look["alpha"] == manifest["alpha"]]
    fixed = Bound(bound.level)
    if kind is SequentialBound and (spending := verdict.get("spending")):
        fixed = Bound(bound.level * min(1.0, look_share(spending["look"]) / spending["share"]))
    faults += [fault for look in released for fault in _beside_faults(look, bound, fixed)]
    if not verdict["admitted"] or not 0 < manifest["alpha"] <= 1:
        faults.append("the manifest says this adapter was held back, yet its folder is present")
    return faults


def _bound_of(count: dict[str, Any], evidence: dict[str, Any] | None, bound: Bound) -> float | None:
    """The lower bound of a demand; None where its shares of units do not add up to its counts.

    Counts of topics, or of probes that are units, need no evidence beside them.
    """
    if evidence is None:
        return bound.lower(count["refused"], count["n"])
    missed = sum(kind["missed"] * kind["units"] for kind in evidence["missed"])
    if missed != count["n"] - count["refused"] or evidence["clusters"] > count["n"]:
        return None
    return _bound_of_shares(evidence, bound)


def _bound_of_shares(evidence: dict[str, Any], bound: Bound) -> float | None:
    """The lower bound of a mean of shares; None where there can be no such units."""
    missed = tuple(MissedUnits(**kind) for kind in evidence["missed"])
    try:
        return share_bound(evidence["clusters"], evidence["largest"], missed, bound, evidence["min_refusal"])
    except ValueError:
        return None


def _beside_faults(look: dict[str, Any], bound: Bound, fixed: Bound) -> list[str]:
    """Faults of the counts beside those of categories in the test that released; earlier manifests have none.

    `fixed` is the bound of demands on fixed sets of prompts.
    """
    faults, passes = list[str](), True
    if count := look.get("phrasings"):
        shown = _bound_of_shares(count, bound)
        if shown is None or abs(shown - count["lower_bound"]) > 1e-9:
            faults.append("the lower bound of new phrasings does not follow from its counts")
        passes = count["lower_bound"] >= count["min_refusal"]
    for key, kept, most in (("over_refusal", "newly_refused", "max_over_refusal"), ("fixed", "kept", "max_changed")):
        if count := look.get(key):
            right = count["n"] - count[kept] if key == "over_refusal" else count[kept]
            if abs(1 - fixed.lower(right, count["n"]) - count["upper_bound"]) > 1e-9:
                faults.append(f"the upper bound of {key} does not follow from its counts")
            passes = passes and count["upper_bound"] <= count[most]
    if (measures := look.get("still_base")) and not _STILL_BASE.validate_python(measures).passes:
        faults.append("it passed, but by its own measures the adapter no longer is the base")
    return faults if passes else [*faults, "it passed, but a bound beside those of categories misses its demand"]


_STILL_BASE = TypeAdapter(StillBase)


def _config_faults(config: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    lora = manifest["settings"]["lora"]
    wanted = {
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "base_model_name_or_path": manifest["base"]["name"],
        "peft_type": "LORA",
        "bias": "none",
    }
    return [
        f"adapter_config.json says {key} = {config.get(key)!r}, the manifest {value!r}"
        for key, value in wanted.items()
        if config.get(key) != value
    ]


def _weight_faults(file: Path, rank: int) -> list[str]:
    import numpy as np
    from safetensors import SafetensorError, safe_open

    faults = []
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = set(tensors.keys())
            for name in sorted(names):
                tensor = tensors.get_tensor(name)
                side = 0 if name.endswith(".lora_A.weight") else 1 if name.endswith(".lora_B.weight") else None
                if side is None or tensor.ndim != 2 or tensor.shape[side] != rank:
                    faults.append(
                        f"the weights hold `{name}` of shape {tensor.shape}, which is no LoRA matrix of rank {rank}"
                    )
                elif not np.isfinite(tensor).all():
                    faults.append(f"the weights of `{name}` are not finite")
            other = {name.replace(".lora_A.", ".lora_B.") for name in names if ".lora_A." in name}
            if other != {name for name in names if ".lora_B." in name} or not names:
                faults.append("the weights do not pair every lora_A with a lora_B")
    except (SafetensorError, OSError, ValueError) as fault:
        faults.append(f"the weights cannot be read ({fault})")
    return faults


def _line_faults(folder: Path, manifest: dict[str, Any], result: Result) -> list[str]:
    """Disagreements between an adapter's manifest and its line in the run's results."""
    faults = []
    if sha256_of(folder / MANIFEST) != result.manifest_sha256:
        faults.append(f"{MANIFEST} is not the one that {RESULTS} names")
    if manifest["user"] != user_mark(result.user_id, manifest["data"]["fingerprint"]):
        faults.append("the user hash in persona.json does not match this line's user_id")
    status = "prior" if manifest.get("adapter") == POPULATION else "released"
    if manifest["alpha"] != result.alpha or result.status != status:
        faults.append(f"{RESULTS} says {result.status} at alpha {result.alpha:g}, {MANIFEST} {manifest['alpha']:g}")
    counts = {"pooled": manifest["verdict"]["pooled"], **manifest["verdict"]["categories"]}
    if plain({**(result.tier_one or {}), **result.tier_two}) != counts:
        faults.append(f"{RESULTS} and {MANIFEST} count refusals differently")
    return faults
