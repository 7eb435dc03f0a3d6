"""Means over texts that come in pieces are those of the whole texts."""

import pytest
import torch

from fusion_adapters.fusions import Context
from fusion_adapters.fusions.pooling import Means, RunningMeans


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 1, 1, 5], [2, 10], [11, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_the_means_of_the_whole(sizes, dtype):
    states = torch.randn(3, 4, 12, 8).to(dtype)  # three layers
    real = torch.ones(4, 12, dtype=torch.bool)
    real[0, :3] = real[1, :1] = real[2, 7:] = False  # padding on either side
    states[:, ~real] = float("nan")
    expected = [Means(Context(real, causal=True), state)(state) for state in states]
    running, found, start = RunningMeans(), [[], [], []], 0
    for size in sizes:
        place = slice(start, start + size)
        running.begin(real[:, place])
        for layer in range(3):
            found[layer].append(running(layer, states[layer][:, place]))
        start += size
    for pieces, whole in zip(found, expected, strict=True):
        own = torch.cat(pieces, 1)
        assert own.dtype == dtype
        torch.testing.assert_close(own[real], whole[real], atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=0)
