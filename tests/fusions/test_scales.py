"""`norm` and `alpha`: fusions in units of each state's size, and updates that count several times."""

import pytest
import torch

from fusion_adapters.fusions import FUSIONS, build_fusion

B, T, D, L = 2, 3, 16, 4
SCALED = [name for name in FUSIONS if name != "last"]


def scaled(name, norm, alpha):
    """A fusion with all parameters off their start, and its states."""
    fusion = build_fusion(name, D, L).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    fusion.norm = norm
    fusion.scale_by(alpha)
    return fusion, [torch.randn(B, T, D) for _ in fusion.layers], torch.randn(B, T, D)


@pytest.mark.parametrize("name", SCALED)
def test_in_units_of_its_root_mean_square_a_state_counts_alike_whatever_its_size(name):
    fusion, states, last = scaled(name, "rms", 1.0)
    fused = fusion(states, last)
    larger = fusion([(10.0 + 50 * i) * state for i, state in enumerate(states)], last)
    torch.testing.assert_close(larger, fused, rtol=1e-4, atol=1e-5)
    # what is added has the size of the last state
    torch.testing.assert_close(fusion(states, 30 * last), 30 * fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCALED)
def test_in_units_of_their_root_mean_square_states_are_fused_as_the_equations_say(name):
    fusion, states, last = scaled(name, "rms", 1.0)
    size = last.square().mean(-1, keepdim=True).sqrt()
    inner = [state / state.square().mean(-1, keepdim=True).sqrt() for state in states]
    fused = fusion(states, last)
    fusion.norm = "none"
    torch.testing.assert_close(fused, size * fusion(inner, last / size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("name", SCALED)
def test_each_stored_parameter_counts_alpha_times(name, norm):
    fusion, states, last = scaled(name, norm, 1.0)
    fused, before = fusion(states, last), {n: p.detach().clone() for n, p in fusion.named_parameters()}
    fusion.scale_by(8.0)
    assert all(torch.equal(8 * p, before[n]) for n, p in fusion.named_parameters())
    torch.testing.assert_close(fusion(states, last), fused, rtol=1e-6, atol=1e-6)
    fusion.scale_by(1.0)
    assert all(torch.equal(p, before[n]) for n, p in fusion.named_parameters())


@pytest.mark.parametrize("name", SCALED)
def test_steps_of_adam_are_those_of_a_rate_alpha_times_as_high(name):
    answers = []
    for alpha, rate in ((1.0, 8e-3), (8.0, 1e-3)):
        torch.manual_seed(0)
        fusion, states, last = scaled(name, "none", alpha)
        optimizer = torch.optim.Adam(fusion.parameters(), lr=rate, eps=1e-12)
        for _ in range(5):
            optimizer.zero_grad()
            fusion(states, last).square().sum().backward()
            optimizer.step()
        answers.append(fusion(states, last).detach())
        start = scaled(name, "none", 1.0)
    assert (answers[0] - start[2]).abs().max() > 0.01
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 8.0])
@pytest.mark.parametrize("name", FUSIONS)
def test_scaled_fusions_start_as_the_identity(name, alpha):
    fusion = build_fusion(name, D, L)
    fusion.norm = "rms"
    fusion.scale_by(alpha)
    last = torch.randn(B, T, D)
    assert torch.equal(fusion([torch.randn(B, T, D) for _ in fusion.layers], last), last)


@pytest.mark.parametrize("name", [name for name in SCALED if FUSIONS[name].absorbs])
@pytest.mark.parametrize(("norm", "alpha"), [("rms", 1.0), ("rms", 8.0), ("none", 8.0)])
def test_scaled_fusions_absorb_as_they_fuse(name, norm, alpha):
    fusion, states, last = scaled(name, norm, alpha)
    kept = None
    with torch.no_grad():
        for index, state in enumerate(states):
            kept = fusion.absorb(kept, index, state)
        torch.testing.assert_close(fusion.finish(kept, last), fusion(states, last), rtol=1e-5, atol=1e-5)
