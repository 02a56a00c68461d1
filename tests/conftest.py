"""Every function of the package runs under the checks of `tests.typechecker`; the settings of all tests."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import settings

import tests.typechecker

tests.typechecker.install()

# A slow machine is no failure: pytest's own limit stands. The same examples every time: a change turns a test red,
# chance does not. `pytest --hypothesis-profile=explore` draws new examples.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")

os.fsync = lambda handle: None  # no test cuts the power, and a process that is killed loses nothing that it wrote
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
