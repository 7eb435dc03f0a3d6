"""KV caches that calls under `fusion_depth` have written: continued by what runs no further up, and refused above that."""

import copy

import pytest
import torch
import transformers
from families import DECODER, FAMILIES, STACKS, VOCABULARY
from peft import get_peft_model
from support import disturb
from transformers import DynamicCache, StaticCache

from fusion_adapters import FusionConfig, use_adapter

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
# backbones without a head: class, configuration, the name of the cache
BACKBONES = {
    **{name: (kind, FAMILIES[name].config, FAMILIES[name].settings, "past_key_values") for name, kind in (
        ("llama", "LlamaModel"), ("gpt2", "GPT2Model"), ("gpt-neox", "GPTNeoXModel"), ("gemma2", "Gemma2Model"),
    )},
    "mamba": ("MambaModel", "MambaConfig", FAMILIES["mamba"].settings, "cache_params"),
    # linear attention in the first blocks, and a convolution
    "qwen3-next": ("Qwen3NextModel", "Qwen3NextConfig", {**DECODER, **LINEAR, **EXPERTS, "head_dim": 8}, "past_key_values"),
    "lfm2": ("Lfm2Model", "Lfm2Config", {**DECODER, "full_attn_idxs": [2], "block_ff_dim": 64}, "past_key_values"),
    "falcon-h1": (
        "FalconH1Model", "FalconH1Config", {**DECODER, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
        "past_key_values",
    ),
}  # fmt: skip
IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


def make(name="llama", **depths):
    """A backbone with an adapter of all blocks and some of the lower ones, and the name of its cache."""
    kind, config, settings, cache = BACKBONES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    fields = {"task_type": "FEATURE_EXTRACTION", "fusion": "concat", "fusion_bottleneck": 8}
    model = get_peft_model(model, FusionConfig(**fields), adapter_name="all")
    for each, depth in ({"lower": 2} | depths).items():
        disturb(model)
        model.add_adapter(each, FusionConfig(**fields, fusion_depth=depth))
        model.set_adapter(each)
    return disturb(model), cache


def ask(model, adapter, ids, **options):
    """One call of the backbone under an adapter; None for none."""
    with torch.no_grad(), use_adapter(model, adapter):
        return model.get_base_model()(input_ids=ids, **options)


def last_of(output):
    return output.last_hidden_state[:, -1]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("depth", [1, 3])
def test_a_cache_of_lower_blocks_serves_these_and_no_more(name, depth):
    model, key = make(name, lower=depth)
    begun = ask(model, "lower", IDS[:, :5], use_cache=True)[key]
    again = copy.deepcopy(begun)
    for adapter in ("all", None):
        with pytest.raises(ValueError, match=rf"{key} was written .* fusion_depth={depth}, .* runs 4 of the 4 blocks"):
            ask(model, adapter, IDS[:, 5:6], **{key: again})
    for position in (5, 6):  # what was refused has left the cache as it was
        found = ask(model, "lower", IDS[:, position : position + 1], **{key: again})
        expected = ask(model, "lower", IDS[:, : position + 1])
        torch.testing.assert_close(last_of(found), last_of(expected), rtol=1e-4, atol=1e-5)
        assert found[key] is again


@pytest.mark.parametrize("name", BACKBONES)
def test_a_cache_of_all_blocks_serves_lower_ones_and_is_then_theirs(name):
    model, key = make(name)
    begun = ask(model, None, IDS[:, :5], use_cache=True)[key]
    for adapter in ("all", None, "all"):
        found = ask(model, adapter, IDS[:, 5:6], **{key: copy.deepcopy(begun)})
        torch.testing.assert_close(last_of(found), last_of(ask(model, adapter, IDS[:, :6])), rtol=1e-4, atol=1e-5)
    found = ask(model, "lower", IDS[:, 5:6], **{key: begun})
    torch.testing.assert_close(last_of(found), last_of(ask(model, "lower", IDS[:, :6])), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="fusion_depth=2"):
        ask(model, "all", IDS[:, 6:], **{key: begun})
    found = ask(model, "lower", IDS[:, 6:], **{key: begun})
    torch.testing.assert_close(last_of(found), last_of(ask(model, "lower", IDS)), rtol=1e-4, atol=1e-5)


def test_depths_of_several_adapters():
    model, key = make(lower=1, middle=3, other=3)
    begun = ask(model, "middle", IDS[:, :5], use_cache=True)[key]
    found = ask(model, "other", IDS[:, 5:6], **{key: begun})  # the same depth
    torch.testing.assert_close(last_of(found), last_of(ask(model, "other", IDS[:, :6])), rtol=1e-4, atol=1e-5)
    ask(model, "lower", IDS[:, 6:], **{key: begun})
    for adapter, runs in (("middle", 3), ("all", 4), (None, 4)):
        with pytest.raises(ValueError, match=f"runs {runs} of the 4 blocks: those above 1 .* all of the 7 pos"):
            ask(model, adapter, IDS[:, :1], **{key: begun})


def test_refusals_leave_nothing_behind():
    model, key = make()
    begun = ask(model, "lower", IDS[:, :5], use_cache=True)[key]
    with model.disable_adapter(), pytest.raises(ValueError, match="fusion_depth=2") as error:
        model.get_base_model()(IDS[:, 5:6], None, None, begun)  # by position
    assert "\n" not in str(error.value)
    layer = model.get_base_model().layer_fusion
    assert layer.taps.open_calls == layer.taps.held == 0
    torch.testing.assert_close(last_of(ask(model, "all", IDS)), last_of(ask(model, "all", IDS)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_a_cache_that_is_emptied_is_a_new_one(name, kind):
    model, key = make(name)
    options = {"max_cache_len": 12} if kind is StaticCache else {}
    cache = kind(config=model.config, **options)
    ask(model, "lower", IDS[:, :5], **{key: cache})
    with pytest.raises(ValueError, match="fusion_depth=2"):
        ask(model, None, IDS[:, 5:6], **{key: cache})
    cache.reset()
    for adapter in ("all", "lower"):
        ask(model, adapter, IDS[:, :5], **{key: cache})
        found = ask(model, adapter, IDS[:, 5:6], **{key: cache})
        torch.testing.assert_close(last_of(found), last_of(ask(model, adapter, IDS[:, :6])), rtol=1e-4, atol=1e-5)
        cache.reset()


def test_a_decoder_beside_an_encoder():
    torch.manual_seed(0)
    model = transformers.BartModel(transformers.BartConfig(**STACKS, max_position_embeddings=64)).eval()
    config = FusionConfig(task_type="FEATURE_EXTRACTION", fusion="concat", fusion_depth=2, fusion_stack="decoder")
    model = disturb(get_peft_model(model, config))
    base = model.get_base_model()

    def call(ids, **options):
        with torch.no_grad():
            return base(input_ids=IDS, decoder_input_ids=ids, **options)

    begun = call(IDS[:, :5], use_cache=True).past_key_values
    with model.disable_adapter(), pytest.raises(ValueError, match="this call runs 3 of the 3 blocks"):
        call(IDS[:, 5:6], past_key_values=begun)
    torch.testing.assert_close(last_of(call(IDS[:, 5:6], past_key_values=begun)), last_of(call(IDS[:, :6])))


@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole):
    model, key = make()
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=whole)

    def call(ids, **options):
        with torch.no_grad():
            return compiled(input_ids=ids, **options)

    model.set_adapter("lower")
    expected = last_of(ask(model, "lower", IDS[:, :6]))
    begun = call(IDS[:, :5], use_cache=True)[key]
    model.set_adapter("all")
    with pytest.raises(Exception, match="fusion_depth=2"):
        call(IDS[:, 5:6], **{key: begun})
    model.set_adapter("lower")
    torch.testing.assert_close(last_of(call(IDS[:, 5:6], **{key: begun})), expected, rtol=1e-4, atol=1e-5)


def test_fusions_over_positions_see_caches_whose_first_attention_lies_above():
    model, key = make("qwen3-next", lower=1)
    begun = ask(model, "lower", IDS[:, :5], use_cache=True)[key]
    config = FusionConfig(task_type="FEATURE_EXTRACTION", fusion="deeper", fusion_num_blocks=1, fusion_depth=1)
    model.add_adapter("mixing", config)
    with pytest.raises(ValueError, match="use_cache=False"):
        ask(model, "mixing", IDS[:, 5:6], **{key: begun})
