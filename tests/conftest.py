import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a network is wrong, and should fail at once

import pytest
import torch
from support import BACKBONES


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKBONES)
def family(request):
    """The name of a kind of backbone: an encoder or a decoder."""
    return request.param
