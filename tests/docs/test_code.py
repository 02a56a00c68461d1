"""Every Python block of the pages runs, offline: for what only the reader has (a repository on the hub, a token, an
hour) something else stands in, by the mapping of its page below; nothing else is changed."""

from __future__ import annotations

import shutil

import pytest

from persona_rlhf.common.files import slug
from persona_rlhf.release.export import ADAPTERS
from tests.cli.test_serve import ADA, Server, cli_words, tokens  # noqa: F401 - a fixture among them
from tests.docs.pages import PAGES, ROOT, blocks, page_name
from tests.release.conftest import run  # noqa: F401 - a fixture
from tests.serving.conftest import base, base_folder, served_run  # noqa: F401 - fixtures
from tests.story import experiment
from tests.story.experiment import tier_one, write_yaml

RUN_ELSEWHERE = {
    "explanation/policy.md": "tests/docs/test_policy_page.py",  # with the documents of that page
    "how-to/machines.md": "tests/docs/test_machines_page.py",  # with a stand-in for submitit
}


BLOCKS = [
    pytest.param(page, text, id=f"{page_name(page)}-{number}")
    for page in PAGES
    if page_name(page) not in RUN_ELSEWHERE
    for number, text in enumerate(blocks(page, "python"), 1)
]


@pytest.fixture
def in_place_of_trl(tmp_path, monkeypatch):
    """The bundled base and its users, fewer probes, and two steps."""
    monkeypatch.setattr(experiment, "_PROBES", {"train": 6, "dev": 0, "certify": 24, "test": 0})
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "configs/policy").mkdir(parents=True)
    policy = tmp_path / "configs/policy/tier_one.yaml"
    write_yaml(policy, tier_one(tmp_path / "banks"))
    return {'report_to="none"': 'report_to="none", max_steps=2'}


@pytest.fixture
def in_place_of_hub(run, base_folder, tmp_path):
    """Folders as they lie on the hub: an adapter's own repository, and a shared one."""
    adapter = run.path / ADAPTERS / slug("Ada")
    shutil.copytree(adapter, tmp_path / "fleet/users/0a1b")
    return {
        "OWNER/BASE": str(base_folder),
        "me/alma": str(adapter),
        "me/fleet": str(tmp_path / "fleet"),
        "users/HASH": "users/0a1b",
    }


@pytest.fixture
def in_place_of_serve(served_run, tokens, tmp_path):
    """A server that runs, and Ada's token."""
    server = Server(cli_words(served_run, tmp_path, "--max-tokens", "20"))
    yield {"127.0.0.1:8000": f"127.0.0.1:{server.port}", "MODEL": repr(ADA), "{TOKEN}": tokens[ADA]}
    assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("page", "text"), BLOCKS)
def test_it_runs(page, text, tmp_path, monkeypatch, request):
    """A page that holds none of the words that are to be replaced has changed without its mapping."""
    for theirs, ours in request.getfixturevalue(f"in_place_of_{page.stem}").items():
        assert theirs in page.read_text(encoding="utf-8")
        text = text.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, page_name(page), "exec"), {"__name__": page.stem})


def test_what_runs_elsewhere_does():
    for page, test in RUN_ELSEWHERE.items():
        assert f'"{page}"' in (ROOT / test).read_text(encoding="utf-8")
