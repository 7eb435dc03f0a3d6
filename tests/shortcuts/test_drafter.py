"""The drafter itself: what it computes, its training, its files."""

from __future__ import annotations

import json

import pytest
import torch
from support_drafts import VOCABULARY, collator, drafter, family, model, shared, written
from transformers import BertConfig, BertForMaskedLM, Gemma2Config, Gemma2ForCausalLM

from fusion_adapters.shortcuts import (
    DraftedDecoding,
    DrafterOptions,
    DraftingOptions,
    RowStates,
    load_drafter,
    save_drafter,
    train_drafter,
)
from fusion_adapters.shortcuts.drafting import training
from fusion_adapters.shortcuts.drafting.drafter import DraftCache
from fusion_adapters.states import StaleCacheError, cache_layer_states


def states_of(llm, ids):
    """Layer states by number; those of the last layer before the final norm."""
    found = {}
    blocks = llm.model.layers
    handles = [
        b.register_forward_hook(lambda m, a, out, i=i: found.__setitem__(i + 1, out if torch.is_tensor(out) else out[0]))
        for i, b in enumerate(blocks)
    ]
    llm(ids)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_positions_read_in_pieces_and_taken_back_are_as_read_at_once():
    llm, drafts = shared()
    ids = torch.tensor([row["input_ids"] for row in written(llm, count=2, length=12)])
    states = states_of(llm, ids)
    given, following = [states[i][:, :-1] for i in drafts.layers], ids[:, 1:]
    whole = drafts.begin(given, following, DraftCache())
    cache, pieces = DraftCache(), []
    for start, end in ((0, 4), (4, 5), (5, 11)):
        own = drafts.begin([z[:, start:end] for z in given], following[:, start:end], cache)
        pieces.append(own)
        for _ in range(2):  # drafts that come to nothing
            own = drafts.go_on(own[:, -1:], following[:, :1], cache)
        cache.crop(end)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing():
    llm, drafts = shared()
    ids = torch.tensor([row["input_ids"] for row in written(llm, count=2, length=12)])
    states = states_of(llm, ids)
    given, following = [states[i][:, :-1] for i in drafts.layers], ids[:, 1:]
    whole = drafts.begin(given, following, DraftCache())
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[:, :3] = False
    padded = [torch.nn.functional.pad(z, (0, 0, 3, 0), value=7.0) for z in given]
    found = drafts.begin(padded, torch.nn.functional.pad(following, (3, 0)), DraftCache(mask))[:, 3:]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_training_steps_see_what_drafting_sees():
    """The losses of three unrolled steps, against drafts from each position one by one."""
    llm, drafts = shared()
    row = written(llm, count=1, length=10)[0]
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        states = states_of(llm, ids)
        options = DrafterOptions(layers=[1, 2, 3], steps=3)
        batch = training.Batch([states[i] for i in drafts.layers], ids, states[3], torch.ones_like(ids, dtype=torch.bool))
        losses = training.losses_of(drafts, batch, options)
        wanted = drafts.logits(states[3]).softmax(-1)[0]  # (T, V')
        found = torch.zeros(3)
        origins = ids.shape[1] - 3
        cache = DraftCache()
        for t in range(origins):
            own = drafts.begin([states[i][:, t : t + 1] for i in drafts.layers], ids[:, t + 1 : t + 2], cache)
            for step in range(3):
                found[step] -= (wanted[t + step + 1] * drafts.logits(own)[0, -1].log_softmax(-1)).sum() / origins
                if step < 2:
                    own = drafts.go_on(own, ids[:, t + step + 2 : t + step + 3], cache)
            cache.crop(t + 1)
    torch.testing.assert_close(losses, found, rtol=1e-4, atol=1e-4)


def held(llm, rows):
    return RowStates(llm, rows, collator, range(4), progress=False)


def test_training_learns_what_the_backbone_says():
    llm = model()
    rows = written(llm)
    found = drafter(llm, rows, epochs=8)
    assert found.losses[-1][0] < found.losses[0][0] - 0.2
    assert found.tokens_seen == 8 * 64 * 24
    assert not any(p.requires_grad for p in found.drafter.block.parameters())
    # the most frequent token alone is right less often
    ids = torch.tensor([row["input_ids"] for row in written(llm, count=32, seed=8)])
    with torch.no_grad():
        states, following = states_of(llm, ids), ids[:, 1:]
        own = found.drafter.begin([states[i][:, :-1] for i in found.drafter.layers], following, DraftCache())
        said = found.drafter.named(found.drafter.logits(own).argmax(-1))
        own_tokens = llm(ids).logits[:, 1:].argmax(-1)
    right = (said == own_tokens).float().mean()
    assert right > 1.5 * torch.bincount(own_tokens.flatten()).max() / own_tokens.numel()


def test_states_on_disk_train_the_same_drafter(tmp_path):
    llm = model()
    rows = written(llm, count=16)
    cache = cache_layer_states(llm, rows, tmp_path, collator, layers=[1, 2, 3], progress=False)
    options = DrafterOptions(layers=[1, 2, 3], tokens=30, epochs=1)
    one = train_drafter(llm, rows, cache, options, progress=False).drafter.block.state_dict()
    other = train_drafter(llm, rows, held(llm, rows), options, progress=False).drafter.block.state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-3)


def test_rows_too_short_to_train_on_are_left_out_and_the_others_keep_their_states():
    llm = model()
    rows = written(llm, count=16)
    mixed = [row for long in rows for row in ({"input_ids": long["input_ids"][:2]}, long)]
    options = DrafterOptions(layers=[1, 2, 3], tokens=None, epochs=1)  # a list would count the short rows' tokens, too

    def padded(some):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in some], batch_first=True)

    states = RowStates(llm, mixed, lambda some: {"input_ids": padded(some)}, range(4), progress=False)
    one = train_drafter(llm, mixed, states, options, progress=False)
    other = train_drafter(llm, rows, held(llm, rows), options, progress=False)
    assert one.tokens_seen == other.tokens_seen
    kept = states.read(states.find(rows), range(4))  # (4, tokens, d)
    torch.testing.assert_close(kept, held(llm, rows).read(range(len(rows)), range(4)))
    torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="16 of 16 rows"):
        train_drafter(llm, written(llm, count=16, seed=9), held(llm, rows), options, progress=False)


def test_without_passes_the_closed_form_weights_are_had():
    llm = model()
    rows = written(llm, count=32)
    found = train_drafter(llm, rows, held(llm, rows), DrafterOptions(layers=[1, 2, 3], epochs=0), progress=False)
    assert found.losses == [] and found.tokens_seen == 0
    assert not found.drafter.block.mixed.weight.any() and found.drafter.block.states_in.weight.std() > 0.01


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    llm = model()
    rows = written(llm, count=32)
    options = DrafterOptions(layers=[1, 2, 3], tokens=30, epochs=2)
    states = held(llm, rows)
    whole = train_drafter(llm, rows, states, options, progress=False)
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    real, steps = training.losses_of, []

    def dies(*given):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(training, "losses_of", dies)
    with pytest.raises(KeyboardInterrupt):
        train_drafter(llm, rows, states, options, folder=tmp_path, progress=False)
    with pytest.raises(StaleCacheError, match="another training"):
        train_drafter(llm, rows, states, DrafterOptions(layers=[1, 3], epochs=2), folder=tmp_path, progress=False)
    monkeypatch.setattr(training, "losses_of", real)
    again = train_drafter(llm, rows, states, options, folder=tmp_path, progress=False)
    assert again.losses == whole.losses
    for a, b in zip(again.drafter.block.parameters(), whole.drafter.block.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_saved_drafter_comes_back_and_drafts_the_same(tmp_path):
    llm, drafts = shared()
    save_drafter(drafts, tmp_path, {"tokens_seen": 5}, dtype=torch.float32)
    again = load_drafter(tmp_path, llm)
    for a, b in zip(again.block.parameters(), drafts.block.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(again.tokens, drafts.tokens) and again.layers == (1, 2, 3)
    ids = torch.tensor([[5, 6, 7]])
    one, other = DraftedDecoding(drafts), DraftedDecoding(again)
    assert torch.equal(
        llm.generate(ids, max_new_tokens=9, custom_generate=one), llm.generate(ids, max_new_tokens=9, custom_generate=other)
    )
    assert one.counts == other.counts


def test_files_are_in_16_bits_unless_told_otherwise(tmp_path):
    llm, drafts = shared()
    save_drafter(drafts, tmp_path)
    count = sum(p.numel() for p in drafts.block.parameters())
    assert (tmp_path / "drafter.safetensors").stat().st_size < 2 * count + 8 * VOCABULARY + 3000
    assert load_drafter(tmp_path, llm).block.down.weight.dtype == torch.float32


def test_another_backbone_is_refused(tmp_path):
    _, drafts = shared()
    save_drafter(drafts, tmp_path)
    with pytest.raises(ValueError, match="trained on a backbone"):
        load_drafter(tmp_path, model(seed=1))
    with pytest.raises(ValueError, match="num_layers=3"):
        load_drafter(tmp_path, model(num_hidden_layers=4))


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    llm, drafts = shared()
    with pytest.raises(FileNotFoundError, match="holds no drafter"):
        load_drafter(tmp_path, llm)
    save_drafter(drafts, tmp_path)
    said = json.loads((tmp_path / "drafter.json").read_text())
    (tmp_path / "drafter.json").write_text(json.dumps({**said, "format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        load_drafter(tmp_path, llm)
    (tmp_path / "drafter.json").write_text(json.dumps({**said, "shape": {**said["shape"], "inner": 8}}))
    with pytest.raises(ValueError, match="does not hold what"):
        load_drafter(tmp_path, llm)
    (tmp_path / "drafter.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_drafter(tmp_path, llm)
    (tmp_path / "drafter.json").write_text(json.dumps(said))
    weights = tmp_path / "drafter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ValueError, match="damaged, or was replaced"):
        load_drafter(tmp_path, llm)


def test_a_head_that_is_not_linear_is_drafted_over_the_whole_vocabulary():
    torch.manual_seed(0)
    config = Gemma2Config(
        **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"intermediate_size": 64, "vocab_size": VOCABULARY, "initializer_range": 0.3, "final_logit_softcapping": 3.0},
        **{"sliding_window": 64, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1},
    )
    llm = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    rows = written(llm, count=16, length=12)
    with pytest.raises(ValueError, match="not a linear layer"):
        drafter(llm, rows, epochs=1)
    decode = DraftedDecoding(drafter(llm, rows, epochs=1, tokens=None).drafter, DraftingOptions(enough=0.0, most=2))
    ids = torch.tensor([[5, 6, 7]])
    given = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(llm.generate(ids, **given), llm.generate(ids, custom_generate=decode, **given))


def test_what_cannot_be_trained_is_refused():
    llm = model()
    rows = written(llm, count=8, length=6)
    states = held(llm, rows)
    with pytest.raises(ValueError, match=r"layers=\[1, 9\]"):
        train_drafter(llm, rows, states, DrafterOptions(layers=[1, 9]), progress=False)
    lacking = RowStates(llm, rows, collator, [1, 2], progress=False)
    with pytest.raises(ValueError, match=r"do not hold the layers \[3\]"):
        train_drafter(llm, rows, lacking, DrafterOptions(layers=[1, 2]), progress=False)
    with pytest.raises(ValueError, match="more than 9 tokens"):
        train_drafter(llm, rows, states, DrafterOptions(layers=[1, 3], steps=8), progress=False)
    bert = BertForMaskedLM(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ValueError, match="sees the text on both sides"):
        train_drafter(bert.eval(), rows, held_of_two(), DrafterOptions(layers=[1, 2]), progress=False)


def held_of_two():
    found = object.__new__(RowStates)
    found.layers = [1, 2]
    return found


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"epochs": -1}, {"learning_rate": -1}, {"temperature": 0}, {"batch_size": 0}]
)
def test_options_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        DrafterOptions(**given)


def test_a_model_with_another_families_blocks_has_the_default_layers():
    assert DrafterOptions().layers_of(30) == (6, 18, 30)
    assert DrafterOptions().layers_of(3) == (0, 1, 3)
    llm = family("gpt2")
    rows = written(llm, count=16, length=8)
    found = train_drafter(llm, rows, held(llm, rows), DrafterOptions(tokens=20, epochs=1), progress=False)
    assert found.drafter.layers == (0, 1, 3) and len(found.drafter.tokens) == 20
