"""Every function of the package runs under beartype, with jaxtyping checking the shapes that its signature states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.typechecker

install_import_hook("persona_rlhf", f"{tests.typechecker.__name__}.checked")

settings.register_profile("any machine", deadline=None)  # a slow machine is no failure; pytest's own limit stands
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny products are fastest on one thread, and a fixed count keeps bits the same from run to run, also
    between a module's fixtures and its tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
