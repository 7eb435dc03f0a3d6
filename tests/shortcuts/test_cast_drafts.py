"""transformers' early-exit drafts, cast to the last layer by a shortcut."""

from __future__ import annotations

import pytest
import torch
from support_drafts import collator, family, model, written

from fusion_adapters.shortcuts import FitOptions, Shortcut, ShortcutSet, cast_drafts, fit_shortcuts

EXIT = 2


@pytest.fixture(scope="module")
def fitted():
    """A model whose last block adds a constant: a draft below it lacks that, and an affine cast has it."""
    llm = model(mlp_bias=True)
    last = llm.model.layers[-1]
    last.self_attn.o_proj.weight.zero_()
    last.mlp.down_proj.weight.zero_()
    llm.generation_config.assistant_confidence_threshold = 0.0  # else a random model's drafts end after a token
    llm.generation_config.num_assistant_tokens = 4
    last.mlp.down_proj.bias.copy_(6 * torch.randn(32, generator=torch.Generator().manual_seed(5)))
    rows = written(llm, count=48, length=16)
    options = FitOptions(sources=[1, EXIT], fused=[0, 1], ridge=1e-6)
    return llm, rows, fit_shortcuts(llm, rows, collator, options, progress=False).shortcuts


def passes_of(llm, ids):
    """What is written with early-exit drafts, and in how many passes of all blocks."""
    count = 0

    def note(*_):
        nonlocal count
        count += 1

    handle = llm.model.layers[-1].register_forward_hook(note)
    try:
        found = llm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=15,
            do_sample=False,
            eos_token_id=None,
            assistant_early_exit=EXIT,
        )
    finally:
        handle.remove()
    return found, count


@pytest.mark.parametrize("kind", ["mat", "fused"])
def test_drafts_are_right_more_often_and_tokens_are_those_of_greedy_search(fitted, kind):
    llm, rows, shortcuts = fitted
    as_they_are = cast = 0
    for row in rows[:2]:
        ids = torch.tensor([row["input_ids"][:3]])
        plain = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False, eos_token_id=None)
        found, count = passes_of(llm, ids)
        assert torch.equal(found, plain)
        as_they_are += count
        with cast_drafts(llm, shortcuts, kind):
            found, count = passes_of(llm, ids)
        assert torch.equal(found, plain)
        cast += count
    assert cast <= 0.5 * as_they_are


def test_the_drafts_state_is_that_of_the_shortcut(fitted):
    """What comes before the final norm while transformers drafts, against the shortcut of the plain states."""
    llm, rows, shortcuts = fitted
    ids = torch.tensor([rows[0]["input_ids"]])
    states = llm(ids, output_hidden_states=True).hidden_states
    normed = []
    handle = llm.model.norm.register_forward_pre_hook(lambda module, args: normed.append(args[0]))
    with torch.no_grad(), cast_drafts(llm, shortcuts, "fused"):
        llm.model.config.num_hidden_layers = EXIT
        llm(ids)
    handle.remove()
    assert llm.model.config.num_hidden_layers == 3
    shortcut = shortcuts.get(EXIT, kind="fused")
    assert shortcut.sources == (0, 1, 2)
    torch.testing.assert_close(normed[0], shortcut({i: states[i] for i in range(3)}), rtol=1e-4, atol=1e-4)


def test_calls_of_all_blocks_are_left_alone_and_nothing_stays(fitted):
    llm, rows, shortcuts = fitted
    ids = torch.tensor([rows[0]["input_ids"]])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.modules()]
    with torch.no_grad():
        before = llm(ids).logits
        with cast_drafts(llm, shortcuts):
            assert torch.equal(llm(ids).logits, before)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.modules()]


def test_an_exit_without_a_shortcut_is_named_and_the_model_stays_whole(fitted):
    llm, rows, shortcuts = fitted
    only = ShortcutSet([shortcuts.get(1)], 32, 3)
    with pytest.raises(ValueError, match="from layer 2"), cast_drafts(llm, only):
        passes_of(llm, torch.tensor([rows[0]["input_ids"][:3]]))
    assert llm.config.num_hidden_layers == 3


def test_a_model_that_drafts_with_all_its_blocks_is_refused():
    llm = family("gpt2")
    shortcuts = ShortcutSet([Shortcut(32, [EXIT], 3)], 32, 3)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="runs all its blocks"), cast_drafts(llm, shortcuts):
        llm.generate(ids, max_new_tokens=5, do_sample=False, assistant_early_exit=EXIT)
    assert llm.config.num_hidden_layers == 3


def test_shortcuts_of_another_backbone_are_refused(fitted):
    llm, _, _ = fitted
    with pytest.raises(ValueError, match="hidden size 16"), cast_drafts(llm, ShortcutSet([], 16, 3)):
        pass
