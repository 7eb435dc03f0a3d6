"""Linear stand-ins for attention, feed-forward and norms."""

import functools

import numpy
import pytest
import torch
from support import tiny
from support_linear import DEPTH, WIDTH, decoder, padded, some_rows
from transformers import Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from fusion_adapters.shortcuts import FitOptions, PartOptions, Readout, evaluate_parts, fit_parts, fit_shortcuts
from fusion_adapters.shortcuts.evaluate import evaluate_shortcuts
from fusion_adapters.shortcuts.parts.submodules import MODES, PartSet, StandIn

ROWS, OTHERS = some_rows(40), some_rows(10, seed=1)
NAMES = {
    "llama": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    "gpt2": ("ln_1", "attn", "ln_2", "mlp"),
}
PARTS = ("attention_norm", "attention", "feed_forward_norm", "feed_forward")


def blocks_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def parts(model, **options):
    return fit_parts(model, ROWS, padded, PartOptions(**options), progress=False)


def inside(model, family, rows, skip=1):
    """What goes into each part of each block and comes out, at all positions but the first of each row, by block and part."""
    found = {}

    def hook(key, module, args, kwargs, output):
        given, answered = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
        found.setdefault(key, []).append((given[0, skip:], answered[0, skip:]))

    handles = [
        getattr(block, name).register_forward_hook(functools.partial(hook, (number, part)), with_kwargs=True)
        for number, block in enumerate(blocks_of(model), start=1)
        for part, name in zip(PARTS, NAMES[family], strict=True)
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    return {key: [torch.cat(e).double().numpy() for e in zip(*each, strict=True)] for key, each in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_matrices_are_least_squares_of_what_goes_in_and_comes_out(family, bias):
    model = decoder(family)
    fitted = parts(model, bias=bias, ridge=1e-9)
    assert fitted.modes == list(MODES) and len(fitted.maps) == 4 * DEPTH
    for (block, part), (given, y) in inside(model, family, ROWS).items():
        x = numpy.hstack([given, numpy.ones((len(given), 1))]) if bias else given
        # what a LayerNorm answers spans its space but for rounding: the matrix is then not the only one, what it answers is
        expected = x @ numpy.linalg.lstsq(x, y, rcond=1e-6)[0]
        stand_in = fitted.get(block, part)
        assert (stand_in.bias is not None) == bias
        found = stand_in(torch.tensor(given)).detach().numpy()
        assert abs(found - expected).max() < 1e-4 * abs(y).max()


def linearised(model, family):
    """The model with a feed-forward that is linear."""
    torch.manual_seed(5)
    for block in blocks_of(model):
        matrix = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        matrix.weight.mul_(0.5)
        setattr(block, NAMES[family][3], matrix)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_part_that_is_linear_is_stood_in_for_without_loss(family):
    model = linearised(decoder(family), family)
    fitted = parts(model, modes=["feed_forward"])
    assert fitted.modes == ["feed_forward"]
    scores = evaluate_parts(model, fitted, range(DEPTH), OTHERS, padded, progress=False)
    assert [(s.kind, s.source, s.target) for s in scores] == [("feed_forward", layer, DEPTH) for layer in range(DEPTH)]
    assert all(s.precision[1] == 1 and s.r2 > 1 - 1e-6 for s in scores)


def replaced_by_hand(model, family, fitted, mode, above, ids):
    """The last state of one row, with a part of the blocks above a layer replaced at all positions but the first."""
    swapped, blocks, found = [], blocks_of(model), []
    for number in range(above + 1, DEPTH + 1):
        for part in MODES[mode]:
            name = NAMES[family][PARTS.index(part)]
            stand_in, module = fitted.get(number, part), getattr(blocks[number - 1], name)

            class Mixed(torch.nn.Module):
                def __init__(self, real, stand_in):
                    super().__init__()
                    self.real, self.stand_in = real, stand_in

                def forward(self, hidden_states, **kwargs):
                    real = self.real(hidden_states, **kwargs)
                    state = real[0] if isinstance(real, tuple) else real
                    cast = hidden_states @ self.stand_in.weight.T + self.stand_in.bias
                    mixed = torch.cat([state[:, :1], cast[:, 1:]], dim=1)
                    return (mixed, *real[1:]) if isinstance(real, tuple) else mixed

            setattr(blocks[number - 1], name, Mixed(module, stand_in))
            swapped.append((blocks[number - 1], name, module))
    handle = blocks[-1].register_forward_hook(
        lambda _, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits
    handle.remove()
    for block, name, module in swapped:
        setattr(block, name, module)
    return found[0][0, 1:], logits[0, 1:]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", list(MODES))
def test_scores_are_those_of_parts_replaced_by_hand(family, mode):
    model = decoder(family)
    fitted = parts(model)
    scores = evaluate_parts(model, fitted, [0, 2], OTHERS, padded, batch_size=3, progress=False)
    assert len(scores) == 6
    for above in (0, 2):
        score = next(s for s in scores if (s.kind, s.source) == (mode, above))
        full, cast, true, states = [], [], [], []
        for row in OTHERS:
            with torch.no_grad():
                full.append(model(input_ids=torch.tensor([row["input_ids"]])).logits[0, 1:])
            state, logits = replaced_by_hand(model, family, fitted, mode, above, row["input_ids"])
            cast.append(logits)
            states.append(state)
            true.append(replaced_by_hand(model, family, fitted, mode, DEPTH, row["input_ids"])[0])
        full, cast, true, states = (torch.cat(each).double() for each in (full, cast, true, states))
        first = cast.argmax(-1)
        assert score.positions == len(first)
        for k in (1, 5, 10):
            assert score.precision[k] == pytest.approx(
                float((full.topk(k).indices == first[:, None]).any(-1).double().mean())
            )
        assert score.surprisal == pytest.approx(float(-full.log_softmax(-1).gather(-1, first[:, None]).mean()), rel=1e-4)
        r2 = 1 - (true - states).square().sum(0) / (true - true.mean(0)).square().sum(0)
        assert score.r2 == pytest.approx(float(r2.mean()), rel=1e-3, abs=1e-4)


def test_whole_blocks_are_judged_beside_at_the_same_positions():
    model = decoder()
    fitted = parts(model, modes=["attention"])
    maps = fit_shortcuts(model, ROWS, padded, FitOptions(sources=[1, 2], fused=[0]), progress=False).shortcuts
    scores = evaluate_parts(model, fitted, [2, 3], OTHERS, padded, shortcuts=maps, progress=False)
    assert [(s.kind, s.source) for s in scores] == [("attention", 2), ("attention", 3), ("mat", 2), ("fused", 2)]
    beside = evaluate_shortcuts(model, maps, OTHERS, padded, readout=Readout(model), with_identity=False, progress=False)
    for score in scores[2:]:
        (other,) = (s for s in beside if (s.kind, s.source) == (score.kind, score.source))
        assert (score.positions, score.precision) == (other.positions, other.precision)
        assert (score.surprisal, score.r2) == pytest.approx((other.surprisal, other.r2), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cached_decoding_replaces_the_same_positions(family):
    model = decoder(family)
    fitted = parts(model)
    ids = torch.tensor([some_rows(1, seed=3)[0]["input_ids"]])
    plain = model(input_ids=ids).logits
    for mode in MODES:
        with fitted.replacing(model, mode, 1), torch.no_grad():
            whole = model(input_ids=ids).logits
            first = model(input_ids=ids[:, :4], use_cache=True)
            second = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
        assert torch.allclose(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-4)
        assert torch.allclose(whole[:, 0], plain[:, 0], atol=1e-5) and not torch.allclose(
            whole[:, 1:], plain[:, 1:], atol=0.1
        )
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_blocks_below_are_left_out_if_asked():
    model = decoder()
    whole, upper = parts(model), parts(model, above=2, modes=["norms", "attention"])
    assert list(upper.maps) == [f"{n} {part}" for n in (3, 4) for part in PARTS[:3]]
    for name, stand_in in upper.maps.items():
        assert torch.equal(stand_in.weight, whole.maps[name].weight)
    with (
        pytest.raises(ValueError, match=r"no stand-in for attention of block 2.*Fit it"),
        upper.replacing(model, "attention", 1),
    ):
        pass


def test_other_families_want_their_names():
    config = GPTNeoXConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    assert len(parts(GPTNeoXForCausalLM(config).eval()).maps) == 8
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    gemma = Gemma2ForCausalLM(Gemma2Config(**shape, intermediate_size=32, vocab_size=40, pad_token_id=0)).eval()
    # its post_attention_layernorm is none before the feed-forward
    with pytest.raises(ValueError, match=r"not known: it holds self_attn.*names=\[...\]"):
        parts(gemma)
    names = ["input_layernorm", "self_attn", "pre_feedforward_layernorm", "mlp"]
    fitted = parts(gemma, names=names)
    scores = evaluate_parts(gemma, fitted, [1], OTHERS, padded, progress=False)
    assert [s.kind for s in scores] == list(MODES)
    with pytest.raises(ValueError, match="not all of"):
        parts(gemma, names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=r"given 16 values and answers with 24"):
        parts(decoder(), names=["input_layernorm", "self_attn", "post_attention_layernorm", "mlp.up_proj"])
    with pytest.raises(ValueError, match="not known"):
        parts(tiny("bert", "mlm"))


def test_errors_name_the_remedy():
    model = decoder()
    fitted = parts(model, modes=["attention"])
    with pytest.raises(ValueError, match="choose one of attention"), fitted.replacing(model, "mlp", 0):
        pass
    with pytest.raises(ValueError, match="4 blocks, and this one has 3"), fitted.replacing(decoder(depth=3), "attention", 0):
        pass
    with pytest.raises(ValueError, match=r"give layers from 0 .* to 3"):
        evaluate_parts(model, fitted, [4], OTHERS, padded, progress=False)
    with pytest.raises(ValueError, match=r"from 0 .* to 3"):
        parts(model, above=4)
    for wrong in ({"modes": ["mlp"]}, {"modes": []}, {"names": ["a"]}, {"ridge": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PartOptions(**wrong)
    assert isinstance(fitted, PartSet) and isinstance(fitted.get(1, "attention"), StandIn)
