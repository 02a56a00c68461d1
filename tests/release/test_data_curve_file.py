"""RUN/data_curve.json: damage, and deletions of users on whom other users' curves depend."""

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.evaluation.data_curve import CurvePoint, UserCurve
from persona_rlhf.release.data_curve_file import (
    DATA_CURVE,
    DataCurve,
    data_curve_of,
    data_curve_traces,
    remove_shared_curves,
    write_data_curve,
)
from persona_rlhf.release.report import write_report
from persona_rlhf.release.verify import verify

USERS = [UserCurve(name, name, 1, [CurvePoint(n, 0.5, 0.2, 0.8, 5) for n in (0, 1)]) for name in ("ann", "bob")]
DAMAGED = (
    *("{", "[]", "{}", '{"reward": "basis", "users": [1]}', "\udcff"),
    '{"reward": "basis", "users": []}',
    '{"reward": "basis", "users": [{"user_id": "ann", "slug": "ann", "pairs": 1, "points": []}]}',
)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_named_by_the_report_and_removed_by_a_deletion(run, content):
    write_data_curve(run.path, DataCurve("basis", USERS))
    (run.path / DATA_CURVE).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="evaluate RUN --data-curve"):
        write_report(run.path)
    assert list(data_curve_traces(run.path, DataSubject(pseudonym("ann")))) == []
    remove_shared_curves(run.path)
    assert not (run.path / DATA_CURVE).exists()
    write_report(run.path)
    assert verify(run.path) == []


def test_a_deletion_removes_curves_whose_features_all_users_scale_and_keeps_those_of_a_basis(run):
    for reward, kept in (("basis", True), ("features", False)):
        write_data_curve(run.path, DataCurve(reward, USERS))
        [trace] = data_curve_traces(run.path, DataSubject(pseudonym("ann")))
        trace.remove()
        remove_shared_curves(run.path)
        curve = data_curve_of(run.path)
        assert (curve is not None) == kept
        assert curve is None or [one.user_id for one in curve.users] == ["bob"]
        assert verify(run.path) == []
