"""The bill of materials: valid by the official schema, complete, and bound to its folder."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from persona_rlhf.common.files import sha256_of
from persona_rlhf.release.bom import BOM, bill_of_materials
from persona_rlhf.release.export import export
from persona_rlhf.release.manifest import MANIFEST, POPULATION
from persona_rlhf.release.verify import verify


@pytest.fixture
def folder(run, tmp_path):
    return export(run.path, "ada", tmp_path / "out", bom=True)


def schema_fault(raw: bytes) -> object:
    return JsonStrictValidator(SchemaVersion.V1_7).validate_str(raw.decode())


def test_the_official_schema_accepts_it_and_a_fault_in_it_is_noticed(folder):
    raw = (folder / BOM).read_bytes()
    assert schema_fault(raw) is None
    assert json.loads(raw)["specVersion"] == "1.7", "the schema takes any version"
    assert schema_fault(raw.replace(b'"machine-learning-model"', b'"adapter"')) is not None
    assert verify(folder) == []


def test_it_names_base_data_policy_and_every_file(folder):
    content, manifest = json.loads((folder / BOM).read_bytes()), json.loads((folder / MANIFEST).read_bytes())
    listed = {part["name"]: part["hashes"][0]["content"] for part in content["components"] if "hashes" in part}
    files = {file.name: sha256_of(file) for file in folder.iterdir() if file.name != BOM}
    assert files.items() <= listed.items()
    documents = {part["hashes"][0]["content"] for part in content["components"] if part["name"].startswith("policy ")}
    assert documents == {document["sha256"] for document in manifest["policy"]["documents"]}
    adapter = content["metadata"]["component"]
    [base] = adapter["pedigree"]["ancestors"]
    assert base["name"] == manifest["base"]["name"]
    assert {"name": "persona-rlhf:weights_sha256", "value": "c" * 64} in base["properties"]
    data, _ = [part for part in content["components"] if part["type"] == "data"]
    assert {"name": "persona-rlhf:pairs.train", "value": "2"} in data["data"][0]["contents"]["properties"]
    metrics = {one["slice"]: one for one in adapter["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    pooled = manifest["verdict"]["pooled"]
    assert float(metrics["tier one"]["confidenceInterval"]["lowerBound"]) == pytest.approx(
        pooled["lower_bound"], abs=1e-6
    )
    assert "/home/someone" not in json.dumps(content)


def test_the_population_s_adapter_was_not_trained_on_the_pairs_of_its_user(folder):
    manifest = json.loads((folder / MANIFEST).read_bytes()) | {"adapter": POPULATION}
    raw = bill_of_materials(manifest, {file.name: file.read_bytes() for file in folder.iterdir() if file.name != BOM})
    assert schema_fault(raw) is None
    adapter = json.loads(raw)["metadata"]["component"]
    assert "mean preferences of a population" in adapter["description"]
    assert adapter["modelCard"]["modelParameters"]["datasets"] == []
    considerations = json.dumps(adapter["modelCard"]["considerations"])
    assert "the weights reveal preferences of a population on average" in considerations
    assert "preferences of one person" not in considerations
    data, _ = [part for part in json.loads(raw)["components"] if part["type"] == "data"]
    assert "trained on the mean preferences" in data["data"][0]["description"]


def test_a_bill_without_a_certificate_has_no_bound(folder):
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["verdict"] |= {"certified": False, "looks": []}
    raw = bill_of_materials(manifest, {file.name: file.read_bytes() for file in folder.iterdir() if file.name != BOM})
    assert schema_fault(raw) is None
    card = json.loads(raw)["metadata"]["component"]["modelCard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics
    assert not any("confidenceInterval" in one for one in metrics)
    assert not any("confidence of" in limit for limit in card["considerations"]["technicalLimitations"])


def test_it_has_the_minimum_elements_of_a_bill(folder):
    """NTIA, The Minimum Elements For a Software Bill of Materials (2021): author, time, names, versions, relations."""
    bill = Bom.from_json(json.loads((folder / BOM).read_bytes()))
    assert bill.metadata.timestamp is not None
    assert bill.metadata.tools.components
    assert bill.serial_number is not None
    related = {dependency.ref.value for dependency in bill.dependencies}
    for component in [bill.metadata.component, *bill.components]:
        assert component.name
        assert component.version or component.hashes
        assert component.bom_ref.value in related


def test_a_changed_bill_is_noticed_but_not_another_time(folder):
    content = json.loads((folder / BOM).read_bytes())
    content["metadata"]["timestamp"] = "2020-01-01T00:00:00Z"
    (folder / BOM).write_text(json.dumps(content))
    assert verify(folder) == []
    content["components"][0]["name"] = "another base"
    (folder / BOM).write_text(json.dumps(content))
    assert verify(folder) == [f"{BOM} is not the bill of these files"]
    for text in ("no JSON", "[" * 100_000, "3"):
        (folder / BOM).write_text(text)
        [fault] = verify(folder)
        assert fault.startswith(f"{BOM} ")


OWASP_FIELDS: dict[str, Callable[[dict, dict], object]] = {
    "Model name": lambda bill, model: model["name"],
    "Model version": lambda bill, model: model["version"],
    "Model description": lambda bill, model: model["description"],
    "Model download location": lambda bill, model: _references(bill, model, "distribution"),
    "Source repository": lambda bill, model: _references(bill, model, "vcs"),
    "Supplier": lambda bill, model: model["supplier"]["name"],
    "License": lambda bill, model: model["licenses"],
    "Primary purpose": lambda bill, model: model["modelCard"]["modelParameters"]["task"],
    "Domain": lambda bill, model: model["tags"],
    "Type of model": lambda bill, model: model["modelCard"]["modelParameters"]["approach"],
    "Hyperparameters": lambda bill, model: _named(model["modelCard"], "persona-rlhf:hyperparameter."),
    "Performance metrics": lambda bill, model: model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"],
    "Decision thresholds": lambda bill, model: _named(model["modelCard"], "persona-rlhf:decision_threshold."),
    "Energy consumption": lambda bill, model: model["modelCard"]["considerations"]["environmentalConsiderations"],
    "Training information": lambda bill, model: _step(bill, "training"),
    "Data preprocessing": lambda bill, model: _step(bill, "screening"),
    "Sensitive data usage": lambda bill, model: _data(bill, "preference pairs of one person")["sensitiveData"],
    "Explainability information": lambda bill, model: _named(model["modelCard"], "persona-rlhf:explainability"),
    "Known limitations": lambda bill, model: model["modelCard"]["considerations"]["technicalLimitations"],
    "Safety risk assessment": lambda bill, model: model["modelCard"]["considerations"]["ethicalConsiderations"],
    "Runtime dependencies": lambda bill, model: [one for one in bill["components"] if one["type"] == "library"],
    "Model lineage": lambda bill, model: model["pedigree"]["ancestors"],
    "Training datasets": lambda bill, model: model["modelCard"]["modelParameters"]["datasets"],
    "Test datasets": lambda bill, model: _data(bill, "certify probes"),
}
"""Fields and their places in CycloneDX 1.7: OWASP GenAI Security Project, AIBOM Field Mapping, coverage table.

https://github.com/GenAI-Security-Project/aibom-generator/blob/main/docs/aibom-field-mapping/README.md
"""

ABSENT = {
    "Model download location",
    "Source repository",
    "Energy consumption",
    "Explainability information",
    "Runtime dependencies",
}
"""Nothing in a manifest says them; docs/how-to/audit.md names them."""


def _references(bill: dict, model: dict, kind: str) -> list[dict]:
    references = [*bill.get("externalReferences", []), *model.get("externalReferences", [])]
    return [one for one in references if one["type"] == kind]


def _named(part: dict, prefix: str) -> list[dict]:
    return [one for one in part["properties"] if one["name"].startswith(prefix) and one["value"]]


def _step(bill: dict, name: str) -> str:
    [workflow] = bill["formulation"][0]["workflows"]
    return next(step["description"] for step in workflow["steps"] if step["name"] == name)


def _data(bill: dict, name: str) -> dict:
    return next(one["data"][0] for one in bill["components"] if one["type"] == "data" and one["name"] == name)


def absent_fields(bill: dict) -> set[str]:
    """The fields of the rubric that a bill lacks or leaves empty."""
    absent = set()
    for name, of in OWASP_FIELDS.items():
        try:
            present = bool(of(bill, bill["metadata"]["component"]))
        except (KeyError, StopIteration):
            present = False
        if not present:
            absent.add(name)
    return absent


def test_it_has_19_of_24_fields_of_owasp_s_mapping(folder):
    bill = json.loads((folder / BOM).read_bytes())
    assert len(OWASP_FIELDS) == 24
    assert absent_fields(bill) == ABSENT
    del bill["formulation"], bill["metadata"]["component"]["tags"]
    assert absent_fields(bill) == ABSENT | {"Domain", "Training information", "Data preprocessing"}
