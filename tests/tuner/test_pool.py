"""`fusion_pool="mean"`: layer states averaged over the text before the fusion, in every method and on both sides of padding."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import FAMILIES, answer, attach, inputs
from peft import PeftModel, get_peft_model
from support import METHODS, WIDTH, attached, batch, disturb, layer_of, logits, tiny
from transformers import Wav2Vec2Config, Wav2Vec2ForAudioFrameClassification

from fusion_adapters import FUSIONS, FusionConfig
from fusion_adapters.backbone.families import state_out
from fusion_adapters.backbone.record import recorded
from fusion_adapters.fusions import Context
from fusion_adapters.fusions.pooling import Means


def by_hand(states, mask, causal):
    """The means, literally: a loop over texts and positions, in float64."""
    result = states.double().clone()
    for text in range(len(states)):
        real = [t for t in range(states.shape[1]) if mask[text, t]]
        for t in range(states.shape[1]):
            counted = [s for s in real if s <= t and s != real[0]] if causal else real
            if counted:
                result[text, t] = sum(states[text, s].double() for s in counted) / len(counted)
    return result.to(states.dtype)


def pooled(family, method="dwatt", head="sequence", **fields):
    return attached(family, head, fusion_pool="mean", **{**METHODS[method], **fields}).eval()


def fused_in(model, **call):
    """The fused state of a call."""
    seen = []
    handle = layer_of(model).register_forward_hook(lambda layer, args, output: seen.append(output))
    with torch.no_grad():
        model(**call)
    handle.remove()
    return seen[0]


def states_of(model, **call):
    """The layer states `z_0 .. z_L` of a call."""
    backbone = layer_of(model).backbone
    found = {}
    with torch.no_grad(), layer_of(model).unfused(), recorded(backbone, range(backbone.num_layers + 1), found.__setitem__):
        backbone.base(**call)
    return [found[i] for i in sorted(found)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_means_by_hand(causal, padding):
    states, mask = torch.randn(4, 7, WIDTH), torch.ones(4, 7, dtype=torch.long)
    if padding == "right":
        mask[1, 4:] = mask[2, 2:] = mask[3, 1:] = 0
    elif padding == "left":
        mask[1, :3] = mask[2, :5] = mask[3, :6] = 0
    expected = by_hand(states, mask, causal)
    states = states.masked_fill(mask[..., None] == 0, torch.nan)  # what stands in padding has no part in a mean
    means = Means(Context(mask, causal), states)
    real = mask.bool()
    torch.testing.assert_close(means(states)[real], expected[real])
    if padding == "none":
        torch.testing.assert_close(Means(Context(None, causal), states)(states), expected)
    low = states.bfloat16()
    torch.testing.assert_close(means(low)[real], by_hand(low, mask, causal)[real])


@pytest.mark.parametrize("method", METHODS)
def test_a_fusion_gets_the_means(family, method):
    model = disturb(pooled(family, method))
    call = {name: value for name, value in batch("sequence").items() if name != "labels"}
    states, mask, causal = states_of(model, **call), call["attention_mask"], family == "llama"
    layer, real = layer_of(model), mask.bool()
    fusion = layer.active_fusion
    if fusion.mixes_positions:  # the mean is of what the further blocks answer
        fusion.pools = False
        expected = by_hand(fused_in(model, **call), mask, causal)
        fusion.pools = True
    else:
        states = [by_hand(state, mask, causal) for state in states]
        with torch.no_grad():
            expected = fusion([states[i] for i in fusion.layers], states[-1], Context(mask, causal))
    torch.testing.assert_close(fused_in(model, **call)[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_answers_without_a_graph_are_those_with_one(family, method, dtype):
    fields = {**METHODS[method], "fusion_pool": "mean"}
    model = disturb(attached(family, "sequence", tiny(family, "sequence", dtype=dtype), **fields)).eval()
    for lower in (False, True):
        if lower:
            model.add_adapter(
                "lower", FusionConfig(task_type="SEQ_CLS", fusion_depth=3, **{**fields, "fusion_layers": None})
            )
            model.set_adapter("lower")
            disturb(model)
        with_graph = model(**batch("sequence")).logits
        assert torch.equal(logits(model, "sequence"), with_graph)
        fused_in(model, **batch("sequence"))  # waits for the fusion's call, which gets whole states
        assert torch.equal(logits(model, "sequence"), with_graph)


@pytest.mark.parametrize("method", METHODS)
def test_inference_keeps_what_the_fusion_needs_of_the_means_and_not_the_states(family, method):
    model = pooled(family, method)
    layer, alive, counted = layer_of(model), [], []
    blocks = layer.backbone.blocks
    for block in blocks[:-2]:
        block.register_forward_hook(lambda b, args, output: alive.append(weakref.ref(state_out(output))))
    blocks[-1].register_forward_pre_hook(lambda *_: counted.append(sum(state() is not None for state in alive)))
    logits(model, "sequence")
    wanted = set(layer.active_fusion.layers) & set(range(1, len(blocks) - 1))
    assert counted == [0 if layer.active_fusion.absorbs else len(wanted)]
    assert layer.taps.held == 0


def test_compiled_and_in_threads(family):
    model = disturb(pooled(family, "concat"))
    expected = logits(model, "sequence")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        call = {name: value for name, value in batch("sequence").items() if name != "labels"}
        torch.testing.assert_close(compiled(**call).logits, expected, rtol=1e-5, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: logits(model, "sequence"), range(16)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fresh_adapter_is_the_backbone_with_the_mean_of_its_last_state(family, name):
    model = pooled(family, name)
    call = {n: v for n, v in batch("sequence").items() if n != "labels"}
    base, mask = model.get_base_model(), call["attention_mask"]
    last = by_hand(states_of(model, **call)[-1], mask, family == "llama")
    with torch.no_grad():
        expected = (
            base.score(base.model.norm(last))[torch.arange(2), mask.sum(1) - 1]
            if family == "llama"
            else base.classifier(base.bert.pooler(last))
        )
        found = model(**call).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = attached(family, "sequence", fusion=name).eval()
    assert (logits(plain, "sequence") - found).abs().max() > 1e-3  # and it is another answer than without


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_changes_no_answer(method, padding):
    model = disturb(attach("llama", "sequence", fusion_pool="mean", **METHODS[method]))
    texts = inputs("llama", "sequence", padding=padding)
    together = answer(model, texts)
    for i, mask in enumerate(texts["attention_mask"].bool()):
        alone = answer(model, {"input_ids": texts["input_ids"][i : i + 1, mask]})  # no mask: all of it is real
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_later_token_changes_no_earlier_position(name):
    model = disturb(pooled("llama", name))
    ids = torch.randint(1, 100, (1, 9))
    other = ids.clone()
    other[0, 6] = ids[0, 6] % 99 + 1
    before, after = (fused_in(model, input_ids=each) for each in (ids, other))
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-5


def test_every_position_of_an_encoder_holds_the_mean():
    model = disturb(pooled("bert"))
    fused = fused_in(model, **batch("sequence"))
    torch.testing.assert_close(fused, fused[:, :1].expand_as(fused))


@pytest.mark.parametrize("lora", [False, True])
def test_it_trains(family, lora):
    fields = {"r": 4, "target_modules": FAMILIES[family].lora, "fusion_stop_gradient": True} if lora else {}
    model = disturb(pooled(family, "concat", **fields)).train()
    model(**batch("sequence")).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert any(p.grad.any() for n, p in model.named_parameters() if (".lora_" if lora else ".fusions.") in n)


def test_it_is_saved_loaded_and_compared(tmp_path):
    model = disturb(pooled("llama"))
    expected = logits(model, "sequence")
    model.save_pretrained(tmp_path)
    config = FusionConfig.from_pretrained(tmp_path)
    assert config.fusion_pool == "mean"
    again = PeftModel.from_pretrained(tiny("llama", "sequence"), tmp_path)
    torch.testing.assert_close(logits(again, "sequence"), expected)
    other = attached("llama", "sequence")
    with pytest.raises(ValueError, match="fusion_pool is 'mean' there and None here"):
        other.load_adapter(tmp_path, "default")
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"fusion_pool": "mean"', '"fusion_pool": null'))
    with pytest.raises(ValueError, match="options in adapter_config"):
        PeftModel.from_pretrained(tiny("llama", "sequence"), tmp_path)


def test_adapters_with_and_without_it_in_one_model():
    model = disturb(pooled("llama"))
    expected = logits(model, "sequence")
    model.add_adapter("last", FusionConfig(task_type="SEQ_CLS", fusion="concat"))
    model.set_adapter("last")
    assert (logits(model, "sequence") - expected).abs().max() > 1e-3
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, "sequence"), expected)


def test_last_is_the_same_as_nothing():
    assert FusionConfig(fusion_pool="last").to_dict() == FusionConfig().to_dict()
    torch.testing.assert_close(
        logits(attached("llama", "sequence", fusion_pool="last"), "sequence"), logits(tiny("llama", "sequence"), "sequence")
    )


def test_other_values_are_refused():
    with pytest.raises(ValueError, match="fusion_pool='max' is unknown"):
        FusionConfig(fusion_pool="max")


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", "token"), ("llama", "causal"), ("bert", "token"), ("bert", "masked"), ("bert", "qa"), ("bart", "seq2seq"),
     ("gpt2", "causal")],
)  # fmt: skip
def test_heads_that_answer_at_every_position_are_refused(family, head):
    with pytest.raises(ValueError, match="answers at every position") as error:
        attach(family, head, fusion_pool="mean")
    assert "\n" not in str(error.value)


def test_an_encoder_that_a_decoder_reads_is_refused():
    spec = FAMILIES["bart"]
    with pytest.raises(ValueError, match="one mean in the place of all states of an encoder"):
        attach("bart", "sequence", model=spec.build("sequence"), fusion_pool="mean", fusion_stack="both")


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3", "bart", "distilbert", "modernbert"])
def test_families_with_a_head_over_texts(family):
    model = disturb(attach(family, "sequence", fusion_pool="mean"))
    assert answer(model, inputs(family, "sequence")).isfinite().all()


@pytest.mark.parametrize("name", FUSIONS)
def test_a_kv_cache_is_refused(name):
    model = pooled("llama", name)
    base = model.get_base_model()
    ids = torch.randint(1, 100, (1, 6))
    with torch.no_grad():
        first = base.model(input_ids=ids[:, :4], use_cache=True)
        with pytest.raises(ValueError, match="4 positions of this call lie in the backbone's KV cache"):
            base.model(input_ids=ids[:, 4:], past_key_values=first.past_key_values)


def test_a_mask_of_another_form_is_refused():
    model = pooled("llama")
    with pytest.raises(ValueError, match=r"whether it is real, \[2, 9\], and that of this call is \[2, 1, 9, 9\]"):
        model(input_ids=torch.ones(2, 9, dtype=torch.long), attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))


def test_a_decoder_whose_head_reads_the_first_token_is_refused():
    with pytest.raises(
        ValueError, match=r"running mean in a causal backbone \(is_decoder\), and the head of Bert.* reads the first"
    ):
        attached("bert", "sequence", tiny("bert", "sequence", is_decoder=True), fusion_pool="mean")


def test_frames_of_sound_are_answered_one_by_one():
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(8, 8), conv_stride=(2, 2),
        conv_kernel=(3, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = Wav2Vec2ForAudioFrameClassification(config)
    with pytest.raises(ValueError, match="Wav2Vec2ForAudioFrameClassification answers at every position"):
        get_peft_model(model, FusionConfig(fusion_pool="mean", fusion_blocks="wav2vec2.encoder.layers"))
