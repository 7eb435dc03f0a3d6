"""What each layer would say: against casts that are made by hand."""

import pytest
import torch
from support_causal import model as causal
from support_causal import tokenizer
from transformers import DataCollatorWithPadding

from fusion_adapters.shortcuts import FitOptions, Readout, fit_shortcuts, look

TEXT = [20, 31, 42, 53, 64, 75, 86]


@pytest.fixture(scope="module")
def fitted():
    model = causal()
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(4, 330, (20,), generator=generator).tolist()} for _ in range(20)]
    rows = [{**row, "attention_mask": [1] * 20} for row in rows]
    options = FitOptions(sources=[0, 1, 3], fused=[1], ridge=1e-3)
    return model, fit_shortcuts(model, rows, DataCollatorWithPadding(tokenizer()), options, progress=False).shortcuts


def states_of(model):
    """z_0 .. z_4; transformers' last hidden state is normed already, so the last is the last block's own."""
    found = {}
    handle = model.model.layers[-1].register_forward_hook(
        lambda _, __, out: found.update(last=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([TEXT]), output_hidden_states=True).hidden_states
    handle.remove()
    return {**{i: hidden[i][0] for i in range(4)}, 4: found["last"].reshape(len(TEXT), -1)}


@pytest.mark.parametrize("kind", [None, "mat", "identity"])
def test_a_view_is_what_the_head_says_of_each_cast(fitted, kind):
    model, shortcuts = fitted
    view = look(model, shortcuts, TEXT, readout=Readout(model), kind=kind)
    assert view.layers == [0, 1, 3, 4]
    assert view.kinds == (["mat", "mat", "fused", "identity"] if kind is None else [kind] * 3 + ["identity"])
    states = states_of(model)
    for layer, row, sure, used in zip(view.layers, view.tokens, view.probabilities, view.kinds, strict=True):
        cast = states[4] if layer == 4 else shortcuts.get(layer, kind=used)(states)
        with torch.no_grad():
            best = model.lm_head(model.model.norm(cast)).softmax(-1).max(-1)
        assert torch.equal(row, best.indices)
        torch.testing.assert_close(sure, best.values, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        own = model(input_ids=torch.tensor([TEXT])).logits[0].argmax(-1)
    assert torch.equal(view.tokens[-1], own) and bool(view.agrees[-1].all())
    assert torch.equal(view.agrees, view.tokens == own)


def test_only_the_layers_of_a_kind_are_looked_at(fitted):
    model, shortcuts = fitted
    assert look(model, shortcuts, TEXT, readout=Readout(model), kind="fused").layers == [3, 4]


def test_what_is_not_there_is_refused(fitted):
    model, shortcuts = fitted
    with pytest.raises(
        ValueError, match=r"no 'tuned' shortcut to layer 4.*The kinds that go there are: mat, fused, identity"
    ):
        look(model, shortcuts, TEXT, readout=Readout(model), kind="tuned")
    with pytest.raises(ValueError, match="no word pieces"):
        look(model, shortcuts, [], readout=Readout(model))
