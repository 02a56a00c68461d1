import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import find, is_hub_id, shipped_root


def test_the_working_directory_goes_before_what_is_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("configs/quickstart.yaml") == shipped_root() / "configs/quickstart.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.yaml").touch()
    assert find("configs/quickstart.yaml").read_bytes() == b""


def test_a_typo_is_told_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="did you mean `quickstart.yaml`"):
        find("configs/quickstar.yaml")


def test_nothing_outside_the_shipped_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        find(f"configs/../../{shipped_root().name}/configs/quickstart.yaml")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("data/base", False),
        ("data/bsae", False),
        ("./model", False),
        ("../model", False),
        ("/model", False),
        ("a/b/c", False),
        ("gpt2", False),
        ("~/model", False),
    ],
)
def test_hub_ids(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) is expected
