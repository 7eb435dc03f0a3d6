"""`adapter_names`: rows of one batch that go to different adapters, each answered as in a batch of its own."""

import pytest
import torch
from families import FAMILIES, answer, attach, first_head, inputs
from peft import LoraConfig, get_peft_model
from support import LABELS, METHODS, attached, batch, disturb, tiny
from support_conformance import config_of
from support_threads import in_threads

from fusion_adapters import FusionConfig

LORA = ("task_type", "r", "target_modules", "init_lora_weights")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def call_of(rows=4, seed=0):
    """A batch of texts of nine tokens, every second with two padded positions."""
    parts = [batch("token", seed=seed + i) for i in range(rows // 2)]
    return {k: torch.cat([part[k] for part in parts]) for k in ("input_ids", "attention_mask")}


def three(family="bert", head="token", **second):
    """A model with two adapters of different methods."""
    model = attached(family, head, fusion="dwatt")
    task = model.peft_config["default"].task_type
    model.add_adapter("other", FusionConfig(task_type=task, **{"fusion": "concat", **second}))
    for name in ("default", "other"):
        model.set_adapter(name)
        torch.manual_seed(len(name))
        disturb(model, 0.3)
    return model.eval()


def each_alone(model, names, call):
    """What the rows' adapters answer, one after the other."""
    rows = []
    for i, name in enumerate(names):
        row = {k: v[i : i + 1] for k, v in call.items()}
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    rows.append(model(**row).logits)
            else:
                model.set_adapter(name)
                rows.append(model(**row).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", ["token", "sequence"])
def test_each_row_is_answered_by_its_adapter(family, method, head):
    model, call = three(family, head, **METHODS[method]), call_of()
    names = ["other", "__base__", "default", "other"]
    expected = each_alone(model, names, call)
    with torch.no_grad():
        found = model(**call, adapter_names=names).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert not torch.allclose(found[0], each_alone(model, ["default"], call)[0], atol=1e-3)
    # with gradients at hand states are kept, not absorbed
    torch.testing.assert_close(model(**call, adapter_names=names).logits.detach(), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "fields", [{"fusion_pool": "mean"}, {"fusion_norm": "rms", "fusion_alpha": 4}, {"fusion_layers": [1, 3]}]
)
def test_options_hold_for_the_rows_alone(family, fields):
    model, call, names = three(family, "sequence", **fields), call_of(), ["default", "other", "other", "__base__"]
    with torch.no_grad():
        found = model(**call, adapter_names=names).logits
    torch.testing.assert_close(found, each_alone(model, names, call), **TOLERANCE)


def test_lora_goes_by_rows_too(family):
    lora = {"bert": ["query"], "llama": ["q_proj"]}[family]
    model, call = three(family, r=4, target_modules=lora, init_lora_weights=False), call_of()
    names = ["other", "default", "__base__", "other"]
    with torch.no_grad():
        found = model(**call, adapter_names=names).logits
    torch.testing.assert_close(found, each_alone(model, names, call), **TOLERANCE)


def test_as_peft_answers_for_lora_alone():
    plain = LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["query"], init_lora_weights=False)
    ours = FusionConfig(fusion="last", fusion_alpha=1, **{k: v for k, v in plain.to_dict().items() if k in LORA})
    call, names, found = call_of(), ["default", "b", "__base__", "b"], []
    for config in (plain, ours):
        model = get_peft_model(tiny(), config)
        model.add_adapter("b", config)
        state = {
            k: torch.randn(v.shape, generator=torch.Generator().manual_seed(sum(map(ord, k))))
            for k, v in model.state_dict().items()
            if "lora_" in k or "modules_to_save" in k
        }
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            found.append(model.eval()(**call, adapter_names=names).logits)
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.stack is None and n not in ("xlnet",)])
def test_over_the_families(name):
    head = first_head(name)
    model = attach(name, fusion="dwatt")
    model.add_adapter("other", config_of(name, "concat", False))
    model.set_adapter("other")
    model, call = disturb(model, 0.1).eval(), inputs(name, head)
    rows = len(next(iter(call.values())))
    names = ["other", "__base__"] * (rows // 2)
    found = answer(model, {**call, "adapter_names": names})
    with model.disable_adapter():
        base = answer(model, call)
    own = answer(model, call)
    assert found.shape == own.shape
    for i, who in enumerate(names):
        torch.testing.assert_close(found[i], (own if who == "other" else base)[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation(options):
    model = attached("llama", "lm", fusion="dwatt")
    model.add_adapter("other", FusionConfig(fusion="concat", task_type="CAUSAL_LM"))
    model.set_adapter("other")
    model = disturb(model, 0.3).eval()
    ids = call_of()["input_ids"][::2]
    limits = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, **options}

    def written(rows, **more):
        torch.manual_seed(3)
        return model.generate(input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows]), **limits, **more)

    if "do_sample" in options:  # rows draw from one stream of numbers: all of them in both calls
        assert written([0, 1], adapter_names=["other", "other"]).tolist() == written([0, 1]).tolist()
        return
    found = written([0, 1], adapter_names=["other", "__base__"])
    assert found[:1].tolist() == written([0]).tolist()
    with model.disable_adapter():
        assert found[1:].tolist() == written([1]).tolist()


def test_other_threads_are_not_disturbed():
    model, call = three(), call_of()
    names = ["other", "__base__", "default", "other"]
    expected = each_alone(model, names, call)
    model.set_adapter("default")
    with torch.no_grad():
        own = model(**call).logits

    def mixed():
        for _ in range(30):
            with torch.no_grad():
                torch.testing.assert_close(model(**call, adapter_names=names).logits, expected, **TOLERANCE)

    def plain():
        for _ in range(30):
            with torch.no_grad():
                assert torch.equal(model(**call).logits, own)

    assert in_threads(mixed, plain, mixed, plain) == [None] * 4


def test_what_cannot_be_mixed_is_said():
    model, call = three(), call_of()
    with torch.no_grad():
        before = model(**call).logits
    with pytest.raises(ValueError, match=r"has 'nobody', and the model has the adapters 'default', 'other'"):
        model(**call, adapter_names=["nobody", "default", "default", "other"])
    with pytest.raises(ValueError, match=r"3 names, and the batch has 4 rows"):
        model(**call, adapter_names=["default", "default", "other"])
    with pytest.raises(TypeError, match="Give a list with the name"):
        model(**call, adapter_names="default")
    with pytest.raises(ValueError, match=r"without training alone"):
        model.train()(**call, adapter_names=["default"] * 4)
    with torch.no_grad():
        assert torch.equal(model.eval()(**call).logits, before)
    lower = three(fusion_depth=2)
    with pytest.raises(ValueError, match=r"'default' after block 4, 'other' after block 2 of 4"):
        lower(**call, adapter_names=["default", "other", "other", "other"])
    with torch.no_grad():
        found = lower(**call, adapter_names=["other"] * 4).logits
    torch.testing.assert_close(found, each_alone(lower, ["other"] * 4, call), **TOLERANCE)


def test_disabled_adapters_stay_disabled():
    model, call = three(), call_of()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**call, adapter_names=["default", "other"] * 2).logits, model(**call).logits)
    assert model(**call).logits.shape[-1] == LABELS
