"""The backbone's identity: every value and every setting that changes answers, and nothing that does not."""

import base64
import copy
import json
import zlib

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from support import LORA, attached, disturb, logits, tiny
from transformers import AutoModel, BertConfig, BertModel, DebertaV2Config, DebertaV2Model, LlamaConfig, LlamaModel

from fusion_adapters import FusionConfig
from fusion_adapters.backbone.blocks import find_backbones
from fusion_adapters.backbone.fingerprint import fingerprint, fingerprints, fingerprints_differ, weights_signature


def found(model):
    return find_backbones(model)[0]


def difference(first, second, **options):
    return fingerprints_differ(fingerprint(found(first)), fingerprints(found(second)), **options)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_change_of_any_tensor_is_seen_and_named(family):
    model = tiny(family)
    before, signature = fingerprint(found(model)), weights_signature(found(model))
    for name, parameter in model.base_model.named_parameters():
        kept = parameter.data.clone()
        row = parameter.data[-2] if parameter.dim() == 2 else parameter.data
        row += 0.1 * torch.randn_like(row)
        assert name in fingerprints_differ(before, fingerprints(found(model))), name
        after = weights_signature(found(model))
        assert (after == signature) == (family == "llama" and name == "norm.weight"), name  # which runs after the blocks
        parameter.data = kept
    assert fingerprints_differ(before, fingerprints(found(model))) is None


def test_changes_of_large_tensors_are_seen_in_their_samples():
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
    model = BertModel(BertConfig(vocab_size=3000, **sizes))
    before = fingerprint(found(model))
    layers, words, state = model.encoder.layer, model.embeddings.word_embeddings.weight, copy.deepcopy(model.state_dict())
    query = layers[1].attention.self.query.weight

    def merge_lora():
        a, b = torch.randn(4, 256), torch.randn(256, 4)
        delta = b @ a
        query.data += 0.02 * delta * query.norm() / delta.norm()  # a small one: 2 % of the matrix's norm

    changes = {
        "a LoRA merged": (merge_lora, "layer.1.attention.self.query"),
        "two matrices exchanged": (lambda: _exchange(query, layers[2].attention.self.query.weight), "2 of"),
        "a matrix drawn anew": (lambda: torch.nn.init.normal_(query, std=0.02), "1 of"),
        "a matrix transposed": (lambda: query.data.copy_(query.data.T.clone()), "1 of"),
        **{
            f"token {row}": (lambda row=row: words.data[row].normal_(), "word_embeddings.weight[")
            for row in (0, 1, 1023, 1024, 2999)
        },
    }
    for name, (change, said) in changes.items():
        with torch.no_grad():
            change()
        assert said in (fingerprints_differ(before, fingerprints(found(model))) or "nothing"), name
        model.load_state_dict(state)
        assert fingerprints_differ(before, fingerprints(found(model))) is None


def _exchange(one, other):
    kept = one.data.clone()
    one.data.copy_(other.data)
    other.data.copy_(kept)


def test_a_single_token_and_tokens_exchanged_are_seen():
    torch.manual_seed(0)
    model = LlamaModel(
        LlamaConfig(vocab_size=5000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    before, signature = fingerprint(found(model)), weights_signature(found(model))
    words = model.embed_tokens.weight.data
    for rows in ([3777, 3777], [17, 4801]):
        kept = words.clone()
        words[rows] = kept[rows[::-1]] if rows[0] != rows[1] else kept[[5, 5]]
        assert "embed_tokens.weight[" in fingerprints_differ(before, fingerprints(found(model)))
        assert weights_signature(found(model)) != signature
        words.copy_(kept)


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert", "t5", "gpt2", "mixtral"])
def test_casts_of_one_checkpoint_agree(family):
    build = FAMILIES[family].build
    head = FAMILIES[family].heads[0] if hasattr(FAMILIES[family], "heads") else "token"
    full = build(head)
    for first in (torch.float32, torch.bfloat16, torch.float16):
        for second in (torch.float32, torch.bfloat16, torch.float16):
            assert difference(build(head).to(first), build(head).to(second)) is None, (first, second)
        assert difference(full, build(head).to(first).float()) is None, first
        assert difference(full, disturb_base(build(head), 1e-2).to(first)) is not None, first


def disturb_base(model, scale):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


CHANGES = [
    (LlamaConfig, LlamaModel, {"rms_norm_eps": 1e-3}),
    (LlamaConfig, LlamaModel, {"hidden_act": "gelu"}),
    (LlamaConfig, LlamaModel, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    (LlamaConfig, LlamaModel, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    (LlamaConfig, LlamaModel, {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}),
    (BertConfig, BertModel, {"layer_norm_eps": 1e-3}),
    (BertConfig, BertModel, {"hidden_act": "relu"}),
    (BertConfig, BertModel, {"is_decoder": True}),
]
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize(("config", "kind", "change"), CHANGES, ids=[f"{c[0].model_type}-{min(c[2])}" for c in CHANGES])
def test_a_setting_that_changes_answers_is_seen_and_named(config, kind, change):
    model, other = kind(config(**SIZES)), kind(config(**{**SIZES, **change}))
    other.load_state_dict(model.state_dict())
    assert f"another configuration: {max(change).split('_')[0]}" in difference(model, other)


def test_settings_of_training_heads_and_speed_are_none():
    build = FAMILIES["llama"].build
    model, other = (
        build("causal"),
        build("causal", attention_dropout=0.3, use_cache=False, eos_token_id=5, max_position_embeddings=99),
    )
    other.config._name_or_path = "elsewhere"
    assert difference(model, other) is None


def test_adapters_on_the_backbone_do_not_count():
    plain = fingerprint(found(tiny()))
    for fields in (
        {"r": 4, "target_modules": ["query", "word_embeddings"]},
        {"r": 4, "target_modules": ["key"], "bias": "none"},
    ):
        with_lora = tiny()
        with_lora.add_adapter(LoraConfig(modules_to_save=["classifier"], **fields))
        assert fingerprint(found(disturb(with_lora))) == plain
    tokens = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["query"], trainable_token_indices=[5, 7]))
    assert fingerprint(found(disturb(tokens).get_base_model())) == plain
    assert fingerprint(found(attached(**LORA["bert"]).get_base_model())) == plain


def test_a_merged_lora_is_another_backbone(tmp_path):
    merged = disturb(
        get_peft_model(tiny(), LoraConfig(r=4, target_modules=["query", "value"])), scale=0.05
    ).merge_and_unload()
    model = disturb(get_peft_model(merged, FusionConfig(task_type="TOKEN_CLS")))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"other weights: \d of \d+ tensors .*saved after the change, under a name of its own"
    ):
        PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    merged = disturb(
        get_peft_model(tiny(), LoraConfig(r=4, target_modules=["query", "value"])), scale=0.05
    ).merge_and_unload()
    assert torch.equal(logits(PeftModel.from_pretrained(merged, tmp_path / "adapter")), logits(model))


def test_new_tokens_leave_the_fingerprint_as_it_was():
    model, more = FAMILIES["bert"].build("token", vocab_size=2500), FAMILIES["bert"].build("token", vocab_size=2500)
    more.resize_token_embeddings(2530)
    assert difference(model, more) is None
    more.base_model.embeddings.word_embeddings.weight.data[1500] += 0.1
    assert "word_embeddings.weight[1024:2048]" in difference(model, more)
    assert difference(model, more, rows=[1500]) is None
    assert difference(model, more, replaced=["word_embeddings"]) is None


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_backbone_whose_weights_are_elsewhere_is_the_same(place, tmp_path):
    whole, model = tiny(), tiny()
    if place == "memory":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert fingerprints(found(model)) == fingerprints(found(whole))
    assert weights_signature(found(model)) == weights_signature(found(whole))


def test_a_backbone_without_weights_is_unknown():
    with torch.device("meta"):
        model = tiny()
    assert fingerprints(found(model)) == {}
    assert fingerprints_differ(fingerprint(found(tiny())), {}) is None


def edited(text, **change):
    content = json.loads(zlib.decompress(base64.b64decode(text.partition(":")[2])))
    return "v2:" + base64.b64encode(zlib.compress(json.dumps({**content, **change}).encode())).decode()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_text_that_cannot_be_read_is_refused(version):
    here = fingerprints(found(tiny()), saved=f"{version}:")
    text = here[version]
    broken = [f"{version}:", f"{version}:zz", text[:-3], text[:42], text[:20] + "!" + text[21:]]
    if version == "v2":
        broken += [edited(text, sums=[1]), edited(text, sums={"a": "b"}), edited(text, config=3), edited(text, sums={})]
    for wrong in broken:
        with pytest.raises(ValueError, match=r'"fusion_fingerprint" in adapter_config.json cannot be read'):
            fingerprints_differ(wrong, here)
    for wrong in ("", "v3:00", "abc", text[1:], text.partition(":")[2]):
        with pytest.raises(ValueError, match="this version of fusion-adapters reads 'v1' and 'v2'"):
            fingerprints_differ(wrong, here)


def test_relative_positions_that_stand_after_the_blocks_belong_to_them():
    config = DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", position_buckets=8
    )
    model = DebertaV2Model(config)
    backbone = found(model)
    assert [m for m in backbone.upstream if m is model.encoder.rel_embeddings]
    before = weights_signature(backbone)
    model.encoder.rel_embeddings.weight.data[3] += 0.1
    assert weights_signature(backbone) != before
    assert (
        isinstance(AutoModel.from_config(BertConfig(**SIZES)), BertModel)
        and found(AutoModel.from_config(BertConfig(**SIZES))).beside == []
    )
