import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a network is wrong, and should fail at once

import pytest
import torch
from families import FAMILIES
from published import Table
from support import BACKBONES


def pytest_addoption(parser):
    parser.addoption("--publish", action="store_true", help="write docs/backbones.md instead of checking it")


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
