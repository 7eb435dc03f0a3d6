"""What stands after the blocks: the readout of the last state is the model's own answer, over families."""

import pytest
import torch
from families import FAMILIES
from support import attached, disturb, tiny
from torch import nn

from fusion_adapters import quantization_config
from fusion_adapters.backbone.record import recorded, run
from fusion_adapters.shortcuts import Readout
from fusion_adapters.shortcuts.saving import backbone_of

# whether the model applies modules alone after its blocks, so that they can be called by themselves
PLAIN = {
    "llama": True,
    "mistral": True,
    "qwen2": True,
    "qwen3": True,
    "phi3": True,
    "gpt2": True,
    "opt": True,
    "gpt-neox": True,
    "mamba": True,
    "mixtral": True,
    "gemma3": True,
    "gemma2": False,  # caps its logits
    "bert": True,
    "roberta": True,
    "xlm-roberta": True,
    "distilbert": True,
    "electra": True,
    "deberta-v2": True,
    "modernbert": True,
    "albert": True,
}
SPECIAL = {
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 8.0, "num_key_value_heads": 2}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.25, "num_key_value_heads": 2}),
    "phi": ("PhiConfig", "PhiForCausalLM", {}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {}),
}
IDS = torch.randint(3, 120, (3, 9), generator=torch.Generator().manual_seed(0))


def build(family):
    import transformers

    if family in SPECIAL:
        config, cls, settings = SPECIAL[family]
        shape = FAMILIES["llama"].settings
        shape = {k: v for k, v in shape.items() if k != "num_key_value_heads"}
        torch.manual_seed(0)
        model = getattr(transformers, cls)(getattr(transformers, config)(**{**shape, **settings})).eval()
    else:
        model = FAMILIES[family].build("causal" if "causal" in FAMILIES[family].classes else "masked")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases off their start
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def last_state(model, ids=IDS):
    found = {}
    backbone = backbone_of(model)
    with torch.no_grad(), recorded(backbone, [backbone.num_layers], lambda layer, state: found.update({layer: state})):
        run(backbone, {"input_ids": ids})
    return found[backbone.num_layers]


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", [*PLAIN, *SPECIAL])
def test_the_readout_of_the_last_state_is_the_models_answer(family):
    model = build(family)
    with torch.no_grad():
        expected, state = model(input_ids=IDS).logits, last_state(model)
        model.train()
        readout = Readout(model)
        assert model.training
        model.eval()
        close(readout(state), expected)
        flat = state.reshape(-1, state.shape[-1])
        close(readout(flat), expected.reshape(len(flat), -1))
        many = flat.repeat(20, 1)  # more positions than any of these models has
        close(readout(many)[-len(flat) :], expected.reshape(len(flat), -1))
    if family in PLAIN:
        assert (readout.chain is not None) == PLAIN[family]
    else:
        assert (readout.chain is None) == (family in ("granite", "cohere"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_the_linear_head_reads_the_normed_state(family):
    model = build(family)
    readout, state = Readout(model), last_state(model)
    with torch.no_grad():
        logits = readout(state)
        assert readout.linear is model.get_output_embeddings()
        some = torch.tensor([5, 17, 80])
        part = nn.functional.linear(
            readout.normed(state),
            readout.linear.weight[some],
            None if readout.linear.bias is None else readout.linear.bias[some],
        )
        close(part, logits[..., some])


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_logits_that_are_changed_after_the_head_have_no_linear_part(family):
    readout = Readout(build(family))
    with pytest.raises(
        ValueError, match=r"not a linear layer that comes last \(Linear, and its logits are scaled or capped.*whole vocab"
    ):
        _ = readout.linear
    with pytest.raises(ValueError, match=r"\(Linear, in RobertaLMHead\)"):
        _ = Readout(build("roberta")).linear


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_a_model_without_a_head_over_a_vocabulary_is_refused(head):
    with pytest.raises(ValueError, match=r"Llama\w+ has no head over a vocabulary.*AutoModelForCausalLM"):
        Readout(tiny("llama", head))
    with pytest.raises(ValueError, match="LlamaModel has no head over a vocabulary"):
        Readout(tiny("llama", head).model)


def test_a_fusion_that_is_attached_is_left_out():
    plain = tiny("llama", "lm")
    state = torch.randn(6, 32)
    model = disturb(attached("llama", "lm", fusion="dwatt"))
    with torch.no_grad():
        close(Readout(model)(state), Readout(plain)(state))
        assert Readout(model).chain is not None
        capped, model = build("gemma2"), build("gemma2")
        from peft import get_peft_model

        from fusion_adapters import FusionConfig

        model = disturb(get_peft_model(model, FusionConfig(fusion="dwatt", task_type="CAUSAL_LM")))
        close(Readout(model)(state), Readout(capped)(state))


def test_gradients_reach_the_state():
    for family in ("llama", "gemma2"):
        readout = Readout(build(family).requires_grad_(False))
        state = torch.randn(4, 32, requires_grad=True)
        readout(state).logsumexp(-1).sum().backward()
        assert state.grad.abs().sum() > 0


def test_an_8_bit_backbone(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tiny("llama", "lm", width=64)
    base.save_pretrained(tmp_path)
    eight = type(base).from_pretrained(
        tmp_path, quantization_config=quantization_config(8), dtype=torch.float32, device_map={"": "cpu"}
    )
    assert any(not p.is_floating_point() for p in eight.parameters())
    with torch.no_grad():
        close(Readout(eight)(last_state(eight)), eight(input_ids=IDS).logits)
