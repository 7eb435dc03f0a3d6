"""Trainable fusion weights that something casts to 16 bits after attaching: told once, with the lines that cast back."""

import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import attached, batch, layer_of, tiny
from transformers import Trainer, TrainingArguments

from fusion_adapters import FusionConfig

CAST = "tensors of the fusion of the adapter 'default' that train are"
CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "trl": lambda model: [setattr(p, "data", p.data.to(torch.bfloat16)) for p in model.parameters() if p.requires_grad],
}


def told(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if CAST in str(w.message)]


def step(model, head="token"):
    model(**batch(head)).loss.backward()


def cast_back(model, message):
    lines = re.search(r"(    for p in .*\n.*float\(\))", message).group(1)
    exec("\n".join(line[4:] for line in lines.split("\n")), {"model": model})


@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("before_train", [True, False])
def test_a_cast_is_told_once_and_its_lines_let_the_gains_move(how, before_train, family):
    model = attached(family, model=tiny(family, dtype=torch.bfloat16))
    if not before_train:
        model.train()
    CASTS[how](model)
    (message,) = told(lambda: [step(model.train() if before_train else model) for _ in range(3)])
    assert ("float16" if how == "half" else "bfloat16") in message
    cast_back(model, message)
    model.zero_grad()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "fusions" in n}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-4, weight_decay=0)
    for _ in range(3):
        step(model)
        optimizer.step()
    gains = [n for n in trained if "norm_weight" in n or "position" in n]
    assert gains
    assert all(trained[n].dtype == torch.float32 and not torch.equal(trained[n], start[n]) for n in gains)


def test_no_word_where_nothing_trains_in_16_bits(tmp_path, family):
    model = attached(family, model=tiny(family, dtype=torch.bfloat16))
    assert not told(lambda: step(model.train()))  # as attached
    model.save_pretrained(tmp_path)
    model.to(torch.bfloat16).eval()
    assert not told(lambda: model(**batch()))  # nothing trains
    with torch.no_grad():
        layer_of(model).training = True
        assert not told(lambda: model(**batch()))
    loaded = PeftModel.from_pretrained(tiny(family, dtype=torch.bfloat16), tmp_path).to(torch.bfloat16)
    assert not told(lambda: loaded.train()(**batch()))  # frozen
    config = FusionConfig(task_type="TOKEN_CLS")
    asked = get_peft_model(tiny(family, dtype=torch.bfloat16), config, autocast_adapter_dtype=False).to(torch.bfloat16)
    assert not told(lambda: step(asked.train()))
    asked.add_adapter("second", FusionConfig(task_type="TOKEN_CLS"))
    asked.set_adapter("second")
    asked.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="of the fusion of the adapter 'second'"):
        asked.train()


def test_a_trainer_and_a_compiled_model_tell_it_too(tmp_path):
    rows = [{k: v[0] for k, v in batch().items()}] * 4

    def train(model):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, bf16=True, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        )
        return Trainer(model, arguments, train_dataset=rows).train()

    model = attached()
    assert not told(lambda: train(model))  # autocast leaves the weights as they are
    CASTS["trl"](model)
    assert len(told(lambda: train(model))) == 1
    model = attached()
    CASTS["to"](model)
    compiled = torch.compile(model, backend="eager")
    assert len(told(lambda: step(compiled.train()))) == 1


def test_weights_of_which_deepspeed_trains_copies_are_left_out():
    model = attached()
    CASTS["to"](model)
    for parameter in model.parameters():
        parameter._hp_mapping = None
    assert not told(lambda: step(model.train()))
