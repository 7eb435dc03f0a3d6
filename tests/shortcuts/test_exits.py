"""Early exit in `generate`: what is written, what runs, and what becomes of the keys and values of blocks that did not."""

import pytest
import torch
from families import DEPTH
from peft import LoraConfig, get_peft_model
from support_exits import (
    ALWAYS,
    KV,
    NEVER,
    WRITING,
    build,
    differences,
    layer_states,
    middling,
    options,
    prompts,
    replayed,
    some_shortcuts,
)
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from fusion_adapters.shortcuts import FUSED, IDENTITY, EarlyExit, Readout


@pytest.mark.parametrize("kv", KV)
def test_nothing_is_lost_where_the_shortcut_is_exact(kv):
    """Blocks that add nothing: the identity is right wherever a pass ends, and the text is the plain model's."""
    model = build("llama")
    for block in model.model.layers[1:]:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
    batch = prompts("llama", "left")
    plain = model.generate(**batch, **WRITING)
    for threshold in (ALWAYS, middling(model, batch)):
        chosen = options(threshold, kind=IDENTITY, kv=kv, layers=[1, 2])
        exits = EarlyExit(model, some_shortcuts(), chosen).generate(**batch, **WRITING)
        assert exits.saved > 0
        assert torch.equal(exits.sequences, plain.sequences)
        assert torch.allclose(torch.stack(exits.output.logits), torch.stack(plain.logits), atol=1e-5)
        assert max(differences(exits.output.past_key_values, plain.past_key_values)) < 1e-5


@pytest.mark.parametrize("kv", KV)
def test_skipped_blocks_do_not_run(kv):
    model, batch, calls = build("llama"), prompts("llama"), [0] * DEPTH
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    given = {**WRITING, "return_dict_in_generate": False, "output_logits": False}
    exits = EarlyExit(model, some_shortcuts(), options(ALWAYS, layers=[2], kv=kv))
    calls[:] = [0] * DEPTH
    exits.generate(**batch, **given)
    assert calls == [14, 14, 1, 1]  # the prompt's pass is whole


def test_what_waits_runs_in_one_call():
    """Each segment runs once a step at most, whatever the number of tokens that wait, and once for each token overall."""
    model, batch = build("llama"), prompts("llama", rows=1)
    seen = [[] for _ in range(DEPTH)]
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda m, a, out, i=i: seen[i].append(out.shape[1]))
    exits = EarlyExit(model, some_shortcuts(), options(middling(model, batch), layers=[1, 2, 3]))
    for counts in seen:
        counts.clear()
    written = exits.generate(**batch, **WRITING)
    prompt, total = batch["input_ids"].shape[1], written.sequences.shape[1] - 1
    assert all(counts[0] == prompt and sum(counts) == total for counts in seen)
    assert max(seen[3]) > 1 or max(seen[2]) > 1
    steps = [sum(layer > i for layer in written.layers.tolist()) for i in range(DEPTH)]
    settled = [len(counts) - 1 - n for counts, n in zip(seen, steps, strict=True)]
    assert set(settled) <= {0, 1}  # at the end, for the cache that is returned
    assert written.passes.tolist() == written.layers.tolist()


@pytest.mark.parametrize("kv", KV)
def test_fused_shortcuts_read_the_lower_layers(kv):
    model, shortcuts, batch = build("qwen2"), some_shortcuts(), prompts("qwen2")
    chosen = options(ALWAYS, layers=[2], kind=FUSED, kv=kv)
    exits = EarlyExit(model, shortcuts, chosen).generate(**batch, **WRITING)
    states = layer_states(model, {"input_ids": exits.sequences}, [0, 1, 2])
    with torch.no_grad():
        wanted = Readout(model)(shortcuts.get(2, kind=FUSED)(states))[:, batch["input_ids"].shape[1] : -1]
    assert torch.allclose(torch.stack(exits.output.logits, 1)[:, 1:], wanted, atol=1e-5)


def test_fused_shortcuts_of_tokens_that_waited():
    model, batch = build("llama"), prompts("llama", rows=1)
    chosen = options(middling(model, batch, 0.7, FUSED), layers=[1, 3], kind=FUSED)
    exits = EarlyExit(model, shortcuts := some_shortcuts(), chosen).generate(**batch, **WRITING)
    states = layer_states(model, {"input_ids": exits.sequences}, [0, 1, 2, 3, 4])
    prompt, readout = batch["input_ids"].shape[1], Readout(model)
    assert {3} < set(exits.layers.tolist())
    for i, layer in enumerate(exits.layers.tolist()):
        at = {n: s[:, prompt + i] for n, s in states.items()}
        wanted = readout(at[4] if layer == 4 else shortcuts.get(layer, kind=FUSED)(at))
        assert torch.allclose(exits.output.logits[i + 1], wanted, atol=1e-5)


def test_the_threshold_falls_along_the_text():
    """At a fixed margin, positions leave from the one on where the paper's formula says so."""
    model, batch = build("llama"), prompts("llama", rows=1)
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens are equally likely: the margin is 0 everywhere
    first = batch["input_ids"].shape[1]
    for leaves_from in (first, first + 3, first + 9):
        # 0.9 lambda + 0.1 exp(-4 t / N) falls below 0 between two places
        lam = -float(torch.exp(torch.tensor(-4 * (leaves_from - 0.5) / 20))) / 9
        exits = EarlyExit(model, some_shortcuts(), options(lam, mean_length=20.0)).generate(**batch, **WRITING)
        assert exits.layers.tolist() == [DEPTH] * (leaves_from - first) + [1] * (13 - leaves_from + first)


def test_padding_is_no_part_of_the_place():
    model, batch = build("llama"), prompts("llama", "left")
    torch.nn.init.zeros_(model.lm_head.weight)
    short = int(batch["attention_mask"][1].sum())
    lam = -float(torch.exp(torch.tensor(-4 * (short + 4.5) / 20))) / 9  # passed from the shorter row's place short + 5 on
    exits = EarlyExit(model, some_shortcuts(), options(lam, mean_length=20.0)).generate(**batch, **WRITING)
    assert exits.layers.tolist() == [DEPTH] * 5 + [1] * 8  # the row that is behind decides


def test_the_rows_that_still_write_decide():
    """A batch leaves where all rows would leave alone; one that has ended has no say."""
    model, shortcuts = build("llama"), some_shortcuts()
    batch = prompts("llama", rows=2, seed=5)
    chosen = options(middling(model, batch), layers=[2])
    exits = EarlyExit(model, shortcuts, chosen)
    together = exits.generate(**batch, **WRITING)
    states = layer_states(model, {"input_ids": together.sequences}, [2])
    prompt = batch["input_ids"].shape[1]
    with torch.no_grad():
        two = Readout(model)(shortcuts.get(2)(states))[:, prompt:-1].softmax(-1).topk(2).values
    sure = (two[..., 0] - two[..., 1]) > 0.9 * chosen.threshold  # (B, steps), the rest of the threshold is next to nothing
    assert sure.any() and not sure.all() and (sure[0] != sure[1]).any()
    assert ((together.layers == 2) == sure.all(0)).all()
    ends = int(together.sequences[0, prompt + 1])  # the first row ends with its second token
    given = {**WRITING, "min_new_tokens": None, "eos_token_id": ends, "pad_token_id": 0}
    ended = exits.generate(**batch, **given)
    steps = ended.layers.shape[0]
    assert (ended.sequences[0, prompt + 2 :] == 0).all() and steps > 3
    states = layer_states(model, {"input_ids": ended.sequences[1:]}, [2])
    with torch.no_grad():
        two = Readout(model)(shortcuts.get(2)(states))[0, prompt:-1].softmax(-1).topk(2).values
    alone = (two[..., 0] - two[..., 1]) > 0.9 * chosen.threshold
    assert ((ended.layers == 2) == alone)[1:].all()
    assert alone[1:].any() and not alone[1:].all()


def test_sampling_draws_from_the_same_distribution():
    model, batch = build("llama"), prompts("llama", "left")
    given = {**WRITING, "do_sample": True, "temperature": 0.8, "top_k": 20}
    never = EarlyExit(model, some_shortcuts(), options(NEVER))
    torch.manual_seed(1)
    plain = model.generate(**batch, **given)
    torch.manual_seed(1)
    assert torch.equal(never.generate(**batch, **given).sequences, plain.sequences)
    some = EarlyExit(model, some_shortcuts(), options(middling(model, batch))).generate(**batch, **given)
    assert 0 < some.saved < 0.75


def test_a_short_list_leaves_only_where_the_whole_head_would():
    model, shortcuts, batch = build("llama"), some_shortcuts(), prompts("llama", rows=1)
    lam = middling(model, batch)
    whole = EarlyExit(model, shortcuts, options(lam)).generate(**batch, **WRITING)
    everything = EarlyExit(model, shortcuts, options(lam, short_list=range(120))).generate(**batch, **WRITING)
    assert torch.equal(everything.sequences, whole.sequences) and torch.equal(everything.layers, whole.layers)
    # a list without any of the tokens that leave: its margins may pass, the whole head's do not
    strange = sorted(set(range(3, 120)) - set(whole.sequences.flatten().tolist()))
    exits = EarlyExit(model, shortcuts, options(lam, short_list=strange)).generate(**batch, **WRITING)
    prompt = batch["input_ids"].shape[1]
    logits = torch.stack(exits.output.logits[1:])[:, 0]
    two = logits.softmax(-1).topk(2).values
    logits[:, 2] = -torch.inf  # the end, which min_new_tokens forbids
    left = exits.layers < DEPTH
    assert (two[left, 0] - two[left, 1] > 0.9 * lam - 1e-6).all()
    assert torch.equal(logits.argmax(-1), exits.sequences[0, prompt + 1 :])


def test_a_cache_that_goes_on():
    """The next turn of a conversation: the cache that was returned, or was given, holds all that was read."""
    model, batch = build("llama"), prompts("llama", rows=1)
    exits = EarlyExit(model, some_shortcuts(), options(ALWAYS))
    cache = DynamicCache(config=model.config)
    first = exits.generate(
        **batch, **{**WRITING, "return_dict_in_generate": False, "output_logits": False}, past_key_values=cache
    )
    _, wanted = replayed(model, batch, first.sequences)
    assert max(differences(cache, wanted)) < 1e-5
    ids = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], 1)
    mask = torch.ones_like(ids)
    plain = model.generate(input_ids=ids, attention_mask=mask, **WRITING)
    again = EarlyExit(model, some_shortcuts(), options(NEVER))
    found = again.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **WRITING)
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.allclose(torch.stack(found.output.logits), torch.stack(plain.logits), atol=1e-5)


@pytest.mark.parametrize("given", [{"prefill_chunk_size": 2}, {"prefill_chunk_size": 4}, {}])
def test_the_prompt_runs_whole(given):
    """Also in parts, the last of which may be one token, and if it is but one token."""
    model, batch = build("llama"), prompts("llama", rows=1)
    for length in (9, 1):
        short = {name: value[:, :length] for name, value in batch.items()}
        plain = model.generate(**short, **WRITING)
        exits = EarlyExit(model, some_shortcuts(), options(ALWAYS)).generate(**short, **WRITING, **given)
        assert torch.allclose(exits.output.logits[0], plain.logits[0], atol=1e-5)
        assert exits.layers.tolist() == [1] * 13


def test_a_streamer_hears_each_token():
    class Heard(BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, batch, heard = build("llama"), prompts("llama", rows=1), Heard()
    exits = EarlyExit(model, some_shortcuts(), options(ALWAYS)).generate(**batch, **WRITING, streamer=heard)
    assert heard.tokens == exits.sequences[0].tolist() and heard.ended


def test_lora_takes_part():
    model = build("llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    batch = prompts("llama", "left")
    plain = adapted.generate(**batch, **WRITING)
    exits = EarlyExit(adapted, some_shortcuts(), options(NEVER)).generate(**batch, **WRITING)
    assert torch.equal(torch.stack(exits.output.logits), torch.stack(plain.logits))
    some = EarlyExit(adapted, some_shortcuts(), options(middling(adapted, batch))).generate(**batch, **WRITING)
    _, cache = replayed(adapted, batch, some.sequences)
    assert some.saved > 0 and max(differences(some.output.past_key_values, cache)) < 1e-5


def test_the_model_is_left_as_it_was():
    model, batch = build("llama"), prompts("llama")
    before = model(**batch).logits
    model.train()
    exits = EarlyExit(model, some_shortcuts(), options(ALWAYS))

    def fails(input_ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exits.generate(**batch, **WRITING, logits_processor=[fails])
    exits.generate(**batch, **WRITING)
    assert model.training and not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(model.eval()(**batch).logits, before)


# what is refused


def test_a_prompt_of_embeddings():
    model, batch = build("llama"), prompts("llama", rows=1)
    embeddings = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }
    plain = model.generate(**embeddings, **WRITING)
    assert torch.equal(
        EarlyExit(model, some_shortcuts(), options(NEVER)).generate(**embeddings, **WRITING).sequences, plain.sequences
    )
    chosen = options(middling(model, batch))
    found, wanted = (
        EarlyExit(model, some_shortcuts(), chosen).generate(**given, **WRITING) for given in (embeddings, batch)
    )
    assert torch.equal(found.sequences, wanted.sequences[:, batch["input_ids"].shape[1] :])
    assert torch.equal(found.layers, wanted.layers) and found.saved > 0


def test_queries_of_skipped_blocks_are_not_computed():
    model, batch, seen = build("llama"), prompts("llama", rows=1), []
    own = torch.nn.functional.linear
    weights = {id(b.self_attn.q_proj.weight): i for i, b in enumerate(model.model.layers)}
    keys = {id(b.self_attn.k_proj.weight): i for i, b in enumerate(model.model.layers)}

    def linear(x, weight, bias=None):
        seen.append((id(weight) in weights, weights.get(id(weight), keys.get(id(weight)))))
        return own(x, weight, bias)

    exits = EarlyExit(model, some_shortcuts(), options(ALWAYS, kv="cast"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        exits.generate(**batch, **WRITING)
    queries = [sum(found == (True, i) for found in seen) for i in range(DEPTH)]
    assert queries == [14, 1, 1, 1] and [sum(found == (False, i) for found in seen) for i in range(DEPTH)] == [14] * DEPTH
