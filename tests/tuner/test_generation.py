"""Generation with an attached fusion: sampling, padding, static caches, assistants; what a fusion over positions refuses."""

import warnings

import pytest
import torch
from families import FAMILIES, attach, inputs
from support import disturb, layer_of
from transformers import LlamaModel, Qwen3Model

DECODERS = ("gpt2", "opt", "gpt-neox", "llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "mamba")
STACKS = ("t5", "t5-both", "bart")
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}


def prompt(family, rows=slice(None), padding="left"):
    head = next(iter(FAMILIES[family].classes))
    return {k: v[rows] for k, v in inputs(family, head, padding=padding).items() if k != "labels"}


def make(family, **fields):
    return disturb(attach(family, **fields), scale=0.3).eval()


@pytest.mark.parametrize("family", DECODERS + STACKS)
def test_sampling_agrees_with_and_without_cache(family):
    model = make(family)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        runs.append(model.generate(**prompt(family), **{**OPTIONS, "do_sample": True}, use_cache=use_cache))
    assert torch.equal(*runs)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_changes_nothing(family, use_cache):
    model = make(family)
    batch = prompt(family)
    together = model.generate(**batch, **OPTIONS, use_cache=use_cache)[1]
    short = {k: v[1:, 2:] for k, v in batch.items()}
    alone = model.generate(**short, **OPTIONS, use_cache=use_cache)[0]
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral", "t5", "bart"])
def test_a_static_cache_gives_the_same(family):
    model = make(family)
    plain = model.generate(**prompt(family), **OPTIONS)
    assert torch.equal(model.generate(**prompt(family), **OPTIONS, cache_implementation="static"), plain)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("assistant", ["plain", "attached", "itself"])
def test_an_assistant_changes_nothing(family, assistant):
    model = make(family)
    one = prompt(family, slice(0, 1))
    helper = {"plain": FAMILIES[family].build("causal"), "attached": make(family, fusion="concat"), "itself": model}[
        assistant
    ]
    helper.generation_config.pad_token_id = 0
    assert torch.equal(model.generate(**one, **OPTIONS, assistant_model=helper), model.generate(**one, **OPTIONS))


@pytest.fixture
def exits(monkeypatch):
    """The numbers of blocks that calls of the Llama and Qwen backbones run, in the order of the calls."""
    seen = []
    for kind in (LlamaModel, Qwen3Model):
        run = kind.forward

        def counted(self, *args, run=run, **kwargs):
            seen.append(self.config.num_hidden_layers)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "fields", [{}, {"fusion_layers": [0, -1]}, {"fusion": "concat", "lora": True}], ids=["all", "some", "lora"]
)
def test_early_exit_drafts_change_nothing(family, fields, exits):
    model = make(family, **fields)
    layer, one = layer_of(model), prompt(family, slice(0, 1))
    expected = model.generate(**one, **OPTIONS)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    exits.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = model.generate(**one, **OPTIONS, assistant_early_exit=1)
    assert torch.equal(found, expected)
    assert exits.count(1) >= 2, "nothing was drafted"
    assert len(calls) == len(exits) - exits.count(1), "drafts are unfused, all else is fused"
    assert torch.equal(model.generate(**one, **OPTIONS), expected)
    assert layer.taps.open_calls == layer.taps.held == 0


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_draft_that_fails_leaves_the_model_as_it_was(wrapped):
    model = make("llama")
    layer, one = layer_of(model), prompt("llama", slice(0, 1))
    expected = model.generate(**one, **OPTIONS)
    depth = model.config.num_hidden_layers

    def fail(*_):
        raise RuntimeError("out of something")

    handle = layer.backbone.blocks[0].register_forward_pre_hook(fail)
    inner = model if wrapped else model.get_base_model()
    with pytest.raises(RuntimeError, match="out of something"):
        inner.generate(**one, **OPTIONS, assistant_early_exit=1)
    handle.remove()
    assert layer.taps.open_calls == 0
    if wrapped:
        assert model.config.num_hidden_layers == depth
    else:  # transformers' own way in: nothing of ours is around the generation
        with pytest.warns(UserWarning, match=f"set model.config.num_hidden_layers = {depth}"):
            model.generate(**one, **OPTIONS)
        model.config.num_hidden_layers = depth
    assert torch.equal(model.generate(**one, **OPTIONS), expected)


def test_early_exit_works_on_the_model_of_transformers_and_says_what_it_leaves_out():
    model = make("llama")
    one = prompt("llama", slice(0, 1))
    expected = model.generate(**one, **OPTIONS)
    with pytest.warns(UserWarning, match="names 1 of its"):
        found = model.get_base_model().generate(**one, **OPTIONS, assistant_early_exit=1)
    assert torch.equal(found, expected)


def test_a_configuration_with_fewer_blocks_is_told_and_does_not_train():
    model = make("llama")
    model.config.num_hidden_layers -= 1
    with torch.no_grad(), pytest.warns(UserWarning, match="the fusion, which reads all of them, is left out"):
        model(**prompt("llama"))
    with pytest.raises(RuntimeError, match="if num_hidden_layers was changed in it, set that back"):
        model.train()(**prompt("llama"))


def test_generation_takes_ids_by_position_and_runs_in_16_bits():
    model = make("llama")
    ids = prompt("llama", slice(0, 1))["input_ids"]
    assert torch.equal(model.generate(ids, **OPTIONS), model.generate(input_ids=ids, **OPTIONS))
    half = disturb(attach("llama", model=FAMILIES["llama"].build("causal").bfloat16()), scale=0.3).eval()
    cached, uncached = (half.generate(ids, **OPTIONS, use_cache=c) for c in (True, False))
    assert cached.shape == uncached.shape == (1, ids.shape[1] + 6)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("family", [f for f in DECODERS + STACKS if f != "t5-both"])
def test_a_fusion_over_positions_refuses_what_a_cache_hides(family, copied):
    model = make(family, fusion="deeper", fusion_copy_last=copied)
    one = prompt(family, slice(0, 1))
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(**one, **OPTIONS, use_cache=True)
    together = model.generate(**prompt(family), **OPTIONS, use_cache=False)
    assert torch.equal(together[:1], model.generate(**one, **OPTIONS, use_cache=False))


def test_a_fusion_over_positions_in_the_encoder_needs_no_cache():
    model = make("t5-encoder", fusion="deeper")
    batch = prompt("t5-encoder")
    assert torch.equal(model.generate(**batch, **OPTIONS), model.generate(**batch, **OPTIONS, use_cache=False))
