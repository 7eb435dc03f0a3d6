"""What the blocks of `deeper` may see: no later token in a decoder, no other text of the row, no padding."""

import pytest
import torch
import transformers
from peft import get_peft_model
from support import attached, disturb, tiny

from fusion_adapters import FusionConfig
from fusion_adapters.backbone.blocks import find_backbones

SIZE, DEPTH, WORDS = 32, 2, 60
# configurations name the same things differently
BY_NAME = {"hidden_size": SIZE, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "vocab_size": WORDS}
DECODERS = {
    "Bloom": {"hidden_size": SIZE, "n_layer": DEPTH, "n_head": 4, "vocab_size": WORDS},
    "Mpt": {"d_model": SIZE, "n_layers": DEPTH, "n_heads": 4, "vocab_size": WORDS, "max_seq_len": 32},
    "XGLM": {"d_model": SIZE, "num_layers": DEPTH, "attention_heads": 4, "ffn_dim": 64, "vocab_size": WORDS},
    "CodeGen": {"n_embd": SIZE, "n_layer": DEPTH, "n_head": 4, "rotary_dim": 4, "vocab_size": WORDS, "n_positions": 32},
    "GPTNeoXJapanese": {**BY_NAME, "intermediate_multiple_size": 2},
    "OpenAIGPT": {"n_embd": SIZE, "n_layer": DEPTH, "n_head": 4, "vocab_size": WORDS, "n_positions": 32},
    "GPT2": {"n_embd": SIZE, "n_layer": DEPTH, "n_head": 4, "vocab_size": WORDS, "n_positions": 32},
    "Llama": {**BY_NAME, "intermediate_size": 64},
}
HEADS = {"OpenAIGPT": "OpenAIGPTLMHeadModel", "GPT2": "GPT2LMHeadModel"}


def decoder(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**DECODERS[name], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return getattr(transformers, HEADS.get(name, f"{name}ForCausalLM"))(config).eval()


def deeper(model, **fields):
    return disturb(get_peft_model(model, FusionConfig(fusion="deeper", **fields)), scale=0.3).eval()


def change_of_earlier(model, **inputs):
    """The largest change of an answer before the last position when the last token is another one."""
    first = torch.tensor([[5, 6, 7, 8, 9, 10]])
    second = first.clone()
    second[0, -1] = 20
    with torch.no_grad():
        one, two = (model(**inputs, **{model.main_input: ids}).logits for ids in (first, second))
    assert (one[:, -1] - two[:, -1]).abs().max() > 1e-3
    return float((one[:, :-1] - two[:, :-1]).abs().max())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("copied", [False, True], ids=["blocks", "copies"])
def test_no_later_token_is_seen(name, copied):
    (backbone,) = find_backbones(decoder(name))
    assert backbone.causal
    model = deeper(decoder(name), fusion_copy_last=copied)
    model.main_input = "input_ids"
    assert change_of_earlier(model, use_cache=False) < 1e-5


@pytest.mark.parametrize("family", ["led", "bart", "t5"])
def test_no_later_token_is_seen_by_a_decoder_stack(family):
    torch.manual_seed(0)
    shared = {"d_model": SIZE, "vocab_size": WORDS, "decoder_start_token_id": 1}
    stacks = {
        f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
    }
    config, head = {
        "led": (transformers.LEDConfig(**shared, **stacks, attention_window=4), transformers.LEDForConditionalGeneration),
        "bart": (transformers.BartConfig(**shared, **stacks), transformers.BartForConditionalGeneration),
        "t5": (
            transformers.T5Config(**shared, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
            transformers.T5ForConditionalGeneration,
        ),
    }[family]
    encoder, decoder_stack = find_backbones(head(config), stack="both")
    assert (encoder.causal, decoder_stack.causal) == (False, True)
    model = deeper(head(config).eval(), fusion_stack="decoder")
    model.main_input = "decoder_input_ids"
    assert change_of_earlier(model, input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False) < 1e-5


@pytest.mark.parametrize(("name", "causal"), [("Bert", False), ("Roberta", False), ("XLNet", False), ("BigBird", False)])
def test_encoders_see_both_ways(name, causal):
    settings = (
        {**BY_NAME, "intermediate_size": 64}
        if name != "XLNet"
        else {"d_model": SIZE, "n_layer": 2, "n_head": 4, "d_inner": 64}
    )
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
    (backbone,) = find_backbones(model)
    assert backbone.causal == causal


@pytest.mark.parametrize("fusion", ["deeper", "dwatt"])
def test_texts_in_one_row_do_not_see_each_other(fusion):
    model = disturb(attached("llama", "lm", fusion=fusion), scale=0.3).eval()
    first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11]])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], 1), position_ids=places, use_cache=False).logits
        alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in (first, second)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_padding_that_the_backbone_adds_is_not_seen():
    torch.manual_seed(0)
    shape = {**BY_NAME, "intermediate_size": 64, "attention_window": [4, 4], "num_labels": 3, "pad_token_id": 0}
    model = transformers.LongformerForTokenClassification(transformers.LongformerConfig(**shape)).eval()
    model = disturb(get_peft_model(model, FusionConfig(fusion="deeper", task_type="TOKEN_CLS")), scale=0.3).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        longer = torch.cat([ids, torch.zeros(1, 2, dtype=torch.long)], 1)
        mask = (longer != 0).long()
        padded = model(input_ids=longer, attention_mask=mask).logits
    torch.testing.assert_close(padded[:, :8], full, rtol=1e-4, atol=1e-5)


def test_the_stacks_of_two_models_in_one_are_named_by_their_blocks():
    pair = transformers.EncoderDecoderModel(encoder=tiny("bert").bert, decoder=transformers.BertLMHeadModel(
        transformers.BertConfig(**BY_NAME, intermediate_size=64, is_decoder=True, add_cross_attention=True)
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"stacks of EncoderDecoderModel.*cannot be told apart.*fusion_blocks='\.\.\.'"):
        get_peft_model(pair, FusionConfig(fusion_stack="decoder"))
