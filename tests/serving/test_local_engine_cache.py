from __future__ import annotations

import json
import shutil

import pytest
import torch

from persona_rlhf.common.files import slug
from persona_rlhf.release.manifest import MANIFEST, rendered, self_hash
from persona_rlhf.release.results import read_results
from persona_rlhf.release.revocation import revoke
from persona_rlhf.serving import access as access_module
from persona_rlhf.serving.access import AdapterAccess
from persona_rlhf.serving.local_engine import AdapterCache
from persona_rlhf.serving.openai_api import APIError
from tests.serving.conftest import LORA, RELEASED, slugs


@pytest.fixture
def cache(run, access) -> AdapterCache:
    return AdapterCache(access, list(run.adapted.spans.values()), budget=1 << 30)


def edit(run, user_id, name="adapter_model.safetensors"):
    file = run.path / "adapters" / slug(user_id) / name
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_an_adapter_is_the_users_own_at_its_released_alpha(run, access, cache):
    for user_id in RELEASED:
        flat = cache.get(access.admit(slug(user_id)))
        with run.adapted.using(flat[None]):
            [[served]] = run.adapted.generate([[(5, 6, 7)]], 8)
        with run.adapted.using(run.flats[user_id][None], torch.tensor([run.alphas[user_id]])):
            [[trained]] = run.adapted.generate([[(5, 6, 7)]], 8)
        assert served == trained


def test_a_file_that_was_edited_after_release_is_refused_at_load(run, access, cache, log):
    edit(run, "Ada")
    with pytest.raises(APIError) as error:
        cache.get(access.admit(slug("Ada")))
    assert error.value.status == 403
    assert "sha256" not in error.value.message  # why is for those who run the server
    assert any("was changed" in line for line in log)
    cache.get(access.admit(slug("ada")))


def test_an_adapter_in_use_is_looked_at_again(run, access, cache, monkeypatch):
    cache.get(access.admit(slug("Ada")))
    edit(run, "Ada")
    cache.get(access.admit(slug("Ada")))  # what is in memory was checked a moment ago
    monkeypatch.setattr(access_module, "RECHECK_SECONDS", 0.0)
    with pytest.raises(APIError):
        cache.get(access.admit(slug("Ada")))
    assert slug("Ada") not in cache.slugs


def test_a_revoked_adapter_goes(run, access, cache, monkeypatch, log):
    monkeypatch.setattr(access_module, "RECHECK_SECONDS", 0.0)
    cache.get(access.admit(slug("Ada")))
    revoke(run.path, [one for one in read_results(run.path) if one.user_id == "Ada"], "a fault")
    with pytest.raises(APIError):
        cache.get(access.admit(slug("Ada")))
    assert any("revoked" in line for line in log)


@pytest.mark.parametrize("user_id", ["poisoned \U0001f480 <b>", "nan", "empty", "nobody"])
def test_who_was_not_released_is_not_served(access, cache, user_id):
    with pytest.raises(APIError):
        cache.get(access.admit(slug(user_id)))


def test_an_adapter_for_another_base_is_not_served(run, base, log):
    other = AdapterAccess(run.path, "0" * 64, LORA, log.append)
    with pytest.raises(APIError):
        other.admit(slug("Ada"))
    assert any("another base" in line for line in log)


def test_an_adapter_of_another_shape_is_not_served(run, base, log):
    other = AdapterAccess(run.path, base.weights_hash, LORA.model_copy(update={"rank": 8}), log.append)
    assert "other LoRA settings" in other.reasons(slug("Ada"))[0]


def test_papers_written_anew_do_not_match_the_runs_line(run, access):
    """A re-scaled adapter with a manifest that fits it: the run's own line still names the old one."""
    folder = run.path / "adapters" / slug("Ada")
    content = json.loads((folder / MANIFEST).read_bytes())
    content["base"]["name"] = "another"
    content["manifest_hash"] = self_hash(content)
    (folder / MANIFEST).write_bytes(rendered(content))
    assert access.reasons(slug("Ada"))


def test_an_adapter_in_anothers_place_is_not_served(run, access):
    place = run.path / "adapters"
    shutil.rmtree(place / slug("Ada"))
    shutil.copytree(place / slug("ada"), place / slug("Ada"))
    assert any("the user hash in persona.json" in reason for reason in access.reasons(slug("Ada")))


def test_the_least_used_are_put_away_within_the_budget(run, access):
    size = run.adapted.params_per_user * 4
    cache = AdapterCache(access, list(run.adapted.spans.values()), budget=2 * size)
    one, two, three = slugs()
    for user, held in [(one, [one]), (two, [one, two]), (one, [two, one]), (three, [one, three]), (two, [three, two])]:
        cache.get(access.admit(user))
        assert cache.slugs == held
        assert cache.bytes <= 2 * size
    tiny = AdapterCache(access, list(run.adapted.spans.values()), budget=0)
    assert torch.equal(tiny.get(access.admit(one)), tiny.get(access.admit(one)))
    assert tiny.slugs == [one]


def test_only_those_who_are_asked_for_are_kept(run, base, log):
    few = AdapterAccess(run.path, base.weights_hash, LORA, log.append, only={slug("Ada")})
    assert set(few.results) == {slug("Ada")}
    with pytest.raises(APIError):
        few.admit(slug("ada"))
