"""Sampling by drafts draws from the distribution of plain sampling."""

from __future__ import annotations

import pytest
import torch
from support_drafts import drafter, model

from fusion_adapters.shortcuts import DraftedDecoding, DraftingOptions
from fusion_adapters.shortcuts.drafting.decoding import _accepted

VOCABULARY = 6
# A chi-square of k degrees of freedom is above k + 5 sqrt(2 k) once in some ten thousand draws at these k; chosen before any run.
BOUND = 5.0


def misfit(counts, chances):
    """How many standard deviations a chi-square is above its mean; cells that are expected less than five times are joined."""
    expected = chances * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    kept = expected > 0
    degrees = int(kept.sum()) - 1
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum() - degrees) / (2 * degrees) ** 0.5


def test_accepted_and_redrawn_tokens_together_follow_p():
    torch.manual_seed(0)
    p, q = torch.randn(2, 12).mul(1.5).softmax(-1)
    q[3], p[5] = 0.0, 0.0  # what the drafter never says, and what the model never does
    p, q = p / p.sum(), q / q.sum()
    count = 200_000
    drawn = torch.multinomial(q, count, replacement=True)
    found = _accepted(p.expand(count, -1), q.expand(count, -1), drawn)
    assert misfit(torch.bincount(found, minlength=12), p) < BOUND
    assert misfit(torch.bincount(drawn, minlength=12), p) > 10 * BOUND  # the bound tells q from p
    kept = (found == drawn).float().mean()
    assert abs(kept - torch.minimum(p, q).sum()) < 0.02  # as often as can be; what is drawn anew is another token


def test_equal_distributions_are_always_accepted():
    p = torch.tensor([[0.2, 0.0, 0.8]]).expand(1000, -1)
    drawn = torch.multinomial(p[0], 1000, replacement=True)
    assert torch.equal(_accepted(p, p, drawn), drawn)


@pytest.fixture(scope="module")
def tiny():
    """A model of six tokens, whose drafter has not learnt much: many drafts are wrong."""
    llm = model(vocab_size=VOCABULARY, num_hidden_layers=2, scale=0.4, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(2)
    rows = [{"input_ids": torch.randint(0, VOCABULARY, (12,)).tolist()} for _ in range(32)]
    return llm, drafter(llm, rows, layers=[1, 2], tokens=4, epochs=1).drafter


@torch.no_grad()
def joint(llm, ids, tokens, temperature=1.0):
    """The probability of every continuation of so many tokens, `(V^tokens,)`."""
    found = torch.ones(1)
    texts = ids
    for _ in range(tokens):
        p = (llm(texts).logits[:, -1].double() / temperature).softmax(-1)  # (n, V)
        found = (found[:, None] * p).flatten()
        texts = torch.cat(
            [texts.repeat_interleave(VOCABULARY, 0), torch.arange(VOCABULARY).repeat(len(texts))[:, None]], dim=1
        )
    return found


def numbers(written_, start):
    """The number of each continuation."""
    found = torch.zeros(len(written_), dtype=torch.long)
    for column in written_[:, start:].T:
        found = found * VOCABULARY + column
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_batches_follow_the_models_distribution(tiny, temperature):
    llm, drafts = tiny
    torch.manual_seed(1)
    ids = torch.tensor([[1, 4, 2]])
    decode = DraftedDecoding(drafts, DraftingOptions(most=2, enough=0.0))
    given = {"max_new_tokens": 3, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    written_ = llm.generate(ids.expand(4000, -1), attention_mask=torch.ones(4000, 3).long(), custom_generate=decode, **given)
    assert misfit(torch.bincount(numbers(written_, 3), minlength=VOCABULARY**3), joint(llm, ids, 3, temperature)) < BOUND


def test_single_texts_with_several_drafts_at_once_follow_it_too(tiny):
    llm, drafts = tiny
    torch.manual_seed(3)
    ids = torch.tensor([[1, 4, 2]])
    decode = DraftedDecoding(drafts, DraftingOptions(most=3, enough=0.0))
    given = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, "attention_mask": torch.ones_like(ids)}
    found = [llm.generate(ids, custom_generate=decode, **given) for _ in range(250)]
    chances = joint(llm, ids, 4).reshape([VOCABULARY] * 4)
    written_ = torch.cat(found)[:, 3:]
    for place in range(4):  # each token by itself, and each two that follow one another
        alone = chances.sum([i for i in range(4) if i != place])
        assert misfit(torch.bincount(written_[:, place], minlength=VOCABULARY), alone) < BOUND
    for place in range(3):
        two = chances.sum([i for i in range(4) if i not in (place, place + 1)]).flatten()
        pairs = written_[:, place] * VOCABULARY + written_[:, place + 1]
        assert misfit(torch.bincount(pairs, minlength=VOCABULARY**2), two) < BOUND
    assert 0 < decode.counts.accepted[1] < decode.counts.drafted[1]


def test_top_k_bounds_what_is_drawn(tiny):
    llm, drafts = tiny
    ids = torch.tensor([[1, 4, 2]]).expand(64, -1)
    decode = DraftedDecoding(drafts, DraftingOptions(most=2, enough=0.0))
    found = llm.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=decode, do_sample=True, top_k=2, max_new_tokens=3
    )
    with torch.no_grad():
        for end in range(3, 6):
            best = llm(found[:, :end]).logits[:, -1].topk(2).indices
            assert (best == found[:, end : end + 1]).any(-1).all()
