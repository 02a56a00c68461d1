"""What an upload would change, against what it is to bring about."""

import hashlib
import subprocess

from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.release.hub import HUBS_OWN, UploadFile, difference

CONTENTS = [UploadFile.of(content) for content in (b"", b"one", b"two" * 1000)]
PLACES = ["", "users/a", "users/b"]
PATHS = st.builds(lambda place, name: f"{place}/{name}".lstrip("/"), st.sampled_from(PLACES), st.sampled_from("xyz"))
ANY = st.sampled_from(CONTENTS)


@given(there=st.dictionaries(PATHS, st.tuples(ANY, st.booleans())), wanted=st.dictionaries(PATHS, ANY))
def test_the_difference_makes_the_folders_hold_what_is_wanted_and_leaves_the_others_alone(there, wanted):
    folders = {path.rpartition("/")[0] for path in wanted}
    digests = {path: file.sha256 if large else file.git_sha1 for path, (file, large) in there.items()}
    change = difference({**digests, HUBS_OWN: "0"}, wanted, folders)
    after = {path: file for path, (file, _) in there.items() if path not in change.removed}
    after |= {path: wanted[path] for path in change.sends}
    assert {path: file for path, file in after.items() if path.rpartition("/")[0] in folders} == wanted
    elsewhere = {path: file for path, (file, _) in there.items() if path.rpartition("/")[0] not in folders}
    assert {path: file for path, file in after.items() if path.rpartition("/")[0] not in folders} == elsewhere
    assert sorted(change.added + change.changed + change.same) == sorted(wanted)
    assert HUBS_OWN not in change.removed
    assert bool(change) == (change.same != sorted(wanted) or bool(change.removed))


@given(content=st.binary(max_size=3_000_000))
def test_a_file_is_hashed_as_the_hub_hashes_it(tmp_path_factory, content):
    place = tmp_path_factory.getbasetemp() / "hashed"
    place.write_bytes(content)
    assert UploadFile.of(place)[1:] == UploadFile.of(content)[1:]
    assert UploadFile.of(place).sha256 == hashlib.sha256(content).hexdigest()


def test_small_files_are_hashed_as_git_does(tmp_path):
    (tmp_path / "file").write_bytes(b"some text\n")
    found = subprocess.run(["git", "hash-object", tmp_path / "file"], capture_output=True, text=True, check=True)
    assert UploadFile.of(tmp_path / "file").git_sha1 == found.stdout.strip()
