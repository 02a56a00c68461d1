"""The bill of materials: valid by the official schema, complete, and bound to its folder."""

from __future__ import annotations

import json

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
    [data] = [part for part in content["components"] if part["type"] == "data"]
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
    [data] = [part for part in json.loads(raw)["components"] if part["type"] == "data"]
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
