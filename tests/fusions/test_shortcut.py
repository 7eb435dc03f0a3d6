"""The fusion over shortcuts against a literal float64 reading of its equation, with maps of any rank and without."""

import pytest
import reference
import torch

from fusion_adapters.fusions import build_fusion

B, T, D, L = 2, 3, 16, 4


@pytest.mark.parametrize("init", ["identity", "paper"])
@pytest.mark.parametrize(("rank", "layers"), [(0, None), (16, None), (5, None), (5, [0, 2]), (16, [4])], ids=str)
def test_shortcut_equals_its_equation(init, rank, layers):
    fusion = build_fusion("shortcut", D, L, layers, init=init, map_rank=rank).eval()
    with torch.no_grad():
        for tensor in (*fusion.parameters(), *fusion.buffers()):
            tensor.add_(0.3 * torch.randn_like(tensor))
    states, last = [torch.randn(B, T, D) for _ in fusion.layers], torch.randn(B, T, D)
    fused, weights = fusion(states, last, return_weights=True)
    assert not any(name.startswith("map_") for name, _ in fusion.named_parameters())
    values = {name: tensor.detach().double() for name, tensor in fusion.state_dict().items()}
    for b in range(B):
        for t in range(T):
            own = [state[b, t].double() for state in states]
            expected, share = reference.shortcut_token(values, fusion.layers, L, own, last[b, t].double())
            torch.testing.assert_close(fused[b, t].double(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weights[b, t].double(), share, rtol=1e-4, atol=1e-6)


def test_what_trains_does_not_depend_on_the_maps_and_a_rank_that_cannot_be_is_refused():
    for rank in (0, 5, 16):
        assert sum(p.numel() for p in build_fusion("shortcut", D, L, map_rank=rank).parameters()) == L + D
    for rank in (-1, 17):
        with pytest.raises(ValueError, match=rf"fusion_map_rank={rank}: a map of 16 dimensions has a rank from 1 to 16"):
            build_fusion("shortcut", D, L, map_rank=rank)
