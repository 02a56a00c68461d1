"""`keys.yaml`: whose signature counts for which role; and whether a run's papers carry the signatures of their issuers.

Without it roles are self-declared: a document says of itself who issued it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.inputs.section import Section, in_order, read_section
from persona_rlhf.inputs.yaml_text import dotted, read_yaml
from persona_rlhf.release.documents import copy_of, signature_of
from persona_rlhf.release.manifest import MANIFEST, read_manifest
from persona_rlhf.release.signing import holds, key_id, public_bytes, read_signature

Role = Literal["model_provider", "application_provider", "releaser"]
_ISSUER: dict[int, Role] = {1: "model_provider", 2: "application_provider"}
SELF_DECLARED = "roles are self-declared: no keys were given to check signatures by (--trust)"


class _Keys(Section):
    """A file of trusted keys: for each role, the public keys as `policy keygen` prints them."""

    model_provider: list[str] = Field([], description="Who may sign documents of tier one.")
    application_provider: list[str] = Field([], description="Who may sign documents of tier two.")
    releaser: list[str] = Field([], description="Who may sign the manifests of adapters.")


class Trust(NamedTuple):
    """The trusted public keys (32 bytes each) of every role, by the ids that signatures call them by."""

    keys: Mapping[Role, Mapping[str, bytes]]

    def fault(self, file: Path, role: Role) -> str | None:
        """Why nobody of this role vouches for a file as it is; None where somebody does."""
        try:
            signature, content = read_signature(signature_of(file)), file.read_bytes()
        except FileNotFoundError:
            return f"no {role} has signed it"
        except (OSError, ValueError, KeyError, TypeError) as fault:
            return f"its signature cannot be read ({type(fault).__name__})"
        public = self.keys[role].get(signature.key)
        if public is None:
            return f"it is signed with the key {signature.key[:64]}, which is not a trusted key of any {role}"
        return (
            None
            if holds(public, signature, content)
            else f"the signature of the {role} is not over these bytes: something was changed"
        )


def read_trust(file: Path) -> Trust:
    """Reads a file of trusted keys. Raises InputError with every problem in it."""
    document = read_yaml(file)
    told = read_section(_Keys, document)
    keys: dict[Role, dict[str, bytes]] = {"model_provider": {}, "application_provider": {}, "releaser": {}}
    problems = list[Problem]()
    for role, known in keys.items():
        for number, text in enumerate(getattr(told, role)):
            try:
                public = public_bytes(text)
                known[key_id(public)] = public
            except ValueError as fault:
                place = document.place((role, number))
                problems.append(Problem(place.file, place.line, dotted((role, number)), str(fault)))
    if problems:
        raise InputError(in_order(problems))
    return Trust(keys)


def untrusted_documents(run: Path, documents: Sequence[Mapping[str, Any]], trust: Trust) -> list[str]:
    """Which of a run's documents of tiers one and two nobody of the issuer's role has signed."""
    faults = []
    for document in documents:
        role = _ISSUER.get(document["tier"])
        if role is not None and (fault := trust.fault(copy_of(run, document["sha256"]), role)) is not None:
            faults.append(f"{document['path']} (tier {document['tier']}, {document['issuer']}): {fault}")
    return faults


def untrusted_adapters(
    run: Path, folders: Iterable[str], documents: Sequence[Mapping[str, Any]], trust: Trust
) -> list[str]:
    """Which adapters of a run no releaser has signed, or signed under other documents than policy.json names."""
    own = {document["sha256"] for document in documents if document["tier"] in _ISSUER}
    faults = []
    for path in folders:
        faults += [f"{path}: {fault}" for fault in untrusted_adapter(run / path, trust)]
        manifest, _ = read_manifest(run / path / MANIFEST)
        told = (manifest or {}).get("policy", {}).get("documents", [])
        if {document["sha256"] for document in told} != own:
            faults.append(f"{path}: {MANIFEST} names other policy documents than policy.json")
    return faults


def untrusted_adapter(folder: Path, trust: Trust) -> list[str]:
    """Why no releaser vouches for an adapter's manifest, and so for its files; an empty list where one does."""
    fault = trust.fault(folder / MANIFEST, "releaser")
    return [] if fault is None else [f"{MANIFEST}: {fault}"]
