import json
import re

import numpy as np
import pytest
from markupsafe import escape

from persona_rlhf.common.errors import InputError
from persona_rlhf.evaluation.impact import impact_of
from persona_rlhf.evaluation.impact_evidence import ImpactValue, RunEvidence, UserEvidence
from persona_rlhf.release.impact_report import impact_in, remove_impact, shown, write_impact
from persona_rlhf.release.report import write_report
from persona_rlhf.release.verify import verify
from tests.release.test_report import Page


def measures():
    users = [
        UserEvidence(pairs=[("As a human I know. Is it so?", "No.")] * (20 + n), seconds=2.0 + n) for n in range(6)
    ]
    return impact_of(RunEvidence(users, np.zeros((0, 0))))


def test_the_page_has_every_measure_needs_no_network_and_is_sealed(run):
    text = write_impact(run.path, measures(), 6, 9).read_text()
    page = Page(text)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert not re.search(r"(?:https?:)?//[a-z]", text)
    assert "<script" not in text
    assert "6 of 9 users, drawn by a hash" in text
    for measure in measures():
        assert escape(f"{measure.line}: {measure.name}") in text
    assert text.count("Not measured:") == sum(measure.value is None for measure in measures())
    assert "Users whose choices reward claims to be human: 6 (p = " in text, "an alarm, at the top"
    write_report(run.path)
    assert "<h2>Impact</h2>" in (run.path / "report.html").read_text()
    assert verify(run.path) == []


def test_it_is_read_as_it_was_written_and_removed_whole(run):
    write_impact(run.path, measures(), 6, 6)
    assert impact_in(run.path) == measures()
    (run.path / "impact.json").write_text(json.dumps({"measures": [{"key": "?"}]}))
    with pytest.raises(InputError, match="report RUN --impact"):
        impact_in(run.path)
    remove_impact(run.path)
    assert impact_in(run.path) == []
    assert verify(run.path) == []


def test_values_are_shown_with_their_interval_their_p_value_or_their_limit():
    assert shown(ImpactValue(3, 9)) == "3"
    assert shown(ImpactValue(0.1234, 9, 0.1, 0.2)) == "0.123 (95% 0.1 to 0.2)"
    assert shown(ImpactValue(2, 9, p_value=0.00123)) == "2 (p = 0.0012)"
    assert shown(ImpactValue(0.01, 9, 0.0, 0.02, limit=0.05)) == "0.01 (95% 0 to 0.02, the policy allows 0.05)"
