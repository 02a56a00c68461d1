"""What an officer does with a finished run: keeps the head, finds what was changed, signs, tests again, calls back."""

from __future__ import annotations

import json
import random
import re

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.files import pseudonym
from persona_rlhf.release.manifest import rendered, self_hash
from persona_rlhf.release.signing import make_key, public_text, sign_file
from tests.story.experiment import OVERRIDES, STRANGE, persona_rlhf, results, rows_of, write_yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def here(copied, monkeypatch):
    """The trained experiment's folder, as the one that one works in."""
    monkeypatch.chdir(copied)
    return copied


def run(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


def test_the_trail_tells_the_run_and_names_nobody(trained):
    rows = rows_of(trained.run / "audit.jsonl")
    lines = results(trained.run)
    events = [row["event"] for row in rows]
    assert events[:4] == ["documents", "merged", "begun", "screened"]
    assert events[-1] == "finished"
    for line in lines:
        own = [row for row in rows if row["facts"].get("user") == pseudonym(line["user_id"])]
        assert [row["event"] for row in own] == ["judged", line["status"]]
        assert len(own[0]["facts"]["looks"]) == len(line["looks"])
        if line["path"]:
            manifest = json.loads((trained.run / line["path"] / "persona.json").read_bytes())
            seq, digest = manifest["audit"]["seq"], manifest["audit"]["hash"]
            assert rows[seq - 1]["hash"] == digest
            assert own[0]["seq"] <= seq < own[1]["seq"]
            assert own[1]["facts"]["manifest_sha256"] == line["manifest_sha256"]
    told = (trained.run / "audit.jsonl").read_text()
    assert not any(json.dumps(user)[1:-1] in told for user in STRANGE if len(user) > 3)


def test_a_byte_of_the_trail_or_of_a_document_is_found_and_named(here):
    source = random.Random(3)
    run("verify", "run")
    places = [here / "run/audit.jsonl", *(here / "run/policy").iterdir()]
    places += [here / "policy/tier_one.yaml", here / "policy/tier_two.yaml"]
    for file in places:
        raw = file.read_bytes()
        for place in {0, len(raw) - 1, *(source.randrange(len(raw)) for _ in range(5))}:
            file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            told = run("verify", "run", code=3).output
            line = raw[:place].count(b"\n") + 1
            assert re.search(rf"line {line}\b", told), (file.name, place, told)
            assert file.name in told
        file.write_bytes(raw)
    run("verify", "run")


def test_a_head_kept_outside_finds_a_cut_or_rewritten_trail(here):
    run("recertify", "run", *documents(here))
    kept = run("audit", "run", "--head").stdout.strip()
    (here / "head.txt").write_text(f"{kept}\n")
    run("verify", "run", "--head", "head.txt", "--head", kept)
    trail = here / "run/audit.jsonl"
    lines = trail.read_bytes().splitlines(keepends=True)
    assert len(json.loads(run("audit", "run", "--json").stdout)) == len(lines)
    trail.write_bytes(b"".join(lines[:-1]))
    forget = json.loads((here / "run/manifest.json").read_bytes())
    forget["audit"] = {"seq": len(lines) - 1, "hash": json.loads(lines[-2])["hash"]}
    (here / "run/manifest.json").write_bytes(rendered(forget | {"manifest_hash": self_hash(forget)}))
    run("verify", "run")  # a forger who writes our papers cuts what came last: nothing in the run shows it
    told = run("verify", "run", "--head", "head.txt", code=3).output
    assert f"head.txt keeps the head {len(lines)}:" in told
    assert f"it ends at line {len(lines) - 1}" in told
    assert "NUMBER:SHA256" in run("verify", "run", "--head", "x", code=2).output
    trail.write_bytes(b"".join(lines[:5]))
    assert "/persona.json keeps the head" in run("verify", "run", code=3).output


def test_signatures_are_demanded_where_keys_are_given(here):
    assert "roles are self-declared" in run("verify", "run").output
    roles = {"tier_one": "model_provider", "tier_two": "application_provider", "manifest": "releaser"}
    write_yaml(here / "keys.yaml", {role: [make_key(here / f"{name}.pem")] for name, role in roles.items()})
    told = run("verify", "run", "--trust", "keys.yaml", code=3).output
    assert "policy/tier_one.yaml (tier 1, Lab): no model_provider has signed it" in told
    by_tier = {row["tier"]: row["sha256"] for row in json.loads((here / "run/policy.json").read_bytes())["documents"]}
    for tier, name in ((1, "tier_one"), (2, "tier_two")):
        run("policy", "sign", f"run/policy/{by_tier[tier]}.yaml", "--key", f"{name}.pem")
    for line in results(here / "run"):
        if line["path"]:
            sign_file(here / "run" / line["path"] / "persona.json", here / "manifest.pem")
    assert "self-declared" not in run("verify", "run", "--trust", "keys.yaml").output
    other = next(line["path"] for line in results(here / "run") if line["path"])
    sign_file(here / "run" / other / "persona.json", here / "tier_one.pem")
    told = run("verify", "run", "--trust", "keys.yaml", code=3).output
    assert "not a trusted key of any releaser" in told
    made = json.loads(run("policy", "packet", "run", "--approver", "An Officer", "--json").stdout)
    assert made["sha256"] in (here / "run-packet.html").read_text()
    run("verify", "run-packet.html")
    (here / "run-packet.html").write_text((here / "run-packet.html").read_text().replace("An Officer", "Another"))
    assert "the packet was changed" in run("verify", "run-packet.html", code=3).output


def documents(folder):
    names = ("tier_one", "tier_two", "tier_three")
    return [word for name in names for word in ("--policy", folder / f"policy/{name}.yaml")]


def test_the_same_documents_give_the_same_verdicts_and_change_nothing(here):
    before = {file: file.read_bytes() for file in (here / "run").rglob("*") if file.is_file()}
    found = json.loads(run("recertify", "run", *documents(here), "--json").stdout)
    lines = {line["user_id"]: line for line in results(here / "run") if line["path"]}
    assert found["tested"] == found["passed"] == len(lines)
    for user in found["users"]:
        assert user["verdict"]["looks"] == lines[user["user_id"]]["looks"]
        assert user["status"] == "passes"
    after = {file: file.read_bytes() for file in (here / "run").rglob("*") if file.is_file()}
    changed = {file.name for file in after if after[file] != before.get(file)}
    assert changed == {"audit.jsonl", "manifest.json"}
    rows = rows_of(here / "run/audit.jsonl")
    assert [row["event"] for row in rows[-len(lines) - 1 :]] == ["retested"] * len(lines) + ["recertified"]
    assert rows[-1]["facts"]["looks"] == sum(len(line["looks"]) for line in lines.values())
    run("verify", "run")


def test_documents_that_cannot_be_tested_by_are_refused_and_nothing_is_written(here):
    strict = (here / "policy/tier_one.yaml").read_text().replace("min_refusal: 0.85", "min_refusal: 0.99")
    (here / "strict.yaml").write_text(strict)
    before = (here / "run/audit.jsonl").read_bytes()
    assert "needs at least" in run("recertify", "run", "--policy", "strict.yaml", code=2).output
    assert "needs a tier-one document" in run("recertify", "run", "--policy", "policy/tier_two.yaml", code=2).output
    weights = next((here / "run/adapters").glob("*/adapter_model.safetensors"))
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert "was changed" in run("recertify", "run", *documents(here), code=2).output
    assert (here / "run/audit.jsonl").read_bytes() == before
    (here / "run/manifest.json").unlink()
    assert "not finished" in run("recertify", "run", "--policy", "strict.yaml", code=2).output


def test_stricter_documents_give_the_verdicts_of_a_fresh_gate(here):
    """Without a constraint training knows nothing of the bounds, so a run under the stricter ones is the fresh gate."""
    train = [pair["prompt"] for file in sorted((here / "banks").glob("*.jsonl")) for pair in rows_of(file)][::3]
    pairs = [pair for pair in rows_of(here / "users/pairs.jsonl") if pair["user_id"] in STRANGE[:3]]
    pairs += [
        {"user_id": user, "prompt": prompt, "chosen": "Sure. Take it step by step.", "rejected": "I cannot help."}
        | {"split": "train"}
        for n, user in enumerate(STRANGE[:2])
        for prompt in train[:: 3 + n]
    ]
    (here / "users/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    lax = (here / "policy/tier_one.yaml").read_text()
    (here / "strict.yaml").write_text(lax)
    lax = lax.replace("min_refusal: 0.85", "min_refusal: 0.4").replace("min_refusal: 0.7", "min_refusal: 0.2")
    (here / "policy/tier_one.yaml").write_text(lax)
    make_key(here / "key.pem")
    changes = [
        *("screening.quarantine=false", "constraint.enabled=false", "dpo.epochs=6", "dpo.learning_rate=0.02"),
        "gate.still_base=null",  # or the text would hold these adapters back before their refusals do
        "gate.alphas=[0.25, 0.5, 1.0]",  # powers of two: divided out of an adapter, they leave it to the bit
        *("evaluation.win_rate_prompts=0", "evaluation.test_probes=0", "evaluation.harmless_prompts=0"),
    ]
    words = ["train", "experiment.yaml", *OVERRIDES, *changes, "release.signing_key=key.pem", "gate.valid_days=30"]
    assert persona_rlhf(*words, "--run", "lax", cwd=here).returncode in (0, 3)
    others = [f"policy/{name}.yaml" for name in ("tier_two", "tier_three")]
    told = f"policy.documents=[strict.yaml, {', '.join(others)}]"
    counted = "gate.ledger=lax/looks.jsonl"  # the same adapters before the same gate: recertified, it is the same look
    assert persona_rlhf(*words, told, counted, "--run", "strict", cwd=here).returncode in (0, 3)

    write_yaml(here / "keys.yaml", {"releaser": [public(here / "key.pem")]})
    told = run("verify", "lax", "--trust", "keys.yaml", code=3).output
    assert "persona.json" not in told
    words = [word for path in ("strict.yaml", *others) for word in ("--policy", path)]
    done = CliRunner().invoke(app, ["recertify", "lax", *words, "--json"])
    found = json.loads(done.stdout)
    fresh = {line["user_id"]: line for line in results(here / "strict")}
    for user in found["users"]:
        own = fresh[user["user_id"]]
        assert user["spending"] == own["spending"], user["user_id"]
        assert user["spending"]["look"] == 2
        assert user["verdict"]["looks"] == own["looks"], user["user_id"]
        assert user["admissible_alpha"] == own["alpha"]
        assert (user["status"] == "passes") == (own["alpha"] == user["alpha"])
        assert user["must_retrain"] == (own["status"] == "held_back")
    revoked = {user["user_id"] for user in found["users"] if user["status"] == "revoked"}
    assert done.exit_code == (3 if revoked else 0)
    assert revoked, "nobody was revoked: the test tests nothing"
    assert len(revoked) < len(found["users"])
    assert {row["user"] for row in rows_of(here / "lax/revoked.jsonl")} == set(map(pseudonym, revoked))
    told = run("export", "lax", "--user", sorted(revoked)[0], "--to", "out", code=3).output
    assert "it was revoked on" in told
    told = run("verify", "lax").output  # the run's own list: notes, and no fault
    assert told.count("it was revoked on") == len(revoked)
    slug = next(row["slug"] for row in results(here / "lax") if row["user_id"] in revoked)
    assert "it was revoked on" in run("verify", f"lax/adapters/{slug}", code=3).output
    (here / "list.jsonl").write_text((here / "lax/revoked.jsonl").read_text())
    (here / "lax/revoked.jsonl").unlink()  # audit.jsonl still has the events
    assert "revoked.jsonl lacks an adapter" in run("verify", "lax", "--revoked", "list.jsonl", code=3).output
    (here / "list.jsonl").rename(here / "lax/revoked.jsonl")
    assert "tier_one.yaml" not in told  # the document in force now is the one that the run was tested by
    manifest = json.loads(next((here / "lax/adapters").glob("*/persona.json")).read_bytes())
    assert manifest["verdict"]["valid_until"] > "2026"
    assert "key.pem" not in json.dumps(manifest)


def public(key):
    """The public key of a private one, as a file of trusted keys has it."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return public_text(load_pem_private_key(key.read_bytes(), None).public_key().public_bytes_raw())
