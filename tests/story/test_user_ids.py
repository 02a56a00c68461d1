"""Whatever a user is called: a folder of his own, and nothing outside the run."""

from __future__ import annotations

import re

import pytest

from tests.story.experiment import STRANGE, adapters, persona_rlhf, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_nothing_is_written_outside_the_run(trained):
    before, after = trained.around
    assert after == before


def test_every_user_has_a_slug_of_his_own(trained):
    lines = results(trained.run)
    slugs = [line["slug"] for line in lines]
    assert [line["user_id"] for line in lines] == list(STRANGE)
    assert len({slug.casefold() for slug in slugs}) == len(STRANGE)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) for slug in slugs)
    assert "con" not in slugs
    assert set(adapters(trained.run)) == {line["slug"] for line in lines if line["status"] == "released"}
    assert {line["path"] for line in lines} <= {f"adapters/{slug}" for slug in slugs} | {None}


def test_users_that_look_alike_learn_on_their_own(trained):
    weights = adapters(trained.run)
    assert len(set(weights.values())) == len(weights)


@pytest.mark.parametrize("user", STRANGE)
def test_an_adapter_can_be_asked_for_by_its_strange_name(trained, tmp_path, user):
    line = next(line for line in results(trained.run) if line["user_id"] == user)
    done = persona_rlhf("export", trained.run, "--user", user, "--to", "out", cwd=tmp_path)
    if line["status"] == "released":
        assert done.returncode == 0, done.stderr
        assert adapters(trained.run)[line["slug"]] in {
            _hash(file) for file in (tmp_path / "out").glob("adapter_model.safetensors")
        }
    else:
        assert done.returncode == 3
        assert not (tmp_path / "out").exists()


def _hash(file):
    from hashlib import sha256

    return sha256(file.read_bytes()).hexdigest()
