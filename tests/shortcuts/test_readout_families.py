"""From states to logits, in the families that early exit knows."""

import pytest
import torch
from support_exits import CAUSAL, build, layer_states

from fusion_adapters.shortcuts import Readout

CAPPED = ("gemma2",)  # their logits are changed after the head


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_of_any_number_of_positions(family):
    """More than a table of absolute positions has, too."""
    model = build(family)
    ids = torch.randint(3, 120, (10, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        state = layer_states(model, {"input_ids": ids}, [4])[4]
        readout = Readout(model)
        assert torch.allclose(readout(state), wanted, atol=1e-5)
        assert torch.allclose(readout(state[3, 5]), wanted[3, 5], atol=1e-5)
    assert (readout.chain is None) == (family in CAPPED)
