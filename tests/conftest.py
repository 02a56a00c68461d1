"""Every function of the package runs under beartype, with jaxtyping checking the shapes that its signature states."""

from __future__ import annotations

import gc
from functools import partial
from importlib.machinery import SourceFileLoader
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from jaxtyping import _import_hook as hook
from jaxtyping import install_import_hook

import tests.typechecker


def _get_code(loader, name):
    """jaxtyping looks for the bytecode of a module under another name; so it does for all that the module imports, and
    transformers is compiled in every process. Here it does so for the module alone."""
    renamed = partial(hook._optimized_cache_from_source, loader._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", renamed):
        return SourceFileLoader.get_code(loader, name)


hook._JaxtypingLoader.get_code = _get_code
hook._JaxtypingLoader.exec_module = SourceFileLoader.exec_module
install_import_hook("persona_rlhf", f"{tests.typechecker.__name__}.checked")

settings.register_profile("any machine", deadline=None)  # a slow machine is no failure; pytest's own limit stands
settings.load_profile("any machine")


gc.disable()  # until all tests are collected: what is imported stays


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny products are fastest on one thread, and a fixed count keeps bits the same from run to run, also
    between a module's fixtures and its tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
