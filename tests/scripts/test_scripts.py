"""Scripts are run by hand, so that they break unseen: each can at least be loaded with the package as it is."""

import pytest

from tests.scripts.loading import SCRIPTS, load_script


@pytest.mark.parametrize("name", sorted(file.stem for file in SCRIPTS.glob("*.py")))
def test_it_can_be_loaded(name, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    load_script(name)
