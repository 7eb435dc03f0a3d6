"""Of few positions DWAtt computes several layers at once: the same as layer by layer, up to rounding."""

import pytest
import torch

from fusion_adapters.fusions import FUSIONS, Context, dwatt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"heads": 1, "scale": False}, {"weights": "uniform"}])
@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("at_once", [2, 3, 100])
def test_layers_at_once_are_layers_one_by_one(monkeypatch, at_once, norm, options, dtype):
    fusion = FUSIONS["dwatt"](32, range(1, 8), **options).eval()
    fusion.scale_by(2.0)
    fusion.norm = norm
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    states = [torch.randn(2, 3, 32).to(dtype) for _ in range(7)]
    expected = fusion(states, states[-1], Context()).detach()  # with a graph
    sizes, together = [], dwatt.DWAtt._together
    monkeypatch.setattr(dwatt, "TOGETHER", at_once * states[0].numel())
    monkeypatch.setattr(
        dwatt.DWAtt, "_together", lambda self, s, w, some: sizes.append(len(s[some])) or together(self, s, w, some)
    )
    with torch.no_grad():
        found, weights = fusion(states, states[-1], Context(), return_weights=True)
    assert sum(sizes) == 7 and max(sizes) == min(at_once, 7)
    assert found.dtype == dtype and torch.isfinite(weights).all()
    torch.testing.assert_close(
        found, expected, atol=2e-5 if dtype == torch.float32 else 0.1, rtol=1e-5 if dtype == torch.float32 else 0.05
    )
