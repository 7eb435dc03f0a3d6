"""Least squares from sums: equal to scikit-learn on the same vectors, of low rank to a literal float64 reading, or a clear refusal."""

import copy
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from support import tiny
from support_shortcuts import close, fitted, moments_of, rows_of_tokens, states_of, wide

from fusion_adapters.shortcuts import FUSED, MAT, FitOptions, SingularError, fit_shortcuts, solve
from fusion_adapters.shortcuts.moments import Moments, pairs_of

L = 4


@pytest.fixture(scope="module")
def states():
    """Of a tiny decoder, all layers; the sizes of the channels are orders apart, as in real models."""
    torch.manual_seed(0)
    found = states_of(tiny("llama", "lm"), rows_of_tokens())
    sizes = torch.logspace(-1, 2, 32)
    return {layer: state / state.std() * sizes + 2 for layer, state in found.items()}


def solved(states, sources, **options):
    return solve(moments_of(states, pairs_of(sources, L)), sources, L, **options)


def cast(shortcut, states):
    """What a shortcut of float32 weights gives in exact arithmetic."""
    return copy.deepcopy(shortcut).double()({layer: state.double() for layer, state in states.items()})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sources", [(0,), (2,), (3,), (0, 2), (0, 1, 3)], ids=str)
def test_a_shortcut_equals_scikit_learns_linear_regression(states, sources, bias):
    found = solved(states, sources, bias=bias)
    expected = LinearRegression(fit_intercept=bias).fit(wide(states, sources), wide(states, [L]))
    # the channels' sizes are orders apart, so each weight is compared by what it brings
    sizes = wide(states, sources).std(0)
    assert close(found.weight * torch.tensor(sizes), expected.coef_ * sizes)
    if bias:
        assert close(found.bias, expected.intercept_)
    else:
        assert found.bias is None
    assert close(cast(found, states), expected.predict(wide(states, sources)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sources", [(1,), (0, 2)], ids=str)
def test_ridge_equals_scikit_learns_on_sources_of_mean_square_one(states, sources, bias):
    ridge, n = 1e-3, len(states[L])
    found = solved(states, sources, bias=bias, ridge=ridge)
    parts = [wide(states, [s]) for s in sources]
    varying = [p - p.mean(0) if bias else p for p in parts]
    units = np.concatenate([np.full(p.shape[1], np.sqrt((v**2).mean())) for p, v in zip(parts, varying, strict=True)])
    inputs = wide(states, sources) / units
    expected = Ridge(alpha=ridge * n, fit_intercept=bias, solver="cholesky").fit(inputs, wide(states, [L]))
    assert close(found.weight * torch.tensor(units), expected.coef_)
    assert close(cast(found, states), expected.predict(inputs))


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("sources", "rank"), [((1,), 3), ((0, 2), 7)], ids=str)
def test_low_rank_equals_reduced_rank_regression(states, sources, rank, bias, ridge):
    """Izenman (1975): the least-squares matrix projected onto the first principal directions of the fitted values."""
    x, y = wide(states, sources), wide(states, [L])
    means = (x.mean(0), y.mean(0)) if bias else (0, 0)
    x, y = x - means[0], y - means[1]
    penalty = np.repeat([np.sqrt(ridge * (x[:, i : i + 32] ** 2).sum() / 32) for i in range(0, x.shape[1], 32)], 32)
    stacked = np.concatenate([x, np.diag(penalty)])  # ridge as further rows
    matrix = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros((x.shape[1], 32))]), rcond=None)[0]  # (k d, d)
    directions = np.linalg.svd(stacked @ matrix, full_matrices=False)[2][:rank]  # (r, d)
    expected = x @ matrix @ directions.T @ directions + means[1]
    found = solved(states, sources, bias=bias, ridge=ridge, rank=rank)
    assert (found.up.shape, found.down.shape, found.weight) == ((32, rank), (rank, 32 * len(sources)), None)
    assert close(cast(found, states), expected)


def test_low_rank_is_the_best_of_its_rank_and_nears_the_whole_matrix(states):
    def error(shortcut):
        return float((shortcut(states).double() - states[L].double()).square().sum())

    errors = [error(solved(states, (1,), rank=rank)) for rank in (1, 4, 16, 31)]
    assert errors == sorted(errors, reverse=True) and errors[-1] >= error(solved(states, (1,))) * (1 - 1e-9)
    whole = solved(states, (1,))
    u, s, v = torch.linalg.svd(whole.weight.double())
    cut = whole.weight.clone(), whole
    whole.weight.data = ((u[:, :4] * s[:4]) @ v[:4]).float()
    assert error(whole) > errors[1], "cutting the matrix itself is no better than cutting the fitted values"
    whole.weight.data = cut[0]


def test_more_layers_never_fit_worse_than_fewer(states):
    def error(*sources):
        return float((solved(states, sources)(states).double() - states[L].double()).square().sum())

    assert error(0, 1, 2) < error(1, 2) < error(2)


def test_sums_of_parts_are_the_sums_of_the_whole_and_as_large_for_any_number_of_positions(states):
    pairs = pairs_of((0, 2), L)
    whole, parts = moments_of(states, pairs), Moments(32, pairs)
    size = parts.bytes
    for start in range(0, len(states[L]), 37):
        parts.add({layer: state[start : start + 37] for layer, state in states.items()})
    assert parts.count == whole.count == len(states[L]) and parts.bytes == size == 8 * (5 * 32 * 32 + 3 * 32)
    for pair, total in whole.products.items():
        torch.testing.assert_close(parts.products[pair], total, rtol=1e-12, atol=1e-9)


def test_a_layer_norm_at_the_end_of_blocks_takes_one_direction_and_no_weight_blows_up():
    """The states of BERT sum up to the same at each position, but for rounding, in which least squares must see nothing."""
    model = tiny("bert", "mlm")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    rows = rows_of_tokens(200)
    states = states_of(model, rows)
    assert np.linalg.matrix_rank(wide(states, [2]) - wide(states, [2]).mean(0), rtol=1e-5) == 31
    for sources in ([2], [0, 1, 3]):
        found = solved(states, sources)
        x, y = wide(states, sources), wide(states, [L])
        means = x.mean(0), y.mean(0)
        expected = (x - means[0]) @ np.linalg.lstsq(x - means[0], y - means[1], rcond=1e-5)[0] + means[1]
        assert close(cast(found, states), expected, 1e-5)
        assert found.weight.abs().max() < 10
        rounded = {layer: state.bfloat16() for layer, state in states.items()}
        assert (found(rounded).float() - found(states)).norm() < 0.02 * found(states).norm()


def test_too_few_positions_warn_with_the_number_that_is_wanted(states):
    few = {layer: state[:40] for layer, state in states.items()}
    with pytest.warns(
        UserWarning, match=r"from \[0, 2\] to 4 has 64 inputs and is fitted to 40 positions.*at least 256.*ridge"
    ):
        solved(few, (0, 2), ridge=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved(few, (2,))


@pytest.mark.filterwarnings("ignore:The shortcut from")
@pytest.mark.parametrize("bias", [False, True])
def test_equations_without_one_solution_are_refused_with_the_remedy(states, bias):
    few = {layer: state[:20] for layer, state in states.items()}
    with pytest.raises(SingularError, match=r"from \[2\].*over 20 positions.*fewer than its 32 dim.*Give ridge \(1e-4"):
        solved(few, (2,), bias=bias)
    assert solved(few, (2,), bias=bias, ridge=1e-4).weight.isfinite().all()
    half = {layer: state.clone() for layer, state in states.items()}
    half[2][:, 16:] = half[2][:, :16]
    with pytest.raises(SingularError, match="Give ridge"):
        solved(half, (2,), bias=bias)
    repeated = {layer: state[:10].repeat(100, 1) for layer, state in states.items()}
    with pytest.raises(SingularError, match="over 1,000 positions"):
        solved(repeated, (2,), bias=bias)


def test_a_channel_that_never_varies_is_named(states):
    dead = {layer: state.clone() for layer, state in states.items()}
    dead[2][:, 5] = 5.3
    with pytest.raises(SingularError, match=r"\(1 of them never vary\)"):
        solved(dead, (2,))
    assert solved(dead, (2,), ridge=1e-6).weight[:, 5].abs().max() < 1e-3
    dead[2][:, 5] = 0
    with pytest.raises(SingularError, match=r"\(1 of them never vary\)"):
        solved(dead, (2,), bias=False)


def test_no_position_at_all_is_refused():
    with pytest.raises(ValueError, match="no position to fit a shortcut to"):
        solve(Moments(8, [(0, 0), (0, 1)]), [0], 1)


def test_shortcuts_know_their_layers():
    shortcuts = fitted(sources=[1, 3], fused=[0, 1, 2])
    assert [(s.kind, s.sources, s.target) for s in shortcuts] == [
        (MAT, (1,), 4),
        (MAT, (3,), 4),
        (FUSED, (0, 1), 4),
        (FUSED, (0, 1, 2, 3), 4),
    ]
    assert shortcuts.sources() == [1, 3] and shortcuts.kinds() == [MAT, FUSED]
    assert shortcuts.get(3, kind=FUSED).sources == (0, 1, 2, 3)
    state = {2: torch.randn(5, 32)}
    assert shortcuts.get(2, kind="identity")(state) is state[2]
    with pytest.raises(
        ValueError, match=r"no 'mat' shortcut from layer 2 to layer 4.*some from: 1, 3.*kinds here are: fused, mat"
    ):
        shortcuts.get(2)
    paper = fitted(pairs="all", fused=None, bias=False)
    assert len(paper) == L * (L + 1) // 2 and all(s.bias is None for s in paper)


def test_options_that_cannot_be_are_refused_before_the_model_runs():
    with pytest.raises(ValueError, match=r"pairs='some': choose 'last'.*'all'"):
        FitOptions(pairs="some")
    with pytest.raises(ValueError, match=r"ridge=-1: it must be 0 or more"):
        FitOptions(ridge=-1)
    with pytest.raises(ValueError, match="ridge=nan"):
        FitOptions(ridge=float("nan"))
    with pytest.raises(ValueError, match="batch_size=0"):
        FitOptions(batch_size=0)
    with pytest.raises(ValueError, match="positions='some': choose one of all, one, labelled"):
        FitOptions(positions="some")

    def forbidden(*args):
        raise AssertionError("the model ran")

    model = tiny("llama", "lm")
    model.model.layers[0].register_forward_pre_hook(forbidden)
    with pytest.raises(ValueError, match=r"sources=\[1, 4\]: \[4\] can(not)? be cast from.*0 \(embeddings\) to 4.*0 to 3"):
        fit_shortcuts(model, rows_of_tokens(4), None, FitOptions(sources=[1, 4]), progress=False)
    with pytest.raises(ValueError, match=r"fused=\[0, 9\]: \[9\] out of range"):
        fit_shortcuts(model, rows_of_tokens(4), None, FitOptions(fused=[0, 9]), progress=False)
    with pytest.raises(ValueError, match="fused='each:2' is no choice of layers"):
        fit_shortcuts(model, rows_of_tokens(4), None, FitOptions(fused="each:2"), progress=False)
    with pytest.raises(ValueError, match="rank=32: a shortcut of 32 dimensions"):
        fit_shortcuts(model, rows_of_tokens(4), None, FitOptions(rank=32), progress=False)
