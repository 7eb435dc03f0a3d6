"""The model card's lines to load an adapter run as they stand, but for the adapter's own place."""

import re

import pytest
import torch
from peft import get_peft_model
from support import LORA, TASKS, batch, disturb, logits, tiny
from transformers import BertForTokenClassification, BertModel, T5Config, T5ForConditionalGeneration

from fusion_adapters import FusionConfig

NAMES = ["O", "B-PER", "I-PER", 'B-"X"', "I-X"]


def code_of(folder):
    (code,) = re.findall(r"## How to load this adapter.*?```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def loaded(folder):
    """The model that the card's code makes."""
    code = code_of(folder)
    assert code.count('"path/or/id/of/this/adapter"') == 1
    names = {}
    exec(code.replace("path/or/id/of/this/adapter", str(folder)), names)
    return names["model"]


def saved(model, folder, **fields):
    model = disturb(get_peft_model(model, FusionConfig(**fields)).eval())
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("names", [NAMES, None], ids=["named", "numbered"])
@pytest.mark.parametrize("head", ["token", "sequence"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_comes_back_with_its_labels(family, head, names, lora, tmp_path):
    labels = (
        {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {"num_labels": 5}
    )
    tiny(family, head, labels=2).save_pretrained(tmp_path / "base")  # with a head for other labels
    model = type(tiny(family, head)).from_pretrained(tmp_path / "base", ignore_mismatched_sizes=True, **labels)
    model = saved(model, tmp_path / "adapter", task_type=TASKS[head], **(LORA[family] if lora else {}))
    again = loaded(tmp_path / "adapter")
    kind = {"token": "AutoModelForTokenClassification", "sequence": "AutoModelForSequenceClassification"}[head]
    assert f"{kind}.from_pretrained(" in code_of(tmp_path / "adapter")
    assert list(again.config.id2label.values()) == (names or [f"LABEL_{i}" for i in range(5)])
    assert again.config.label2id == model.config.label2id
    assert torch.equal(logits(again, head), logits(model, head))


def test_a_language_model_comes_back(tmp_path):
    tiny("llama", "lm").save_pretrained(tmp_path / "base")
    model = type(tiny("llama", "lm")).from_pretrained(tmp_path / "base")
    model = saved(model, tmp_path / "adapter", task_type="CAUSAL_LM", **LORA["llama"])
    assert "AutoModelForCausalLM.from_pretrained(" in code_of(tmp_path / "adapter")
    assert "label" not in code_of(tmp_path / "adapter")
    assert torch.equal(logits(loaded(tmp_path / "adapter"), "lm"), logits(model, "lm"))


def test_a_seq2seq_model_and_a_bare_one_come_back(tmp_path):
    ids = batch("token")["input_ids"]
    sizes = {"vocab_size": 120, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    model = saved(model, tmp_path / "adapter", task_type="SEQ_2_SEQ_LM", fusion_stack="both")
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in code_of(tmp_path / "adapter")
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    assert torch.equal(loaded(tmp_path / "adapter").eval()(**inputs).logits, model(**inputs).logits)

    tiny("bert").base_model.save_pretrained(tmp_path / "bert")
    model = saved(BertModel.from_pretrained(tmp_path / "bert"), tmp_path / "bare")
    assert "AutoModel.from_pretrained(" in code_of(tmp_path / "bare")
    assert torch.equal(loaded(tmp_path / "bare")(ids).last_hidden_state, model(ids).last_hidden_state)


class Own(BertForTokenClassification):
    """A class that transformers does not know."""


def test_a_class_of_ones_own_is_named(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    saved(Own.from_pretrained(tmp_path / "base"), tmp_path / "adapter", task_type="TOKEN_CLS")
    assert f"from {__name__} import Own" in code_of(tmp_path / "adapter")
    batch_of, model = batch("token")["input_ids"], loaded(tmp_path / "adapter")
    assert type(model.get_base_model()).__name__ == "Own" and model(batch_of).logits.shape[-1] == 5


def test_a_model_that_cannot_be_loaded_by_name_is_a_comment(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny("bert").base_model
            self.config = self.bert.config

        def forward(self, **inputs):
            return self.bert(**inputs)

    saved(Plain(), tmp_path)
    assert "# backbone: the model it was trained on, a " in code_of(tmp_path)
