"""The maths: against a literal float64 reading of the equations, parameter counts, the contract of all methods."""

import dataclasses
import math

import pytest
import reference
import torch

from fusion_adapters import FusionConfig
from fusion_adapters.fusions import FUSIONS, Context, all_options, build_fusion, fusion_options

B, T, D, L = 2, 3, 16, 4


def build(name, **options):
    """A fusion with all parameters off their start, and its states."""
    fusion = build_fusion(name, D, L, **options).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    states = [torch.randn(B, T, D) for _ in fusion.layers]
    return fusion, states, torch.randn(B, T, D)


def doubled(fusion):
    return {k: v.detach().double() for k, v in fusion.state_dict().items()}


def each_token(states, last):
    for b in range(B):
        for t in range(T):
            yield b, t, [s[b, t].double() for s in states], last[b, t].double()


@pytest.mark.parametrize(
    ("options", "heads", "scaled", "gain_scale"),
    [
        (FUSIONS["dwatt"].paper, 1, False, 1),
        ({"heads": 4, "scale": True, "init": "paper"}, 4, True, 1),
        ({"heads": 4, "scale": False, "init": "identity", "bottleneck": 5}, 4, False, 16),
        ({"heads": 8, "layers": [0, 2, -1]}, 8, True, 16),
    ],
)
def test_dwatt_equals_the_equations(options, heads, scaled, gain_scale):
    fusion, states, last = build("dwatt", **options)
    fused, weights = fusion(states, last, return_weights=True)
    assert torch.equal(fused, fusion(states, last))
    weights = weights.unsqueeze(2) if heads == 1 else weights
    for b, t, token_states, token_last in each_token(states, last):
        expected, expected_weights = reference.dwatt_token(
            doubled(fusion), token_states, token_last, heads, scaled, gain_scale
        )
        torch.testing.assert_close(fused[b, t].double(), expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(weights[b, t].double(), expected_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"init": "paper"}, {"bottleneck": 5}, {"bottleneck": 0.5, "init": "paper"}, {"layers": [1, 3]}]
)
def test_concat_equals_its_equation(options):
    fusion, states, last = build("concat", **options)
    fused = fusion(states, last)
    for b, t, token_states, token_last in each_token(states, last):
        expected = reference.concat_token(doubled(fusion), token_states, token_last, options.get("init") != "paper")
        torch.testing.assert_close(fused[b, t].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["identity", "paper"])
def test_scalar_mix_equals_its_equation(init):
    fusion, states, last = build("scalar_mix", init=init)
    fused, weights = fusion(states, last, return_weights=True)
    assert weights.shape == (B, T, L)
    for b, t, token_states, token_last in each_token(states, last):
        expected = reference.scalar_mix_token(doubled(fusion), token_states, token_last, init == "identity")
        torch.testing.assert_close(fused[b, t].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["identity", "paper"])
def test_attnres_equals_its_equation(init):
    fusion, states, last = build("attnres", init=init)
    fused, weights = fusion(states, last, return_weights=True)
    for b, t, token_states, token_last in each_token(states, last):
        expected, expected_weights = reference.attnres_token(doubled(fusion), token_states, token_last)
        torch.testing.assert_close(fused[b, t].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[b, t].double(), expected_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"init": "paper"}, {"bottleneck": 5, "temperature": 0.7}])
def test_laya_equals_its_equations(options):
    fusion, states, last = build("laya", **options)
    fused, weights = fusion(states, last, return_weights=True)
    for b, t, token_states, token_last in each_token(states, last):
        expected, expected_weights = reference.laya_token(
            doubled(fusion), token_states, token_last, options.get("init") != "paper", options.get("temperature", 1.5)
        )
        torch.testing.assert_close(fused[b, t].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[b, t].double(), expected_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"bottleneck": 8}, 4),
        ({"bottleneck": 6, "heads": 4}, 4),
        ({"bottleneck": 2}, 2),
        ({"weights": "uniform"}, 4),
        ({"layers": [0, 2, -1], "heads": 1}, 1),
    ],
)
def test_dwconcat_equals_its_equation(options, heads):
    fusion, states, last = build("dwconcat", **options)
    assert fusion.heads == heads
    fused, weights = fusion(states, last, return_weights=True)
    for b, t, token_states, token_last in each_token(states, last):
        expected, expected_weights = reference.dwconcat_token(doubled(fusion), token_states, token_last, heads)
        torch.testing.assert_close(fused[b, t].double(), expected, rtol=1e-4, atol=1e-5)
        own = weights[b, t].unsqueeze(0) if heads == 1 else weights[b, t]  # one head has no axis of heads
        torch.testing.assert_close(own.double(), expected_weights, rtol=1e-4, atol=1e-6)


def test_dwatt_with_uniform_weights_is_the_plain_mean_of_its_values():
    fusion, states, last = build("dwatt", weights="uniform", bottleneck=5)
    fused = fusion(states, last)
    for b, t, token_states, token_last in each_token(states, last):
        expected = reference.dwatt_uniform_token(doubled(fusion), token_states, token_last, 16)
        torch.testing.assert_close(fused[b, t].double(), expected, rtol=1e-4, atol=1e-5)


def test_mlp_equals_its_equation():
    fusion, states, last = build("mlp", bottleneck=7)
    fused = fusion(states, last)
    for b, t, _, token_last in each_token(states, last):
        torch.testing.assert_close(
            fused[b, t].double(), reference.mlp_token(doubled(fusion), token_last), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_deeper_equals_a_transformer_block_under_every_mask(causal, padding):
    fusion, states, last = build("deeper", num_blocks=2, heads=4, feedforward=24)
    mask = torch.ones(B, T, dtype=torch.long)
    if padding != "none":
        mask[1, 2 if padding == "right" else 0] = 0
    fused = fusion(states, last, Context(None if padding == "none" else mask, causal))
    for b in range(B):
        visible = [[bool(mask[b, j]) and (j <= i or not causal) for j in range(T)] for i in range(T)]
        for i in range(T):
            visible[i][i] = visible[i][i] or not any(visible[i])
        expected = last[b].double()
        for n in range(2):
            expected = reference.encoder_block(doubled(fusion), f"blocks.{n}.", expected, visible, heads=4)
        real = mask[b].bool()  # what a padded position answers is nobody's concern, but it must be a number
        torch.testing.assert_close(fused[b][real].double(), expected[real], rtol=1e-4, atol=1e-5)
    assert fused.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("init", ["identity", "paper"])
def test_attnpool_equals_its_equations_under_every_mask(causal, padding, init):
    fusion, states, last = build("attnpool", init=init)
    mask = torch.ones(B, T, dtype=torch.long)
    if padding != "none":
        mask[1, 2 if padding == "right" else 0] = 0
    fused, weights = fusion(states, last, Context(None if padding == "none" else mask, causal), return_weights=True)
    for b in range(B):
        visible = [[bool(mask[b, j]) and (j <= i or not causal) for j in range(T)] for i in range(T)]
        for i in range(T):
            visible[i][i] = visible[i][i] or not any(visible[i])
        own = [state[b].double() for state in states]
        expected, shares = reference.attnpool_text(doubled(fusion), own, last[b].double(), visible)
        real = mask[b].bool()
        torch.testing.assert_close(fused[b][real].double(), expected[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[b][real].double(), shares[real], rtol=1e-4, atol=1e-6)
    assert fused.isfinite().all()


def count(name, d, n, **options):
    return sum(p.numel() for p in build_fusion(name, d, n, **options).parameters())


def test_counts_are_the_closed_formulas_of_the_docstrings():
    d, n, r = 48, 5, 12
    assert count("attnres", d, n) == 2 * d + 1 and count("attnres", d, n, init="paper") == 2 * d
    assert count("attnpool", d, n) == (n + 1) * d + 1 == count("attnpool", d, n, init="paper") + 1
    laya = n * (d * r + r) + (2 * n * r * r + 2 * r) + (2 * r * n + n) + (r * d + d)
    assert count("laya", d, n, bottleneck=r) == laya
    uniform = n * d * r + 3 * r + d * r + d
    assert count("dwconcat", d, n, bottleneck=r, weights="uniform") == uniform
    assert count("dwconcat", d, n, bottleneck=r, heads=4) == uniform + d * r + n * r + 4 * n
    assert count("dwatt", d, n, bottleneck=r, weights="uniform") == n * (2 * d * r + 3 * r + 3 * d)


def test_dwatt_count_is_the_published_arithmetic():
    assert count("dwatt", 768, 12, **FUSIONS["dwatt"].paper) == 7_729_824
    assert count("dwatt", 768, 12, layers=list(range(13))) == 8_323_128
    assert count("dwatt", 1024, 24) == 26_352_704


@pytest.mark.parametrize(("d", "n"), [(32, 3), (96, 12)])
def test_counts_follow_the_closed_formulas(d, n):
    r = 10
    mlp = 2 * d * r + 3 * r + d
    assert count("dwatt", d, n, bottleneck=r) == n * (mlp + 2 * d) + mlp + 24 * n + 24 * d
    assert count("concat", d, n) == n * d * d + d
    assert count("concat", d, n, bottleneck=r) == n * d * r + r + r * d + d
    assert count("mlp", d, n, bottleneck=r) == mlp
    assert count("scalar_mix", d, n) == n + 1
    assert count("deeper", d, n, num_blocks=2) == 2 * (12 * d * d + 13 * d)
    assert count("last", d, n) == 0


def test_one_deeper_block_is_as_large_as_a_bert_block():
    assert count("deeper", 768, 12) == 7_087_872


@pytest.mark.parametrize("name", FUSIONS)
def test_every_method_starts_as_the_identity_and_learns_from_there(name):
    fusion = build_fusion(name, D, L)
    states = [torch.randn(B, T, D) for _ in fusion.layers]
    last = torch.randn(B, T, D)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=1e-2) if list(fusion.parameters()) else None
    assert (fusion(states, last) - last).abs().max() <= 1e-6
    if optimizer is None:
        return
    target = torch.randn(B, T, D)
    losses = []
    for _ in range(60):
        loss = (fusion(states, last) - target).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] * (0.999 if name in ("scalar_mix", "attnres", "attnpool") else 0.8)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters()), "a parameter takes no part"


@pytest.mark.parametrize("name", [n for n in FUSIONS if n != "last"])
def test_the_paper_form_is_not_the_identity(name):
    fusion = build_fusion(name, D, L, **FUSIONS[name].paper)
    states = [torch.randn(B, T, D) for _ in fusion.layers]
    last = torch.randn(B, T, D)
    assert (fusion(states, last) - last).abs().max() > 1e-2


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_states_give_16_bit_results_near_those_of_float32(name, dtype):
    fusion, states, last = build(name)
    exact = fusion(states, last)
    rounded = fusion([s.to(dtype) for s in states], last.to(dtype))
    assert rounded.dtype == dtype
    assert all(p.dtype == torch.float32 for p in fusion.parameters())
    epsilon = torch.finfo(dtype).eps
    assert (rounded.float() - exact).abs().max() <= 24 * epsilon * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in FUSIONS),
        ("concat", {"bottleneck": 5}),
        *((n, {"weights": "uniform"}) for n in ("dwatt", "dwconcat")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), [("cpu", (B, 0, D)), ("cpu", (0, T, D)), ("meta", (B, T, D))])
def test_batches_without_tokens_and_on_the_meta_device(name, options, dtype, device, shape):
    fusion, _, _ = build(name, **options)
    fusion.to(device)
    states = [torch.zeros(shape, dtype=dtype, device=device) for _ in fusion.layers]
    last = torch.zeros(shape, dtype=dtype, device=device)
    answers = [fusion(states, last)]
    if fusion.absorbs:
        kept = None
        with torch.no_grad():
            for index, state in enumerate(states):
                kept = fusion.absorb(kept, index, state)
            answers.append(fusion.finish(kept, last))
    for answer in answers:
        assert (answer.shape, answer.dtype, answer.device.type) == (shape, dtype, device)


@pytest.mark.parametrize("name", [n for n in FUSIONS if not FUSIONS[n].mixes_positions])
def test_a_fusion_over_depth_does_not_mix_positions(name):
    fusion, states, last = build(name)
    whole = fusion(states, last)
    alone = fusion([s[:, 1:2] for s in states], last[:, 1:2])
    torch.testing.assert_close(whole[:, 1:2], alone)


def test_weights_over_depth_sum_to_one_and_dropout_acts_in_training_only():
    fusion, states, last = build("dwatt", heads=4, dropout=0.5)
    _, weights = fusion(states, last, return_weights=True)
    assert weights.shape == (B, T, 4, L)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, T, 4))
    assert torch.equal(fusion(states, last), fusion(states, last))
    fusion.train()
    assert not torch.equal(fusion(states, last), fusion(states, last))


def test_unfit_options_are_refused_with_what_would_fit():
    with pytest.raises(ValueError, match="Did you mean 'dwatt'"):
        build_fusion("dwat", D, L)
    with pytest.raises(ValueError, match=r"fusion_heads=3 does not divide the hidden size 16.*\[1, 2, 4, 8, 16\]"):
        build_fusion("dwatt", D, L, heads=3)
    with pytest.raises(ValueError, match="fusion_heads=5 does not divide"):
        build_fusion("deeper", D, L, heads=5)
    with pytest.raises(ValueError, match="width of 0"):
        build_fusion("mlp", D, L, bottleneck=0.01)
    with pytest.raises(ValueError, match=r"'identity'.*'paper'"):
        build_fusion("concat", D, L, init="zero")
    with pytest.raises(ValueError, match="at least one block"):
        build_fusion("deeper", D, L, num_blocks=0)
    with pytest.raises(ValueError, match="use_cache=False"):
        build_fusion("deeper", D, L)([], torch.randn(B, 1, D), Context(causal=True, cached_positions=7))


def test_options_are_listed_with_their_defaults():
    assert fusion_options("dwatt") == {
        "bottleneck": 0.5,
        "heads": 8,
        "scale": True,
        "dropout": 0.0,
        "weights": "attention",
        "init": "identity",
    }
    assert fusion_options("last") == {}


def test_position_embeddings_start_in_the_unit_interval():
    position = build_fusion("dwatt", 64, 12, **FUSIONS["dwatt"].paper).position
    assert position.shape == (12, 24)
    assert position.min() >= 0 and position.max() <= 1
    assert math.isclose(position.mean().item(), 0.5, abs_tol=0.06)


@pytest.mark.parametrize("name", FUSIONS)
def test_every_option_has_a_type_and_a_meaning_and_is_a_field_of_the_config(name):
    fields = {f.name: f for f in dataclasses.fields(FusionConfig)}
    assert set(FUSIONS[name].widths) <= set(fusion_options(name))
    for option in fusion_options(name):
        kinds, meaning = all_options()[option].kinds, all_options()[option].help
        assert kinds and f"`{name}`" in meaning and not meaning.endswith(": ")
        field = fields[f"fusion_{option}"]
        assert (field.default, field.metadata["help"]) == (None, meaning)
        assert FusionConfig.__doc__.count(f"        fusion_{option}: ") == 1
