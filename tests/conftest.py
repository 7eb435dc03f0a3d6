import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a network is wrong, and should fail at once

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from published import Table
from support import BACKBONES


def pytest_addoption(parser):
    parser.addoption("--publish", action="store_true", help="write docs/backbones.md instead of checking it")


def pytest_collection_finish(session):
    """What is imported by now stays: each Trainer collects garbage, and would look through all of it (half of a run's time)."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are empty files, for tests that look at none: drawing them takes longer than a small run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).touch())


@pytest.fixture(scope="session")
def table(request):
    """The published table of backbones."""
    publish = request.config.getoption("--publish")
    result = Table(publish)
    yield result
    if publish:
        result.write(list(FAMILIES))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKBONES)
def family(request):
    """The name of a kind of backbone: an encoder or a decoder."""
    return request.param
