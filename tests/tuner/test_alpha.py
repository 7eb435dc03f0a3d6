"""`fusion_norm` and `fusion_alpha`: fresh adapters change nothing, heads learn faster and answer the same wherever they are loaded."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support import BACKBONES, METHODS, attached, batch, disturb, layer_of, logits, tiny

from fusion_adapters import FusionConfig

SCALED = {"fusion_norm": "rms", "fusion_alpha": 8.0}


@pytest.mark.parametrize("head", ["token", "sequence"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "deeper-copy"])
@pytest.mark.parametrize("family", BACKBONES)
def test_a_fresh_adapter_answers_as_the_backbone(family, method, head):
    expected = logits(tiny(family, head), head)
    model = attached(family, head, **METHODS[method], **SCALED)
    torch.testing.assert_close(logits(model, head), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", BACKBONES)
def test_saved_loaded_and_folded_it_answers_the_same(family, tmp_path):
    model = disturb(attached(family, fusion="concat", **SCALED, r=2))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["fusion_norm"], saved["fusion_alpha"]) == ("rms", 8.0)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(family), tmp_path)), expected)
    plain = tiny(family)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), expected)
    model.load_adapter(str(tmp_path), "default")  # into the adapter that is there
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny(family)))


def test_the_head_alone_becomes_a_plain_one():
    model = disturb(attached("bert", fusion="last", fusion_alpha=8.0))
    expected = logits(model)
    base = model.merge_and_unload(drop_fusion=True)
    torch.testing.assert_close(logits(base), expected, rtol=1e-6, atol=1e-6)
    assert not base.classifier._forward_pre_hooks
    assert type(base.classifier) is torch.nn.Linear


def change_after_a_step(alpha, fusion="last"):
    model = without_bias(attached("bert", fusion=fusion, fusion_alpha=alpha)).eval()
    before = logits(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model(**batch()).loss.backward()
    optimizer.step()
    return logits(model) - before


def without_bias(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("fusion", ["last", "concat"])
def test_a_step_of_adam_goes_as_far_as_at_a_rate_so_many_times_as_high(fusion):
    once, scaled = change_after_a_step(1.0, fusion), change_after_a_step(8.0, fusion)
    assert once.abs().max() > 0
    torch.testing.assert_close(scaled, 8 * once, rtol=2e-2, atol=0.02 * 8 * float(once.abs().max()))


def test_adapters_of_one_model_have_each_its_own(tmp_path):
    model = attached("bert", fusion="last", fusion_alpha=8.0)
    model.add_adapter("plain", FusionConfig(fusion="last", fusion_alpha=1.0, task_type="TOKEN_CLS"))
    wrapper = next(m for n, m in model.named_modules() if n.endswith("classifier") and hasattr(m, "modules_to_save"))
    scaled, plain = wrapper.modules_to_save["default"], wrapper.modules_to_save["plain"]
    torch.testing.assert_close(8 * scaled.weight, plain.weight)
    answer = logits(model)
    model.set_adapter("plain")
    torch.testing.assert_close(logits(model), answer, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    saved = [load_file(path)["base_model.model.classifier.weight"] for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert sorted(float(w.abs().max()) for w in saved) == sorted(float(h.weight.abs().max()) for h in (scaled, plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_backbones(dtype, tmp_path):
    model = disturb(attached("llama", model=tiny("llama", dtype=dtype), fusion="concat", **SCALED))
    expected = logits(model)
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama", dtype=dtype), tmp_path)), expected)


def test_a_head_over_the_vocabulary_stays_as_it_is():
    model = attached("llama", "lm", fusion="concat", fusion_alpha=8.0)
    assert torch.equal(model.get_base_model().lm_head.weight, tiny("llama", "lm").lm_head.weight)
    assert layer_of(model).active_fusion.alpha == 8


@pytest.mark.parametrize(
    ("family", "config", "norm", "alpha"),
    [
        ("bert", FusionConfig(task_type="TOKEN_CLS"), "none", 8.0),
        ("llama", FusionConfig(task_type="TOKEN_CLS"), "rms", 2.0),
        ("llama", FusionConfig(fusion_norm="none", fusion_alpha=3, task_type="TOKEN_CLS"), "none", 3.0),
        ("llama", FusionConfig(fusion="deeper", fusion_copy_last=True, task_type="TOKEN_CLS"), "none", 2.0),
        ("bert", FusionConfig.paper("dwatt", task_type="TOKEN_CLS"), "none", 1.0),
        ("llama", FusionConfig(fusion="concat", fusion_init="paper", task_type="TOKEN_CLS"), "none", 1.0),
    ],
)
def test_defaults_are_those_of_encoders_of_decoders_and_of_the_papers(family, config, norm, alpha):
    given = (config.fusion_norm, config.fusion_alpha)
    for _ in range(2):  # one config for two models
        model = get_peft_model(tiny(family), config)
        settled = model.peft_config["default"]
        assert (layer_of(model).active_fusion.norm, layer_of(model).active_fusion.alpha) == (norm, alpha)
        assert (settled.fusion_norm, settled.fusion_alpha) == (norm, alpha)
        head = model.get_base_model().classifier if family == "bert" else model.get_base_model().score
        torch.testing.assert_close(alpha * head.modules_to_save["default"].weight, head.original_module.weight)
    assert (config.fusion_norm, config.fusion_alpha) == given


@pytest.mark.parametrize("change", [{"fusion_alpha": 4.0}, {"fusion_norm": "none"}])
def test_a_checkpoint_with_another_scale_is_not_filled_in(change, tmp_path):
    attached("bert", fusion="concat", **{**SCALED, **change}).save_pretrained(tmp_path)
    model = attached("bert", fusion="concat", **SCALED)
    (name,) = change
    with pytest.raises(ValueError, match=rf"other options.*{name} is "):
        model.load_adapter(str(tmp_path), "default")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fusion_alpha": 0}, "fusion_alpha=0 must be a number above 0"),
        ({"fusion_alpha": "8"}, "fusion_alpha='8' must be a number above 0"),
        ({"fusion_alpha": float("nan")}, "fusion_alpha=nan must be"),
        ({"fusion_norm": "layer"}, "fusion_norm='layer' is unknown. Use 'rms' or 'none'"),
    ],
)
def test_unfit_values_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        FusionConfig(**fields)


def test_a_copied_block_computes_on_the_states_as_they_are():
    with pytest.raises(ValueError, match="fusion_norm='rms' with fusion_copy_last=True"):
        attached("bert", fusion="deeper", fusion_copy_last=True, fusion_norm="rms")


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["classifier", "score"], "task_type": None}])
def test_a_head_that_is_scaled_goes_into_no_other(fields, tmp_path):
    attached("bert", "sequence", fusion="last", fusion_alpha=8.0).save_pretrained(tmp_path)
    config = FusionConfig(**{"fusion": "last", "fusion_alpha": 8.0, "task_type": "SEQ_CLS", **fields})
    model = get_peft_model(tiny("bert", "sequence"), config)
    if not fields:
        model.load_adapter(str(tmp_path), "default")
        return
    with pytest.raises(ValueError, match=r"other options.*task_type is 'SEQ_CLS' there and None here"):
        model.load_adapter(str(tmp_path), "default")


def test_a_task_taken_out_of_a_saved_config_is_told(tmp_path):
    attached("bert", "sequence", fusion="last", fusion_alpha=8.0).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": None}))
    with pytest.raises(
        ValueError, match=r"options in adapter_config\.json .* are not those that the adapter was saved with"
    ):
        PeftModel.from_pretrained(tiny("bert", "sequence"), tmp_path)


class OwnHead(torch.nn.Module):
    """Calls its layer in a way that no hook sees."""

    def __init__(self, width, labels):
        super().__init__()
        self.out = torch.nn.Linear(width, labels)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.out.weight, self.out.bias)


def test_a_head_of_somebodys_own_is_left_alone_with_a_word():
    torch.manual_seed(0)
    model = tiny()
    model.classifier = OwnHead(32, 5)
    expected = logits(model)
    with pytest.warns(UserWarning, match=r"fusion_alpha=8 does not reach the trained module '.*classifier' \(OwnHead\)"):
        model = get_peft_model(model, FusionConfig(fusion="last", fusion_alpha=8.0, task_type="TOKEN_CLS"))
    assert torch.equal(logits(model), expected)


def test_the_papers_forms_are_not_scaled():
    with pytest.raises(ValueError, match="fusion_init='paper' is the published form of 'concat', without"):
        FusionConfig.paper("concat", fusion_norm="rms")


def test_adapters_without_these_fields_go_into_new_ones(tmp_path):
    model = disturb(attached("bert", fusion="concat", fusion_alpha=1.0))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    gone = (
        "fusion_norm",
        "fusion_alpha",
        "fusion_pool",
        "fusion_depth",
        "fusion_gguf",
        "fusion_digest",
    )  # as 0.1.0 wrote it
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in gone}))
    again = attached("bert", fusion="concat", fusion_alpha=1.0)
    with pytest.warns(UserWarning, match="holds no digest"):
        again.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(again), logits(model))
    with (
        pytest.warns(UserWarning, match="holds no digest"),
        pytest.raises(ValueError, match=r"fusion_alpha is 1\.0 there and 8\.0 here"),
    ):
        attached("bert", fusion="concat").load_adapter(str(tmp_path), "default")
    with pytest.warns(UserWarning, match="holds no digest"):
        plain = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(plain), logits(model))
    with pytest.warns(UserWarning, match="holds no digest"):
        given = PeftModel.from_pretrained(tiny(), tmp_path, config=FusionConfig(fusion="concat", task_type="TOKEN_CLS"))
    assert torch.equal(logits(given), logits(model))
