import hashlib
import json
import random
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import slug
from persona_rlhf.evaluation.gate import certify
from persona_rlhf.policy.clusters import Clusters
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.release.integrity import write_run_manifest
from persona_rlhf.release.manifest import MANIFEST, DataInfo, rendered, self_hash
from persona_rlhf.release.results import read_results
from persona_rlhf.release.revocation import read_list, revoke
from persona_rlhf.release.verify import TrustedEvidence, revocation_notes, verify
from tests.release.conftest import DEMANDS, HAZARDS, refusals


def sealed_files(run):
    return [file for file in sorted(run.rglob("*")) if file.is_file() and "state" not in file.relative_to(run).parts]


def test_a_finished_run_and_each_adapter_verify(run):
    assert verify(run.path) == []
    adapters = sorted((run.path / "adapters").iterdir())
    assert len(adapters) == 3
    assert all(verify(folder) == [] for folder in adapters)


def test_any_flipped_byte_is_found(run):
    source = random.Random(5)
    files = sealed_files(run.path)
    assert {file.name for file in files} > {"config.yaml", "manifest.json", MANIFEST, "README.md", "report.html"}
    for file in files:
        raw = file.read_bytes()
        for place in {0, len(raw) - 1, *(source.randrange(len(raw)) for _ in range(6))}:
            file.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << source.randrange(8))]) + raw[place + 1 :])
            assert verify(run.path), f"{file.name} at byte {place}"
            if file.parent.parent.name == "adapters":
                assert verify(file.parent), f"{file.name} at byte {place}, adapter alone"
        file.write_bytes(raw)
    assert verify(run.path) == []


def test_missing_and_extra_files_are_found(run):
    for file in sealed_files(run.path):
        raw = file.read_bytes()
        file.unlink()
        assert verify(run.path), f"{file.name} missing"
        file.write_bytes(raw)
    adapter = next((run.path / "adapters").iterdir())
    for extra in (run.path / "notes.txt", adapter / "notes.txt", run.path / "adapters" / "stray"):
        extra.write_text("x")
        assert any(extra.name in fault for fault in verify(run.path)), extra
        extra.unlink()
    (run.path / "more").mkdir()
    assert verify(run.path) == ["more/ does not belong to a run"]


def change(folder, edit):
    """A forger who can write manifests as we do."""
    content = json.loads((folder / MANIFEST).read_bytes())
    edit(content)
    content["manifest_hash"] = self_hash(content)
    (folder / MANIFEST).write_bytes(rendered(content))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m["verdict"]["pooled"].update(refused=m["verdict"]["pooled"]["refused"] - 1), "does not follow"),
        (lambda m: m["verdict"]["pooled"].update(min_refusal=0.999), "below the policy's min_refusal"),
        (lambda m: m.update(alpha=0.0), "held back"),
        (lambda m: m["verdict"].update(admitted=False), "held back"),
        (lambda m: m["settings"]["lora"].update(alpha=99), "lora_alpha"),
        (lambda m: m["settings"]["lora"].update(rank=3), "r = 4"),
        (lambda m: m["base"].update(name="other"), "base_model_name_or_path"),
        (lambda m: m["files"].update({"../../policy.json": {"sha256": "0"}}), "missing"),
        (lambda m: m.pop("verdict"), "lacks a required entry"),
        (lambda m: m.update(files=[]), "lacks a required entry"),
        (lambda m: m["verdict"].update(judge_error=0.05), "does not follow"),
        (lambda m: m["verdict"].update(judge_error=-1), "not between 0 and 1"),
    ],
)
def test_a_consistent_forgery_is_found_in_the_adapter_alone(run, edit, words):
    folder = run.path / "adapters" / slug("Ada")
    change(folder, edit)
    assert any(words in fault for fault in verify(folder))
    assert verify(run.path)


def test_a_manifest_from_before_the_judges_error_still_verifies(run):
    folder = run.path / "adapters" / slug("Ada")
    change(folder, lambda m: m["verdict"].pop("judge_error"))
    assert verify(folder) == []


def test_a_forgery_that_is_sound_in_itself_is_found_in_the_run(run):
    """Swapped folders, another policy, another alpha: every adapter alone is well, the run is not."""
    one, two = (run.path / "adapters" / slug(user) for user in ("../../etc", "Ada"))
    spare = run.path / "adapters" / "spare"
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    assert verify(one) == []
    assert any("the user hash in persona.json" in fault for fault in verify(run.path))
    two.rename(spare)
    one.rename(two)
    spare.rename(one)
    (run.path / "policy.json").write_text(json.dumps({"hash": "f" * 64}))
    write_run_manifest(run.path)
    assert any("the policy in its manifest" in fault for fault in verify(run.path))


def test_a_held_back_user_with_a_folder_is_found(run):
    held = next(r for r in read_results(run.path) if r.status == "held_back")
    assert held.path is None
    assert not (run.path / "adapters" / held.slug).exists()
    shutil.copytree(run.path / "adapters" / slug("Ada"), run.path / "adapters" / held.slug)
    assert any("no line" in fault for fault in verify(run.path))


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(InputError, match="neither"):
        verify(tmp_path)


def double(folder):
    """Scales an adapter beyond its alpha: twice its B, and everything else as it was."""
    weights = folder / "adapter_model.safetensors"
    tensors = {name: 2 * t if ".lora_B." in name else t for name, t in load_file(weights).items()}
    weights.write_bytes(save(tensors, metadata={"format": "pt"}))


def test_an_adapter_scaled_beyond_its_alpha_is_found(run):
    folder = run.path / "adapters" / slug("Ada")
    double(folder)
    assert verify(folder) == [f"adapter_model.safetensors was changed: its sha256 is not the one in {MANIFEST}"]
    assert any("adapter_model.safetensors was changed" in fault for fault in verify(run.path))


def test_a_scale_put_into_the_config_is_found(run):
    """PEFT multiplies by lora_alpha / r: the weights may stay as they are."""
    file = run.path / "adapters" / slug("Ada") / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert any("adapter_config.json was changed" in fault for fault in verify(file.parent))


def test_a_scaled_adapter_with_forged_papers_is_found_in_its_run(run):
    """Alone it is sound in itself: no signature says who wrote it. The run's results hold the hash of its papers."""
    folder = run.path / "adapters" / slug("Ada")
    double(folder)
    raw = (folder / "adapter_model.safetensors").read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    change(folder, lambda m: m["files"]["adapter_model.safetensors"].update(sha256=digest, bytes=len(raw)))
    assert verify(folder) == []
    assert any(f"{MANIFEST} is not the one that results.jsonl names" in fault for fault in verify(run.path))


def test_a_lawful_revocation_is_a_note_of_the_run_and_a_fault_of_its_adapter(run):
    """The list of the run agrees with audit.jsonl. A copy of the adapter must not be used."""
    ada = next(result for result in read_results(run.path) if result.user_id == "Ada")
    [one] = revoke(run.path, [ada], "the law of 2027")
    write_run_manifest(run.path)
    sentence = f"it was revoked on {one.day}: the law of 2027"
    assert verify(run.path) == []
    assert revocation_notes(run.path) == [f"{ada.path}: {sentence}"]
    assert verify(run.path / ada.path) == [sentence]
    given = TrustedEvidence(revoked=read_list(run.path / "revoked.jsonl"))
    assert verify(run.path, given) == []
    (run.path / "revoked.jsonl").write_text("")
    faults = verify(run.path, given)
    assert f"{ada.path}: {sentence}" in faults  # another list revokes it, and the run's own does not
    assert any("revoked.jsonl lacks an adapter" in fault for fault in faults)


def written(run, clusters: Clusters):
    """The folder of an adapter that misses one probe, certified by these units."""
    demands = replace(DEMANDS, clusters=clusters)
    verdict = certify(demands, refusals(0), [1.0], lambda _: refusals(1))
    exporter = replace(run.exporter, provenance=replace(run.exporter.provenance, demands=demands))
    folder = run.path / exporter.write("Eve", run.flats["ada"], verdict, None, DataInfo.of([], 0)).path
    assert verify(folder) == []
    return folder, verdict


def test_bounds_of_whole_topics_are_recomputed(run):
    """40 topics of `terrorist_content` in two languages, one missed in one of them."""
    probes = [Probe(f"{n}", HAZARDS[0], f"{n}", f"t{n // 2}", "en", None, "certify", "topic") for n in range(80)]
    probes += [Probe(f"o{n}", name, f"o{n}", f"o{n}", "en", None, "certify", "topic")
               for name in (HAZARDS[1], "gambling") for n in range(len(refusals(0)[name]))]  # fmt: skip
    folder, verdict = written(run, Clusters.of(probes, HAZARDS))
    assert verdict.categories[HAZARDS[0]][:3] == (40, 39, 40)
    text = " ".join((folder / "README.md").read_text().split())
    assert "refused 39 of 40 | 40 |" in text
    assert "requests with each topic counted once" in text
    assert json.loads((folder / MANIFEST).read_text())["verdict"]["counted"] == "topics"
    change(folder, lambda content: content["verdict"]["pooled"].update(lower_bound=0.99))
    assert any("does not follow from its counts" in fault for fault in verify(folder))


def test_bounds_of_shares_are_recomputed_from_their_evidence(run):
    """80 new phrasings of a probe in each category; changed evidence, or a changed bound, is a fault."""
    probes = [Probe(f"{name} {n}", name, f"{name} {n}", "t", f"p{n}", None, "certify", "phrasing")
              for name in HAZARDS for n in range(80)]  # fmt: skip
    folder, verdict = written(run, Clusters.of(probes, HAZARDS))
    assert verdict.looks[0].shares["pooled"].missed == ((1, 2, 1),)
    assert verdict.looks[0].phrasings.clusters == 80
    assert "| bet on shares |" in (folder / "README.md").read_text()

    def of_look(name, value):
        return lambda content: content["verdict"]["looks"][0]["shares"]["pooled"].update({name: value})

    as_it_was = (folder / MANIFEST).read_bytes()
    for edit in (
        of_look("missed", []),
        of_look("missed", [{"missed": 2, "probes": 2, "units": 1}]),
        of_look("largest", 1),
        of_look("clusters", 79),
        lambda content: content["verdict"]["looks"][0].update(shares=None),
        lambda content: content["verdict"]["looks"][0]["phrasings"].update(clusters=81),
        lambda content: content["verdict"]["pooled"].update(lower_bound=0.99),
    ):
        change(folder, edit)
        assert any("does not follow from its counts" in fault for fault in verify(folder))
        (folder / MANIFEST).write_bytes(as_it_was)
