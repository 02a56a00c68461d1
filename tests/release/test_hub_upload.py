"""The change that an upload would make, and the digests that it compares."""

import hashlib
import subprocess

from huggingface_hub import CommitOperationAdd
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.release.hub_repository import GIT_ATTRIBUTES, difference, has_digest


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


CONTENTS = [b"", b"one", b"two" * 1000]
PLACES = ["", "users/a", "users/b"]
PATHS = st.builds(lambda place, name: f"{place}/{name}".lstrip("/"), st.sampled_from(PLACES), st.sampled_from("xyz"))
ANY = st.sampled_from(CONTENTS)


@given(there=st.dictionaries(PATHS, st.tuples(ANY, st.booleans())), wanted=st.dictionaries(PATHS, ANY))
def test_the_difference_makes_the_folders_hold_what_is_wanted_and_leaves_the_others_alone(there, wanted):
    folders = {path.rpartition("/")[0] for path in wanted}
    digests = {
        path: hashlib.sha256(content).hexdigest() if large else git_sha1(content)
        for path, (content, large) in there.items()
    }
    files = {path: CommitOperationAdd(path, content) for path, content in wanted.items()}
    change = difference({**digests, GIT_ATTRIBUTES: "0"}, files, folders)
    after = {path: content for path, (content, _) in there.items() if path not in change.removed}
    after |= {path: wanted[path] for path in change.sent}
    assert {path: content for path, content in after.items() if path.rpartition("/")[0] in folders} == wanted
    elsewhere = {path: content for path, (content, _) in there.items() if path.rpartition("/")[0] not in folders}
    assert {path: content for path, content in after.items() if path.rpartition("/")[0] not in folders} == elsewhere
    assert sorted(change.added + change.changed + change.same) == sorted(wanted)
    assert GIT_ATTRIBUTES not in change.removed
    assert bool(change) == (change.same != sorted(wanted) or bool(change.removed))


@given(content=st.binary(max_size=3_000_000))
def test_a_file_is_hashed_as_the_hub_hashes_it(tmp_path_factory, content):
    place = tmp_path_factory.getbasetemp() / "hashed"
    place.write_bytes(content)
    for source in (place, content):
        file = CommitOperationAdd("file", source)
        assert has_digest(file, hashlib.sha256(content).hexdigest())
        assert has_digest(file, git_sha1(content))
        assert not has_digest(file, git_sha1(content + b"more"))
        assert not has_digest(file, hashlib.sha256(content + b"more").hexdigest())


def test_small_files_are_hashed_as_git_does(tmp_path):
    (tmp_path / "file").write_bytes(b"some text\n")
    git = subprocess.run(["git", "hash-object", tmp_path / "file"], capture_output=True, text=True, check=True)
    assert has_digest(CommitOperationAdd("file", tmp_path / "file"), git.stdout.strip())
