"""Early exit in `generate`, family by family: plain where nothing exits, exact history, keys and values from cast states."""

from itertools import pairwise

import pytest
import torch
import transformers
from families import DEPTH
from support_exits import (
    ALIKE,
    ALWAYS,
    CAUSAL,
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

import fusion_adapters
from fusion_adapters.shortcuts import EarlyExit, Readout

BOTH = [*((family, "later") for family in CAUSAL), *((family, "cast") for family in (*ALIKE, "qwen3", "phi3"))]
COMMON = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
FURTHER = {  # biases by distance, keys and values from latent vectors, attention in chunks, parallel blocks, half a head rotated
    "Bloom": {"vocab_size": 120, "hidden_size": 32, "n_layer": 4, "n_head": 4, "pad_token_id": 0},
    "DeepseekV3": {**COMMON, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 4},
    "Llama4": {
        **COMMON,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 64,
    },
    "GPTJ": {"vocab_size": 120, "n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4},
}


@pytest.mark.parametrize(("family", "kv"), BOTH)
def test_a_threshold_that_never_passes_gives_the_plain_model_to_the_bit(family, kv):
    model = build(family)
    batch = prompts(family, "left")
    plain = model.generate(**batch, **WRITING)
    exits = EarlyExit(model, some_shortcuts(), options(NEVER, kv=kv)).generate(**batch, **WRITING)
    assert torch.equal(exits.sequences, plain.sequences)
    assert torch.equal(torch.stack(exits.output.logits), torch.stack(plain.logits))
    assert max(differences(exits.output.past_key_values, plain.past_key_values)) == 0
    assert exits.layers.tolist() == exits.passes.tolist() == [DEPTH] * 13
    assert exits.saved == exits.passes_saved == 0


@pytest.mark.parametrize(("family", "kv"), BOTH)
def test_one_that_always_passes_gives_the_head_of_the_cast_first_exit(family, kv):
    model, shortcuts, batch = build(family), some_shortcuts(), prompts(family, rows=2)
    exits = EarlyExit(model, shortcuts, options(ALWAYS, kv=kv)).generate(**batch, **WRITING)
    states = layer_states(model, {"input_ids": exits.sequences}, [1])
    with torch.no_grad():
        wanted = Readout(model)(shortcuts.get(1)(states))[:, batch["input_ids"].shape[1] : -1]
    found = torch.stack(exits.output.logits, 1)[:, 1:]  # the first comes from the prompt's pass, which is whole
    assert torch.allclose(found, wanted, atol=1e-5)
    assert exits.layers.tolist() == exits.passes.tolist() == [1] * 13
    assert exits.saved == pytest.approx(1 - 1 / DEPTH)


@pytest.mark.parametrize(
    ("family", "padding"), [*((f, "left") for f in CAUSAL), *((f, None) for f in ALIKE), *((f, "right") for f in ALIKE)]
)
def test_what_was_skipped_is_made_up_for_exactly(family, padding):
    """A token that goes all the way sees the history that the plain model would have made of the same tokens."""
    model, batch = build(family), prompts(family, padding)
    exits = EarlyExit(model, some_shortcuts(), options(middling(model, batch), layers=[1, 2, 3])).generate(
        **batch, **WRITING
    )
    logits, cache = replayed(model, batch, exits.sequences)
    whole = torch.tensor([True, *(exits.layers == DEPTH)])
    assert torch.allclose(torch.stack(exits.output.logits, 1)[:, whole], logits[:, whole], atol=1e-5)
    assert max(differences(exits.output.past_key_values, cache)) < 1e-5


@pytest.mark.parametrize("family", ALIKE)
def test_tokens_that_wait_at_several_exits(family):
    """A longer text, with all that can follow one another: from each exit on to each other, and to the end."""
    model, batch = build(family), prompts(family, rows=1)
    given = {**WRITING, "do_sample": True, "max_new_tokens": 48, "min_new_tokens": 48}
    exits = EarlyExit(model, some_shortcuts(), options(middling(model, batch, 0.65), layers=[1, 2, 3]))
    torch.manual_seed(1)
    written = exits.generate(**batch, **given)
    layers = written.layers.tolist()
    assert set(layers) == {1, 2, 3, 4} and {(1, 1), (1, 4)} < set(pairwise(layers))
    logits, cache = replayed(model, batch, written.sequences)
    whole = torch.tensor([True, *(written.layers == DEPTH)])
    assert torch.allclose(torch.stack(written.output.logits, 1)[:, whole], logits[:, whole], atol=1e-5)
    assert max(differences(written.output.past_key_values, cache)) < 1e-5


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma2", "qwen3"))
def test_keys_and_values_from_cast_states(family):
    """Those that each skipped block would make of the cast state, and exact ones where the block ran."""
    model, shortcuts, batch = build(family), some_shortcuts(), prompts(family)
    exits = EarlyExit(model, shortcuts, options(ALWAYS, layers=[2], kv="cast")).generate(**batch, **WRITING)
    _, plain = replayed(model, batch, exits.sequences)
    errors = differences(exits.output.past_key_values, plain)
    assert max(errors[:2]) < 1e-5 < min(errors[3:])
    # block 2 reads the exit's own state, block 3 what is cast to it
    prompt, written = batch["input_ids"].shape[1], exits.sequences[:, :-1]
    states = layer_states(model, {"input_ids": written}, [2])
    given = {2: states[2], 3: shortcuts.get(2, 3)(states)}
    for layer, state in given.items():
        cache = DynamicCache(config=model.config)

        def put(block, args, kwargs, state=state):
            return ((state, *args[1:]), kwargs)

        handle = Readout(model).backbone.blocks[layer].register_forward_pre_hook(put, with_kwargs=True)
        with torch.no_grad():
            model(input_ids=written, past_key_values=cache)
        handle.remove()
        found, wanted = exits.output.past_key_values.layers[layer], cache.layers[layer]
        count = min(written.shape[1] - prompt, found.keys.shape[2])
        assert torch.allclose(found.keys[:, :, -count:], wanted.keys[:, :, -count:], atol=1e-5)
        assert torch.allclose(found.values[:, :, -count:], wanted.values[:, :, -count:], atol=1e-5)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("bits", [16, 8])
def test_backbones_of_few_bits(bits, kv, tmp_path):
    model = build("llama")
    if bits == 8:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, quantization_config=fusion_adapters.quantization_config(bits=8))
    model = model.bfloat16() if bits == 16 else model
    batch = prompts("llama", "left")
    plain = model.generate(**batch, **WRITING)
    shortcuts = some_shortcuts()
    exits = EarlyExit(model, shortcuts, options(NEVER, kv=kv)).generate(**batch, **WRITING)
    assert torch.equal(torch.stack(exits.output.logits), torch.stack(plain.logits))
    exits = EarlyExit(model, shortcuts, options(middling(model, batch), kv=kv)).generate(**batch, **WRITING)
    assert exits.saved > 0 and exits.sequences.shape == plain.sequences.shape


@pytest.mark.parametrize("family", FURTHER)
def test_other_kinds_of_attention(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}TextConfig" if family == "Llama4" else f"{family}Config")(**FURTHER[family])
    model, batch = getattr(transformers, f"{family}ForCausalLM")(config).eval(), prompts("llama", "left")
    exits = EarlyExit(model, some_shortcuts(), options(middling(model, batch, 0.6), layers=[1, 2, 3])).generate(
        **batch, **WRITING
    )
    logits, cache = replayed(model, batch, exits.sequences)
    whole = torch.tensor([True, *(exits.layers == DEPTH)])
    assert exits.saved > 0
    assert torch.allclose(torch.stack(exits.output.logits, 1)[:, whole], logits[:, whole], atol=1e-5)
    assert max(differences(exits.output.past_key_values, cache)) < 1e-5
    cast = EarlyExit(model, some_shortcuts(), options(ALWAYS, layers=[2], kv="cast")).generate(**batch, **WRITING)
    _, cache = replayed(model, batch, cast.sequences)
    errors = differences(cast.output.past_key_values, cache)
    assert max(errors[:2]) < 1e-5 < min(errors[3:])
