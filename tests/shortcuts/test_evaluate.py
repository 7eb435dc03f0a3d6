"""r2, Precision@k and surprisal: equal to scikit-learn and to a literal float64 reading, in the right order for a model that is known."""

import math

import pytest
import torch
from sklearn.metrics import r2_score
from support import tiny
from support_cache import pad
from support_shortcuts import fitted, rows_of_tokens, states_of

from fusion_adapters import quantization_config
from fusion_adapters.shortcuts import FUSED, IDENTITY, MAT, FitOptions, Readout, Shortcut, ShortcutSet, fit_shortcuts
from fusion_adapters.shortcuts import evaluate as evaluate_module
from fusion_adapters.shortcuts.evaluate import best_of, evaluate_shortcuts
from fusion_adapters.shortcuts.stream import Choice

L = 4
TEST = rows_of_tokens(30, seed=9)


@pytest.fixture(params=[("llama", "lm", 1), ("bert", "mlm", 0)], ids=["decoder", "encoder"])
def case(request):
    """A model with norms off their start, shortcuts of it, and its states of the test rows."""
    family, head, skip = request.param
    model = tiny(family, head)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, fitted(model, fused=[0], ridge=1e-4), states_of(model, TEST, skip)


def literal(readout, cast, full):
    """The paper's metrics, one position at a time."""
    hits, surprisal = {1: 0, 5: 0, 10: 0}, 0.0
    with torch.no_grad():
        for said, meant in zip(readout(cast).double().tolist(), readout(full).double().tolist(), strict=True):
            first = max(range(len(said)), key=lambda token: said[token])
            order = sorted(range(len(meant)), key=lambda token: -meant[token])
            for k in hits:
                hits[k] += first in order[:k]
            top = max(meant)
            surprisal -= meant[first] - top - math.log(sum(math.exp(value - top) for value in meant))
    return {k: n / len(cast) for k, n in hits.items()}, surprisal / len(cast)


@pytest.mark.parametrize("at_once", [512, 7])
def test_scores_equal_scikit_learn_and_a_literal_reading(case, monkeypatch, at_once):
    monkeypatch.setattr(evaluate_module, "AT_ONCE", at_once)
    model, shortcuts, states = case
    readout = Readout(model)
    scores = evaluate_shortcuts(model, shortcuts, TEST, pad, readout=readout, batch_size=5, progress=False)
    assert {s.kind for s in scores} == {MAT, FUSED, IDENTITY} and len(scores) == 4 + 3 + 4
    for score in scores:
        cast = shortcuts.get(score.source, kind=score.kind)(states)
        expected = r2_score(states[L].double().numpy(), cast.double().numpy())
        assert abs(score.r2 - expected) <= 1e-5 * max(1, abs(expected))
        precision, surprisal = literal(readout, cast, states[L])
        assert score.precision == pytest.approx(precision, abs=1e-12)
        assert score.precision[1] <= score.precision[5] <= score.precision[10]
        assert score.surprisal == pytest.approx(surprisal, abs=1e-4)
        assert score.positions == len(cast)


def test_r2_alone_equals_scikit_learns_to_the_last_digits():
    torch.manual_seed(0)
    wanted = torch.randn(50, 6) * torch.logspace(-2, 3, 6) + 100
    found = wanted + 0.3 * torch.randn(50, 6)
    wanted[:, 3] = 7.1  # never varies, and is missed
    wanted[:, 4] = found[:, 4] = 0.3  # never varies, and is met
    r2 = evaluate_module.R2()
    for start in range(0, 50, 8):
        r2.add(wanted[start : start + 8], found[start : start + 8], wanted[:1].double())
    assert r2.value() == pytest.approx(r2_score(wanted.double().numpy(), found.double().numpy()), abs=1e-9)


def test_a_coordinate_that_a_norm_has_switched_off_counts_as_constant():
    torch.manual_seed(0)
    wanted = torch.randn(50, 4)
    found = wanted + 0.3 * torch.randn(50, 4)
    wanted[:, 2] *= 1e-30
    r2 = evaluate_module.R2()
    r2.add(wanted, found, wanted.double().mean(0))
    others = [r2_score(wanted[:, i].double().numpy(), found[:, i].double().numpy()) for i in (0, 1, 3)]
    assert r2.value() == pytest.approx(sum(others) / 4, abs=1e-9)
    met = evaluate_module.R2()
    found[:, 2] = 0
    met.add(wanted, found, wanted.double().mean(0))
    assert met.value() == pytest.approx((sum(others) + 1) / 4, abs=1e-9)


def test_a_channel_that_never_varies_counts_as_scikit_learn_counts_it():
    model = tiny("llama", "lm")
    with torch.no_grad():  # the state's last channel is the embedding's, and no block adds to it
        model.model.embed_tokens.weight[:, -1] = 0.3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[-1] = 0
            layer.mlp.down_proj.weight[-1] = 0
    states = states_of(model, TEST, 1)
    assert states[L][:, -1].unique().numel() == 1
    shortcuts = fitted(model, sources=[1], fused=None, ridge=1e-4)
    scores = evaluate_shortcuts(model, shortcuts, TEST, pad, progress=False)
    for score in scores:
        cast = shortcuts.get(1, kind=score.kind)(states)
        assert score.r2 == pytest.approx(r2_score(states[L].double().numpy(), cast.double().numpy()), abs=1e-3)


def test_scores_of_all_pairs_have_words_only_at_the_last_layer():
    model = tiny("llama", "lm")
    shortcuts = fitted(model, pairs="all", fused=None, ridge=1e-4)
    scores = evaluate_shortcuts(model, shortcuts, TEST, pad, readout=Readout(model), progress=False)
    assert {(s.source, s.target) for s in scores if s.kind == MAT} == {(i, j) for j in range(1, 5) for i in range(j)}
    for score in scores:
        assert (score.surprisal is None) == (score.target < L) == (not score.precision)
        assert ("precision@1" in score.as_json()) == ("surprisal" in score.as_json()) == (score.target == L)
    assert sorted(best_of(scores, MAT)) == [0, 1, 2, 3] and best_of(scores, MAT)[2].target == L
    assert all(not s.precision for s in evaluate_shortcuts(model, shortcuts, TEST, pad, progress=False))


def test_an_exact_shortcut_says_what_the_model_says():
    """The last block of this model is a linear map of the state, which the fit finds."""
    model = tiny("llama", "lm", depth=3)
    with torch.no_grad():
        model.model.layers[-1].self_attn.o_proj.weight.zero_()
        model.model.layers[-1].mlp.down_proj.weight.zero_()
    scores = evaluate_shortcuts(model, fitted(model, fused=None), TEST, pad, readout=Readout(model), progress=False)
    exact = best_of(scores, MAT)[2]
    assert exact.precision == {1: 1.0, 5: 1.0, 10: 1.0} and exact.r2 > 1 - 1e-9
    assert best_of(scores, IDENTITY)[2].precision[1] == 1.0
    assert best_of(scores, MAT)[0].precision[1] < 1


def rotating(depth=3):
    """A decoder whose blocks add to a token's state a rotation of it, up to a little: far from the identity, near to linear."""
    model = tiny("llama", "lm", depth=depth)
    torch.manual_seed(4)
    with torch.no_grad():
        for layer in model.model.layers:
            rotation = torch.linalg.qr(torch.randn(32, 32)).Q
            # the value of a position's own token alone: keys and queries are zero but for noise, and values rotate
            layer.self_attn.o_proj.weight.mul_(0.5)
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.down_proj.weight[:, :32] = 2 * rotation
            layer.mlp.up_proj.weight.zero_()
            layer.mlp.up_proj.weight[:32] = torch.eye(32)
            layer.mlp.gate_proj.weight.zero_()
            layer.mlp.gate_proj.weight[:, 0] = 0.5
    return model


def test_mat_is_above_identity_and_fused_above_mat_where_blocks_turn_the_state():
    model = rotating()
    shortcuts = fit_shortcuts(
        model, rows_of_tokens(400), pad, FitOptions(fused=[0, 1], ridge=1e-4), progress=False
    ).shortcuts
    scores = evaluate_shortcuts(model, shortcuts, TEST, pad, readout=Readout(model), progress=False)
    mat, fused, plain = (best_of(scores, kind) for kind in (MAT, FUSED, IDENTITY))
    for layer in (0, 1, 2):
        assert mat[layer].r2 > plain[layer].r2 + 0.05
        assert mat[layer].precision[1] > plain[layer].precision[1]
        assert mat[layer].surprisal < plain[layer].surprisal
    for layer in (1, 2):
        assert fused[layer].r2 > mat[layer].r2


def test_fewer_words_than_ten_are_no_error():
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=6)).eval()
    rows = [{**row, "input_ids": [i % 6 for i in row["input_ids"]]} for row in rows_of_tokens()]
    shortcuts = fit_shortcuts(model, rows, pad, FitOptions(ridge=1e-3), progress=False).shortcuts
    scores = evaluate_shortcuts(model, shortcuts, rows[:20], pad, readout=Readout(model), progress=False)
    assert all(list(s.precision) == [1, 5] and 0 <= s.precision[1] <= s.precision[5] <= 1 for s in scores)


def test_positions_are_chosen_as_in_the_fit_and_none_is_an_error():
    model = tiny("bert", "mlm")
    rows = rows_of_tokens(30, seed=9, labelled=True)
    shortcuts = ShortcutSet([Shortcut(32, [2], 4)], 32, 4)
    scores = evaluate_shortcuts(model, shortcuts, rows, pad, Choice("labelled"), progress=False)
    assert {s.positions for s in scores} == {sum(label != -100 for row in rows for label in row["labels"])}
    with pytest.raises(ValueError, match="no position to judge by"):
        evaluate_shortcuts(model, shortcuts, rows, pad, Choice(skip=50), progress=False)


def test_an_8_bit_backbone_is_fitted_and_judged_as_any(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tiny("llama", "lm", width=64)
    base.save_pretrained(tmp_path)
    eight = type(base).from_pretrained(
        tmp_path, quantization_config=quantization_config(8), dtype=torch.float32, device_map={"": "cpu"}
    )
    assert any(not p.is_floating_point() for p in eight.parameters())
    shortcuts = fitted(eight, rows=rows_of_tokens(200), fused=[0], ridge=1e-3)
    scores = evaluate_shortcuts(eight, shortcuts, TEST, pad, readout=Readout(eight), progress=False)
    assert best_of(scores, MAT)[3].r2 > best_of(scores, MAT)[0].r2 > best_of(scores, IDENTITY)[0].r2
