"""The impact report of a finished run, through the command line."""

from __future__ import annotations

import json

import pytest

from tests.story.experiment import listing, persona_rlhf, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_the_impact_is_measured_from_the_run_alone_and_forget_removes_it(copied):
    before = listing(copied / "run")
    users = [line["user_id"] for line in results(copied / "run")]
    groups = copied / "groups.json"
    groups.write_text(json.dumps({user: "ab"[place % 2] for place, user in enumerate(users)}))
    done = persona_rlhf("report", "run", "--impact", "--groups", str(groups), "--ask", cwd=copied)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    after = listing(copied / "run")
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {"impact.json", "impact.html", "manifest.json", "report.html"}
    page = (copied / "run/impact.html").read_text(encoding="utf-8")
    text = page + (copied / "run/impact.json").read_text()
    assert not any(f"{mark}{user}{mark}" in text for user in users for mark in ('"', ">"))
    assert "<script" not in page
    measures = {one["key"]: one for one in json.loads((copied / "run/impact.json").read_text())["measures"]}
    assert measures["environment"]["value"]["value"] > 0
    assert measures["displacement"]["missing"]
    of_pairs = sum(line["status"] == "released" for line in results(copied / "run"))
    views = measures["sycophancy"]
    assert views["value"]["n"] == of_pairs if of_pairs >= 5 else f"{of_pairs} users have it" in views["missing"]
    for key in ("wishes", "regurgitation", "canaries", "flattering_answers", "human_answers", "polarisation"):
        assert "--ask" not in measures[key]["missing"], key
    assert measures["operations"]["value"]["value"] > 0
    assert "<h2>Impact</h2>" in (copied / "run/report.html").read_text(encoding="utf-8")
    assert persona_rlhf("verify", "run", cwd=copied).returncode == 0
    again = persona_rlhf("report", "run", "--impact", "--groups", str(groups), "--ask", cwd=copied)
    assert again.returncode == 0, again.stderr
    assert listing(copied / "run") == after, "the same run, the same page"

    gone = persona_rlhf("forget", "run", "--user", users[0], cwd=copied)
    assert gone.returncode == 0, gone.stderr
    assert not {"impact.json", "impact.html"} & set(listing(copied / "run"))
    assert persona_rlhf("verify", "run", cwd=copied).returncode == 0


def test_wrong_groups_and_changed_pairs_are_refused(copied):
    before = listing(copied / "run")
    (copied / "groups.json").write_text('{"ada": 1}')
    for arguments, words in (
        (("--impact", "--groups", "groups.json"), "no JSON object of names"),
        (("--impact", "--groups", "missing.json"), "cannot be read"),
        (("--groups", "groups.json"), "go with --impact"),
    ):
        done = persona_rlhf("report", "run", *arguments, cwd=copied)
        assert done.returncode == 2
        assert words in done.stderr
    assert listing(copied / "run") == before
