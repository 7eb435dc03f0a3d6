"""The names of a classifier's outputs: saved with the adapter, set where it is loaded, refused where they contradict."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import TASKS, disturb, logits, tiny

from fusion_adapters import FusionConfig

NAMES, OTHERS = ["negative", "neutral", "positive", "mixed", "none"], ["a", "b", "c", "d", "e"]


def named(names, head="sequence"):
    model = tiny(head=head)
    if names is not None:
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    return model


def saved(folder, names=NAMES, head="sequence"):
    model = disturb(get_peft_model(named(names, head), FusionConfig(task_type=TASKS[head])).eval())
    model.save_pretrained(folder)
    return model


def outputs_of(model):
    assert model.config.label2id == {n: i for i, n in model.config.id2label.items()}
    return [model.config.id2label[i] for i in range(5)]


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_a_model_without_names_takes_those_of_the_adapter(head, tmp_path):
    model = saved(tmp_path, head=head)
    assert config_of(tmp_path)["fusion_labels"] == NAMES
    again = PeftModel.from_pretrained(named(None, head), tmp_path)
    assert outputs_of(again) == NAMES
    assert torch.equal(logits(again, head), logits(model, head))
    assert outputs_of(PeftModel.from_pretrained(named(NAMES, head), tmp_path)) == NAMES


def test_transformers_own_load_names_the_outputs_too(tmp_path):
    saved(tmp_path)
    model = named(None)
    model.load_adapter(str(tmp_path))
    assert outputs_of(model) == NAMES


@pytest.mark.parametrize("names", [NAMES[::-1], OTHERS])
def test_names_that_contradict_are_refused(names, tmp_path):
    saved(tmp_path)
    model = named(names)
    with pytest.raises(
        ValueError, match=r"5 outputs are 'negative', .*the model was loaded with 5 outputs named .*id2label="
    ):
        PeftModel.from_pretrained(model, tmp_path)
    assert outputs_of(model) == names


def test_another_number_of_outputs_is_refused_by_name(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"5 outputs are 'negative', .*with 2 outputs named 'LABEL_0', 'LABEL_1'"):
        PeftModel.from_pretrained(tiny(head="sequence", labels=2), tmp_path)


def test_the_active_adapter_names_the_outputs(tmp_path):
    saved(tmp_path / "first")
    saved(tmp_path / "second", OTHERS)
    model = PeftModel.from_pretrained(named(None), tmp_path / "first")
    model.load_adapter(tmp_path / "second", "second")
    assert outputs_of(model) == NAMES
    model.set_adapter("second")
    assert outputs_of(model) == OTHERS
    model.save_pretrained(tmp_path / "both")
    assert config_of(tmp_path / "both")["fusion_labels"] == NAMES
    assert config_of(tmp_path / "both" / "second")["fusion_labels"] == OTHERS
    base = model.unload()
    assert outputs_of(PeftModel.from_pretrained(base, tmp_path / "first")) == NAMES


def test_what_nobody_named_is_not_saved_and_adapters_without_names_load(tmp_path):
    saved(tmp_path, None)
    assert config_of(tmp_path)["fusion_labels"] is None
    assert outputs_of(PeftModel.from_pretrained(named(OTHERS), tmp_path)) == OTHERS
