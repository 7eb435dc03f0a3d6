"""Decoding by drafts gives the tokens of plain greedy search, whatever the drafts are worth."""

from __future__ import annotations

import pytest
import torch
from support_drafts import EOS, PAD, drafter, family, prompts, shared
from support_text import byte_tokenizer
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fusion_adapters.shortcuts import DraftedDecoding, DraftingOptions

ALWAYS = DraftingOptions(most=3, enough=0.0)


def decoding(options=ALWAYS):
    llm, drafts = shared()
    return llm, DraftedDecoding(drafts, options)


def both(llm, decode, ids, **given):
    """What a model writes plainly, and by drafts."""
    given = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids), **given}
    return llm.generate(ids, **given), llm.generate(ids, custom_generate=decode, **given)


def test_200_prompts_are_written_as_by_plain_greedy_search():
    llm, decode = decoding()
    for ids in prompts(200):
        plain, drafted = both(llm, decode, ids, max_new_tokens=6)
        assert torch.equal(plain, drafted), ids
    counts = decode.counts
    assert counts.accepted[0] > 0 and counts.passes < counts.tokens - 200  # drafts were right, and saved passes
    assert counts.accepted[0] < counts.drafted[0]  # and wrong, and were taken back


@pytest.mark.parametrize("enough", [0.0, 0.02, 1.0])
def test_the_gate_decides_how_much_is_drafted_and_not_what_is_written(enough):
    llm, decode = decoding(DraftingOptions(most=3, enough=enough))
    for ids in prompts(4):
        plain, drafted = both(llm, decode, ids)
        assert torch.equal(plain, drafted)
    counts = decode.counts
    if enough == 1.0:
        assert sum(counts.drafted) == 0 and counts.passes == counts.tokens - 4
    else:
        assert sum(counts.drafted) > 0


def test_where_logits_tie_the_scores_are_those_of_plain_steps_to_the_bit():
    llm, decode = decoding(DraftingOptions(most=3, enough=0.0, ties=10.0))  # as if all were ties
    for ids in prompts(3):
        plain, drafted = both(llm, decode, ids, return_dict_in_generate=True, output_scores=True)
        assert torch.equal(plain.sequences, drafted.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.scores, drafted.scores, strict=True))
    assert 0 < decode.counts.plain <= decode.counts.tokens  # no token is read again twice


def test_a_tie_is_decided_by_the_tokens_read_one_by_one():
    """One prompt, ties looked for from the middle on: what was read together before must be read again."""
    llm, decode = decoding()
    (ids,) = prompts(1)
    seen = []
    real = type(llm).forward

    def forward(self, *args, **kwargs):
        seen.append(kwargs["input_ids"].shape[1])
        return real(self, *args, **kwargs)

    plain = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    tied = iter([False] * 3 + [True] + [False] * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(llm), "forward", forward)
        patch.setattr("fusion_adapters.shortcuts.drafting.decoding._tied", lambda *_: next(tied))
        drafted = llm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, custom_generate=decode
        )
    assert torch.equal(plain, drafted)
    again = decode.counts.plain
    assert again > 1
    first = next(i for i in range(len(seen)) if seen[i + 1 : i + 1 + again] == [1] * again)
    assert seen[first] == 4  # a check of three drafts came before


@pytest.mark.parametrize("most", [1, 3])
def test_a_batch_of_padded_prompts_is_written_as_plainly(most):
    llm, decode = decoding(DraftingOptions(most=most, enough=0.0))
    rows = prompts(5, longest=8)
    width = max(ids.shape[1] for ids in rows)
    ids = torch.cat([torch.nn.functional.pad(r, (width - r.shape[1], 0), value=PAD) for r in rows])
    mask = torch.cat([torch.arange(width)[None] >= width - r.shape[1] for r in rows]).long()
    for end in (EOS, int(llm.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=4, do_sample=False)[0, -1])):
        plain, drafted = both(llm, decode, ids, attention_mask=mask, eos_token_id=end)
        assert torch.equal(plain, drafted)
    assert (plain[:, width:] == PAD).any()  # some texts ended before others
    assert decode.counts.drafted[0] > 0


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10, "eos_token_id": [2, 5, 7, 9, 11, 13]},
        {"eos_token_id": list(range(3, 30))},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"suppress_tokens": list(range(3, 40))},
    ],
)
def test_processors_and_ends_act_as_in_plain_search(given):
    llm, decode = decoding()
    for ids in prompts(2, seed=5):
        plain, drafted = both(llm, decode, ids, **given)
        assert torch.equal(plain, drafted)


class AtLength(StoppingCriteria):
    """Stops at a length that it must be asked at, as criteria are that look at the last token alone."""

    def __init__(self, length):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] == self.length)


def test_stopping_criteria_are_asked_after_each_token():
    llm, decode = decoding()
    (ids,) = prompts(1)
    for length in range(ids.shape[1] + 1, ids.shape[1] + 5):
        one, other = AtLength(length), AtLength(length)
        plain = llm.generate(ids, max_new_tokens=16, do_sample=False, stopping_criteria=StoppingCriteriaList([one]))
        drafted = decode.generate(ids, max_new_tokens=16, do_sample=False, stopping_criteria=StoppingCriteriaList([other]))
        assert torch.equal(plain, drafted) and plain.shape[1] == length and one.asked == other.asked


class Kept(BaseStreamer):
    def __init__(self):
        self.put_, self.ended = [], 0

    def put(self, value):
        self.put_.append(value.reshape(-1).tolist())

    def end(self):
        self.ended += 1


def test_streamers_get_prompt_and_tokens_one_by_one():
    llm, decode = decoding()
    (ids,) = prompts(1)
    one, other = Kept(), Kept()
    llm.generate(ids, max_new_tokens=9, do_sample=False, streamer=one)
    decode.generate(ids, max_new_tokens=9, do_sample=False, streamer=other)
    assert one.put_ == other.put_ and other.ended == 1


def test_what_is_returned_beside_the_tokens_is_that_of_plain_search():
    llm, decode = decoding()
    (ids,) = prompts(1)
    given = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    plain, drafted = both(llm, decode, ids, **given)
    assert len(plain.scores) == len(drafted.scores) == len(drafted.logits) == plain.sequences.shape[1] - ids.shape[1]
    for a, b in zip((*plain.scores, *plain.logits), (*drafted.scores, *drafted.logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert drafted.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    more = torch.cat([plain.sequences, ids], dim=1)  # the cache serves further writing, plainly and by drafts
    on = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(more)}
    wanted = llm.generate(more, past_key_values=plain.past_key_values, **on)
    assert torch.equal(wanted, llm.generate(more, past_key_values=drafted.past_key_values, custom_generate=decode, **on))


@pytest.mark.parametrize("name", ["gpt2", "sliding", "bias"])
def test_other_families_are_written_as_plainly(name):
    llm = family(name)
    decode = DraftedDecoding(drafter(llm, epochs=3).drafter, ALWAYS)
    for ids in prompts(4, seed=9):
        plain, drafted = both(llm, decode, ids)
        assert torch.equal(plain, drafted)
    assert decode.counts.accepted[0] > 0


def test_the_model_is_as_before_after_writing():
    llm, decode = decoding()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.modules()]
    (ids,) = prompts(1)
    both(llm, decode, ids)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.modules()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beams": 2}, "not beams"),
        ({"use_cache": False}, "KV cache"),
        ({"cache_implementation": "static"}, "dynamic"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ],
)
def test_what_drafts_cannot_give_is_refused(given, said):
    llm, decode = decoding()
    with pytest.raises(ValueError, match=said):
        llm.generate(prompts(1)[0], custom_generate=decode, max_new_tokens=3, **given)


def test_a_drafter_writes_for_the_model_that_it_was_loaded_for_alone():
    _, decode = decoding()
    with pytest.raises(ValueError, match="load_drafter"):
        family("bias").generate(prompts(1)[0], custom_generate=decode, max_new_tokens=3)


@pytest.mark.parametrize("given", [{"most": -1}, {"enough": 1.5}, {"enough": -0.1}, {"ties": -1.0}])
def test_options_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        DraftingOptions(**given)


def test_padded_prompts_after_a_cache_are_written_as_plainly():
    llm, decode = decoding()
    ids = torch.cat([torch.nn.functional.pad(r[:, :3], (2, 0), value=PAD) for r in prompts(3)])
    mask = (torch.arange(5) >= 2).long().expand(3, -1)
    more, whole = torch.cat([ids, ids[:, 2:]], dim=1), torch.cat([mask, mask[:, 2:]], dim=1)
    found = []
    for way in ({}, {"custom_generate": decode}):
        with torch.no_grad():
            cache = llm(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).past_key_values
        given = {"attention_mask": whole, "past_key_values": cache, "max_new_tokens": 10, "do_sample": False}
        found.append(llm.generate(more, **given, **way))
    assert torch.equal(*found)


def test_scores_come_from_one_call_of_the_processors_for_each_token():
    _, decode = decoding(DraftingOptions(most=3, enough=0.0, ties=0.0))
    (ids,) = prompts(1)
    asked = []

    def note(input_ids, scores):
        asked.append(input_ids.shape[1])
        return scores

    found = decode.generate(
        ids, max_new_tokens=8, do_sample=False, logits_processor=[note], return_dict_in_generate=True, output_scores=True
    )
    assert asked == list(range(ids.shape[1], found.sequences.shape[1]))


def test_stop_strings_end_texts_where_they_end_plainly():
    llm, decode = decoding()
    letters = byte_tokenizer()
    (ids,) = prompts(1)
    plain = llm.generate(ids, max_new_tokens=12, do_sample=False)
    stop = letters.decode(plain[0, ids.shape[1] + 3 : ids.shape[1] + 5])
    given = {"max_new_tokens": 12, "do_sample": False, "stop_strings": [stop], "tokenizer": letters}
    assert torch.equal(llm.generate(ids, **given), decode.generate(ids, **given))
    with pytest.raises(ValueError, match="tokenizer="):
        decode.generate(ids, stop_strings=["a"])
