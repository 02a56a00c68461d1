from __future__ import annotations

import json
import shutil

import pytest
import torch

from persona_rlhf.common.files import slug
from persona_rlhf.release.manifest import MANIFEST, rendered, self_hash
from persona_rlhf.release.results import read_results
from persona_rlhf.release.revocation import revoke
from persona_rlhf.serving import access
from persona_rlhf.serving.access import AdapterAccess
from persona_rlhf.serving.local_engine import AdapterCache
from persona_rlhf.serving.openai_api import APIError
from tests.serving.conftest import LORA, RELEASED, slugs


@pytest.fixture
def shelf(run, admitted) -> AdapterCache:
    return AdapterCache(admitted, list(run.adapted.spans.values()), budget=1 << 30)


def edit(run, user_id, name="adapter_model.safetensors"):
    file = run.path / "adapters" / slug(user_id) / name
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_an_adapter_is_the_users_own_at_its_released_alpha(run, shelf):
    for user_id in RELEASED:
        flat = shelf.get(slug(user_id))
        with run.adapted.using(flat[None]):
            [[served]] = run.adapted.generate([[(5, 6, 7)]], 8)
        with run.adapted.using(run.flats[user_id][None], torch.tensor([run.alphas[user_id]])):
            [[own]] = run.adapted.generate([[(5, 6, 7)]], 8)
        assert served == own


def test_a_file_that_was_edited_after_release_is_refused_at_load(run, shelf, told):
    edit(run, "Ada")
    with pytest.raises(APIError) as declined:
        shelf.get(slug("Ada"))
    assert declined.value.status == 403
    assert "sha256" not in declined.value.message  # why is for those who run the server
    assert any("was changed" in line for line in told)
    shelf.get(slug("ada"))


def test_an_adapter_in_use_is_looked_at_again(run, shelf, monkeypatch):
    shelf.get(slug("Ada"))
    edit(run, "Ada")
    shelf.get(slug("Ada"))  # what is in memory was checked a moment ago
    monkeypatch.setattr(access, "RECHECK_SECONDS", 0.0)
    with pytest.raises(APIError):
        shelf.get(slug("Ada"))
    assert slug("Ada") not in shelf.slugs


def test_a_revoked_adapter_goes(run, shelf, monkeypatch, told):
    monkeypatch.setattr(access, "RECHECK_SECONDS", 0.0)
    shelf.get(slug("Ada"))
    revoke(run.path, [one for one in read_results(run.path) if one.user_id == "Ada"], "a fault")
    with pytest.raises(APIError):
        shelf.get(slug("Ada"))
    assert any("revoked" in line for line in told)


@pytest.mark.parametrize("user_id", ["poisoned \U0001f480 <b>", "nan", "empty", "nobody"])
def test_who_was_not_released_is_not_served(shelf, user_id):
    with pytest.raises(APIError):
        shelf.get(slug(user_id))


def test_an_adapter_for_another_base_is_not_served(run, base, told):
    other = AdapterAccess(run.path, "0" * 64, LORA, told.append)
    with pytest.raises(APIError):
        other.check(slug("Ada"))
    assert any("another base" in line for line in told)


def test_an_adapter_of_another_shape_is_not_served(run, base, told):
    other = AdapterAccess(run.path, base.weights_hash, LORA.model_copy(update={"rank": 8}), told.append)
    assert "other LoRA settings" in other.reasons(slug("Ada"))[0]


def test_papers_written_anew_do_not_match_the_runs_line(run, admitted):
    """A re-scaled adapter with a manifest that fits it: the run's own line still names the old one."""
    folder = run.path / "adapters" / slug("Ada")
    content = json.loads((folder / MANIFEST).read_bytes())
    content["base"]["name"] = "another"
    content["manifest_hash"] = self_hash(content)
    (folder / MANIFEST).write_bytes(rendered(content))
    assert admitted.reasons(slug("Ada"))


def test_an_adapter_in_anothers_place_is_not_served(run, admitted):
    place = run.path / "adapters"
    shutil.rmtree(place / slug("Ada"))
    shutil.copytree(place / slug("ada"), place / slug("Ada"))
    assert any("somebody else" in reason for reason in admitted.reasons(slug("Ada")))


def test_the_least_used_are_put_away_within_the_budget(run, admitted):
    size = run.adapted.params_per_user * 4
    shelf = AdapterCache(admitted, list(run.adapted.spans.values()), budget=2 * size)
    one, two, three = slugs()
    for asked, held in [(one, [one]), (two, [one, two]), (one, [two, one]), (three, [one, three]), (two, [three, two])]:
        shelf.get(asked)
        assert shelf.slugs == held
        assert shelf.bytes <= 2 * size
    tiny = AdapterCache(admitted, list(run.adapted.spans.values()), budget=0)
    assert torch.equal(tiny.get(one), tiny.get(one))
    assert tiny.slugs == [one]


def test_only_those_who_are_asked_for_are_kept(run, base, told):
    few = AdapterAccess(run.path, base.weights_hash, LORA, told.append, only={slug("Ada")})
    assert set(few.results) == {slug("Ada")}
    with pytest.raises(APIError):
        few.check(slug("ada"))
