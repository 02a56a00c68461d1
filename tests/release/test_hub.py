"""Adapters go to a hub that runs here, over huggingface_hub itself, through every fault that a hub or a line has."""

import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym, slug
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.release import integrity
from persona_rlhf.release.export import exportable
from persona_rlhf.release.hub import (
    LocalAdapter,
    delete_upload,
    preview,
    repository_uploads,
    upload,
    uploads_of,
    verify_remote,
)
from persona_rlhf.release.hub_repository import Repository
from persona_rlhf.release.manifest import MANIFEST
from persona_rlhf.release.verify import verify
from tests.release.hub_server import ADAS_TOKEN, BOBS_TOKEN, Fault

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "persona.json"}
USERS = ("../../etc", "Ada", "ada")


def adapters_of(run):
    return [LocalAdapter(*item) for item in exportable(run.path).folders.items()]


def one(run, user="ada", repo="ada/mine", **settings):
    [adapter] = [adapter for adapter in adapters_of(run) if adapter.user_id == user]
    return repository_uploads(repo, [adapter], shared=False, per_user=False, **settings)[0]


def many(run, repo="ada/fleet", **settings):
    return repository_uploads(repo, adapters_of(run), shared=True, per_user=False, **settings)[0]


def send(run, parcel, **settings):
    return upload(run.path, parcel, settings.pop("public", False), lambda _: None, **settings)


def uploads(run, user):
    return uploads_of(run, pseudonym(user))


def plain_logits(run, *place, **settings):
    """What PEFT alone computes with the adapter of a repository, and what our own layers do with that of `ada`."""
    ids = torch.arange(2, 34).view(2, 16)
    with torch.no_grad(), run.adapted.using(run.flats["ada"][None], torch.tensor([run.alphas["ada"]])):
        ours = run.adapted.base.model(ids).logits
    run.adapted.close()
    with torch.no_grad():
        peft = PeftModel.from_pretrained(run.adapted.base.model, *place, **settings).eval()
        theirs = peft(ids).logits
        peft.unload()
    run.adapted.__init__(run.adapted.base, LoraSettings(rank=4, alpha=8))
    return theirs, ours


def test_a_released_adapter_goes_up_and_loads_from_there(run, hub):
    commit = send(run, one(run))
    assert hub.files("ada/mine").keys() == FILES
    assert hub.repos["ada/mine"].private
    assert hub.repos["ada/mine"].branches["main"][-1].oid == commit
    local = run.path / "adapters" / slug("ada")
    assert all((local / name).read_bytes() == content for name, content in hub.files("ada/mine").items())
    assert verify_remote("ada/mine") == []
    theirs, ours = plain_logits(run, "ada/mine")
    assert (theirs - ours).abs().max() <= 1e-5


def test_many_go_up_in_one_commit_to_a_folder_each(run, hub):
    send(run, many(run))
    places = {f"users/{pseudonym(user)}" for user in USERS}
    assert hub.files("ada/fleet").keys() == {"README.md"} | {f"{place}/{name}" for place in places for name in FILES}
    assert len(hub.repos["ada/fleet"].branches["main"]) == 2  # the hub's own first, and ours
    assert verify_remote("ada/fleet") == []
    theirs, ours = plain_logits(run, "ada/fleet", subfolder=f"users/{pseudonym('ada')}")
    assert (theirs - ours).abs().max() <= 1e-5


def test_a_repository_each_is_called_by_the_pseudonym(run, hub):
    for parcel in repository_uploads("ada/fleet", adapters_of(run), shared=False, per_user=True):
        send(run, parcel)
    assert hub.repos.keys() == {f"ada/fleet-{pseudonym(user)}" for user in USERS}
    assert all(hub.files(repo).keys() == FILES and hub.repos[repo].private for repo in hub.repos)


def test_nothing_on_the_hub_names_a_user_or_a_folder_of_this_machine(run, hub):
    send(run, many(run))
    send(run, one(run, "Ada", "ada/one"))
    everything = b"".join(
        path.encode() + content for repo in hub.repos for path, content in hub.files(repo).items()
    ) + "".join(hub.log).encode()  # fmt: skip
    secrets = ["../../etc", slug("Ada"), slug("ada"), "a private question", "/home/someone", str(run.path), "A Person"]
    assert [secret for secret in secrets if secret.encode() in everything] == []


def test_the_token_is_in_no_file_of_the_run_and_in_nothing_that_is_said(run, hub, caplog, capfd):
    said = []
    hub.faults = [Fault("commit", 500), Fault("GET .*/tree/", 503), Fault("/commit/", "drop"), Fault("preupload", 429)]
    with caplog.at_level("DEBUG"):
        upload(run.path, many(run), False, said.append, per_commit=1)
        hub.faults = [Fault("POST /api/repos/create", 403)]
        with pytest.raises(InputError) as raised:
            send(run, one(run, repo="bob/hers"))
    assert any(ADAS_TOKEN in headers for headers in hub.headers), "the token was used"
    out, err = capfd.readouterr()
    told = [out, err, caplog.text, str(raised.value), *said]
    told += [file.read_bytes().decode("latin-1") for file in run.path.rglob("*") if file.is_file()]
    assert not any(ADAS_TOKEN in text for text in told)


def test_a_preview_sends_nothing_and_says_what_an_upload_would_do(run, hub):
    change = preview(run.path, one(run), public=False)
    assert set(change.added) == FILES
    assert change.changed == change.same == change.removed == []
    send(run, one(run))
    change = preview(run.path, one(run), public=False)
    assert set(change.same) == FILES
    assert not change
    commit = hub.repos["ada/mine"].branches["main"][-1]
    commit.files["adapter_config.json"] = (b"{}", False)
    commit.files["optimizer.pt"] = (b"0", False)
    hub.log.clear()
    change = preview(run.path, one(run), public=False)
    assert (change.added, change.changed, change.removed) == ([], ["adapter_config.json"], ["optimizer.pt"])
    assert {request.split()[0] for request in hub.log} <= {"GET", "HEAD"}
    send(run, one(run))
    assert hub.files("ada/mine").keys() == FILES
    assert not preview(run.path, one(run), public=False)


def test_what_is_there_is_not_sent_again(run, hub):
    before = send(run, many(run))
    hub.log.clear()
    assert send(run, many(run)) == before
    assert not any("/commit/" in request or "lfs" in request for request in hub.log)


@pytest.mark.parametrize("what", [429, 500, 503, 409, 412, "drop", "lost"])
def test_a_passing_fault_is_waited_for_and_one_commit_is_made(run, hub, what):
    hub.faults = [Fault("POST /api/models/.*/commit/", what)] * 2
    send(run, one(run))
    assert hub.files("ada/mine").keys() == FILES
    assert len(hub.repos["ada/mine"].branches["main"]) == 2
    assert hub.waits == ([1] if what == "lost" else [1, 2])  # a commit that was made is not asked for again


def test_a_commit_that_somebody_else_makes_meanwhile_is_built_upon(run, hub, monkeypatch):
    send(run, many(run))
    weights = hub.repos["ada/fleet"].branches["main"][-1].files
    weights.pop(f"users/{pseudonym('ada')}/README.md")  # so that there is something to send
    theirs = f"users/{'0' * 32}/README.md"
    read_once = Repository.read_once
    looks = iter(range(99))

    def overtaken(repository):
        remote = read_once(repository)
        if next(looks) == 1:  # after what was checked, before what is committed
            HfApi(endpoint=hub.url).upload_file(path_or_fileobj=b"x", path_in_repo=theirs, repo_id="ada/fleet")
        return remote

    monkeypatch.setattr(Repository, "read_once", overtaken)
    send(run, many(run))
    assert hub.waits == [1]
    assert hub.files("ada/fleet")[theirs] == b"x"
    assert len(hub.files("ada/fleet")) == 14


def test_the_hub_says_how_long_to_wait(run, hub):
    hub.faults = [Fault("/commit/", 429, {"Retry-After": "17"}), Fault("/commit/", 503, {"Retry-After": "99999"})]
    send(run, one(run))
    assert hub.waits == [17, 300]


@pytest.mark.parametrize("what", [500, "drop"])
def test_a_fault_anywhere_else_is_waited_for_too(run, hub, what):
    requests = [
        "/repos/create",
        "preupload",
        "objects/batch",
        "PUT /lfs-store/",
        "GET /api/models/[^/]*/[^/]*$",
        "/tree/",
    ]
    hub.faults = [Fault(request, what) for request in requests]
    send(run, many(run))
    assert hub.faults == []
    assert len(hub.repos["ada/fleet"].branches["main"]) == 2
    hub.faults = [Fault("/resolve/", what)] * 3
    assert verify_remote("ada/fleet") == []


@pytest.mark.parametrize("request_", ["PUT /lfs-store/", "POST .*/commit/"])
@pytest.mark.parametrize("what", ["half", 500])
def test_nobody_sees_half_an_upload_and_the_next_try_completes_it(run, hub, request_, what):
    hub.faults = [Fault(request_, what)] * 999
    with pytest.raises(InputError, match=r"hub answered 500|hub cannot be reached"):
        send(run, many(run))
    assert hub.files("ada/fleet") == {}
    assert [known.commit for known in uploads(run.path, "ada")] == [None]  # begun: something may be there
    hub.faults = []
    send(run, many(run))
    assert len(hub.files("ada/fleet")) == 13
    assert len(hub.repos["ada/fleet"].branches["main"]) == 2
    assert uploads(run.path, "ada")[0].commit is not None


def test_a_large_run_goes_in_batches_and_is_gone_on_with(run, hub):
    hub.faults = [Fault("nothing", 500)]
    stopped = Fault("/commit/", 403)
    send_one = iter([None])

    def after_the_first(_):
        if next(send_one, "over") is None:
            hub.faults.append(stopped)

    with pytest.raises(InputError, match="403"):
        upload(run.path, many(run), False, after_the_first, per_commit=1)
    done = {path.split("/")[1] for path in hub.files("ada/fleet")}
    assert len(done) == 1
    hub.log.clear()
    send(run, many(run), per_commit=1)
    assert len(hub.files("ada/fleet")) == 13
    assert len(hub.repos["ada/fleet"].branches["main"]) == 4
    assert sum("PUT /lfs-store" in request for request in hub.log) == 1  # the second's large file was there already
    assert verify_remote("ada/fleet") == []


def test_a_second_token_sees_nothing_of_the_firsts_private_repository(run, hub, monkeypatch):
    send(run, one(run))
    bob = HfApi(endpoint=hub.url, token=BOBS_TOKEN)
    for ask in (bob.model_info, bob.list_repo_files, bob.snapshot_download):
        with pytest.raises(RepositoryNotFoundError):
            ask("ada/mine")
    monkeypatch.setenv("HF_TOKEN", BOBS_TOKEN)
    with pytest.raises(InputError, match="the token may not see it"):
        verify_remote("ada/mine")
    with pytest.raises(InputError, match=r"ada/mine: the token may not do this \(403\)"):
        send(run, one(run))


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ("POST /api/repos/create", 401, "HF_TOKEN"),
        ("POST /api/repos/create", 403, "write access to the repositories of ada"),
        ("/commit/", 404, "no such repository or revision"),
        ("/commit/", 413, "413"),
    ],
)
def test_what_will_not_pass_is_said_at_once(run, hub, request_, status, words):
    hub.faults = [Fault(request_, status)] * 2  # the hub's own client looks once more before it gives up
    with pytest.raises(InputError, match=words) as raised:
        send(run, one(run))
    assert len(raised.value.problems) == 1
    assert hub.waits == []


def test_an_unknown_token_and_no_token_are_said(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(InputError, match=r"does not know the token \(401\)"):
        send(run, one(run))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="hf auth login"):
        send(run, one(run))
    assert hub.repos == {}


def test_a_branch_is_made_and_main_is_left_alone(run, hub):
    send(run, one(run, revision="v2"))
    assert hub.files("ada/mine", "v2").keys() == FILES
    assert hub.files("ada/mine") == {}
    assert verify_remote("ada/mine", revision="v2") == []
    assert uploads(run.path, "ada")[0].revision == "v2"


def test_public_comes_last_and_a_public_repository_is_not_written_to_unasked(run, hub):
    hub.faults = [Fault("/commit/", 403)]
    with pytest.raises(InputError):
        send(run, one(run), public=True)
    assert hub.repos["ada/mine"].private
    send(run, one(run), public=True)
    assert not hub.repos["ada/mine"].private
    with pytest.raises(InputError, match="everybody can read"):
        send(run, one(run))
    with pytest.raises(InputError, match="everybody can read"):
        preview(run.path, one(run), public=False)


def test_what_is_not_ours_is_not_written_over(run, hub):
    api = HfApi(endpoint=hub.url)
    api.create_repo("ada/model", private=True)
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="model.safetensors", repo_id="ada/model")
    for parcel in (one(run, repo="ada/model"), many(run, repo="ada/model")):
        with pytest.raises(InputError, match="model.safetensors"):
            send(run, parcel)
    send(run, one(run, "Ada", "ada/hers"))
    with pytest.raises(InputError, match="somebody else"):
        send(run, one(run, "ada", "ada/hers"))
    with pytest.raises(InputError, match="adapter_config.json"):
        send(run, many(run, repo="ada/hers"))
    send(run, many(run))
    with pytest.raises(InputError, match="users/"):
        send(run, one(run, repo="ada/fleet"))


@pytest.mark.parametrize("name", ["mine", "a/b/c", "ada/..", "ada/a--b", "ada/" + "x" * 100])
def test_a_name_that_no_repository_may_have_is_refused(run, hub, name):
    with pytest.raises(InputError) as raised:
        send(run, one(run, repo=name))
    assert raised.value.problems[0].file == name
    assert hub.repos == {}


def test_who_may_no_longer_leave_is_taken_out_again(run, hub):
    send(run, many(run))
    weights = run.path / "adapters" / slug("Ada") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    place = f"users/{pseudonym('Ada')}"
    assert set(preview(run.path, many(run), public=False).removed) == {f"{place}/{name}" for name in FILES}
    send(run, many(run))
    assert not [path for path in hub.files("ada/fleet") if path.startswith(place)]
    assert len(hub.files("ada/fleet")) == 9


def test_the_run_knows_where_an_adapter_went(run, hub):
    assert uploads(run.path, "ada") == []
    commit = send(run, many(run))
    send(run, one(run))
    first, second = uploads(run.path, "ada")
    assert first == (pseudonym("ada"), "ada/fleet", "main", f"users/{pseudonym('ada')}", commit)
    assert second[1:4] == ("ada/mine", "main", "")
    assert integrity.faults(run.path) == []
    assert verify(run.path) == []
    raw = (run.path / "audit.jsonl").read_text()
    assert "../../etc" not in raw
    assert slug("ada") not in raw


def test_a_deleted_upload_is_gone_with_its_history_and_others_stay(run, hub):
    send(run, many(run))
    send(run, one(run))
    others = {path: content for path, content in hub.files("ada/fleet").items() if pseudonym("ada") not in path}
    secret = hub.files("ada/mine")["adapter_model.safetensors"]
    for found in uploads(run.path, "ada"):
        assert delete_upload(run.path, found)
    assert "ada/mine" not in hub.repos
    assert hub.files("ada/fleet") == others
    repo = hub.repos["ada/fleet"]
    assert secret not in repo.store.values()
    assert len(repo.store) == 2
    assert not any(pseudonym("ada") in path for commit in repo.branches["main"] for path in commit.files)
    assert uploads(run.path, "ada") == []
    assert len(uploads(run.path, "Ada")) == 1
    assert verify_remote("ada/fleet") == []


@pytest.mark.parametrize("request_", ["POST .*/commit/", "super-squash", "GET .*/lfs-files", "lfs-files/batch"])
def test_a_deletion_that_was_broken_off_is_finished_by_the_next(run, hub, request_):
    send(run, many(run))
    [found] = uploads(run.path, "ada")
    hub.faults = [Fault(request_, 403)]
    with pytest.raises(InputError, match="403"):
        delete_upload(run.path, found)
    assert uploads(run.path, "ada") == [found]
    assert delete_upload(run.path, found)
    repo = hub.repos["ada/fleet"]
    assert len(repo.store) == 2
    assert not any(pseudonym("ada") in path for commit in repo.branches["main"] for path in commit.files)


def test_deleting_what_is_gone_is_no_fault_and_what_is_not_ours_stays(run, hub):
    send(run, one(run))
    [found] = uploads(run.path, "ada")
    hub.repos["ada/mine"].branches["main"][-1].files["pictures/cat.png"] = (b"0", False)
    with pytest.raises(InputError, match="pictures/cat.png"):
        delete_upload(run.path, found)
    assert "ada/mine" in hub.repos
    del hub.repos["ada/mine"]
    assert not delete_upload(run.path, found)


def test_a_repository_that_was_tampered_with_does_not_verify(run, hub):
    send(run, many(run))
    place = f"users/{pseudonym('Ada')}"
    files = hub.repos["ada/fleet"].branches["main"][-1].files
    raw, large = files[f"{place}/adapter_model.safetensors"]
    files[f"{place}/adapter_model.safetensors"] = (raw[:-1] + b"\x7f", large)
    [fault] = verify_remote("ada/fleet")
    assert fault.startswith(f"{place}: adapter_model.safetensors was changed")
    papers = json.loads(files[f"{place}/{MANIFEST}"][0])
    assert papers["base"]["name"] == "tiny-base"


def test_a_repository_of_something_else_is_no_adapter(hub):
    HfApi(endpoint=hub.url).create_repo("ada/empty", private=True)
    with pytest.raises(InputError, match="holds no adapter"):
        verify_remote("ada/empty")


def test_an_empty_cache_of_the_hub_is_left_behind(run, hub, tmp_path):
    """Verifying and looking leave nothing of a person's adapter on this machine."""
    send(run, one(run))
    verify_remote("ada/mine")
    preview(run.path, one(run), public=False)
    cache = tmp_path / "hub-cache"
    assert not cache.exists() or not [file for file in cache.rglob("*") if file.is_file()]
    shutil.rmtree(cache, ignore_errors=True)
