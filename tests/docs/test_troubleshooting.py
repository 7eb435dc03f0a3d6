"""Every message quoted in docs/troubleshooting.md is the one that is raised, word for word."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES, attach, inputs
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fusion_adapters import FusionConfig, depth_weights
from fusion_adapters.tuner import fusion_layers

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def plain(family="bert", head="token", **settings):
    return FAMILIES[family].build(head, **settings)


def saved(folder):
    attach("bert", "token").save_pretrained(folder)
    return folder


def edited(folder, change):
    path = saved(folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def without_the_plug_in(folder):
    plain().save_pretrained(folder / "base")
    saved(folder / "adapter")
    code = (
        "from peft import PeftModel\nfrom transformers import BertForTokenClassification as Model\n"
        f"PeftModel.from_pretrained(Model.from_pretrained({str(folder / 'base')!r}), {str(folder / 'adapter')!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode
    raise KeyError(result.stderr.strip().splitlines()[-1])


def cut_short(folder):
    path = saved(folder) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    PeftModel.from_pretrained(plain(), folder)


def replica(folder):
    model = attach("bert", "token")
    fusion_layers(model)[0].backbone.root._is_replica = True
    model(**inputs("bert", "token"))


def two_lists(folder):
    model = plain()
    model.bert.encoder.more = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    attach("bert", "token", model=model)


def compiled(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach("bert", "token", model=torch.compile(plain()))


def frozen_head(folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stays frozen.*")
        get_peft_model(plain("vit", "image"), FusionConfig())


def quantised_head(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    from transformers import BitsAndBytesConfig

    plain().save_pretrained(folder)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    attach("bert", "token", model=type(plain()).from_pretrained(folder, quantization_config=eight, device_map={"": "cpu"}))


def block_by_hand(folder):
    model = attach("bert", "token")
    fusion_layers(model)[0].backbone.blocks[0](torch.randn(1, 3, 32))


CASES = {
    "The plug-in was not imported": without_the_plug_in,
    "Another type, width or depth of backbone": lambda f: PeftModel.from_pretrained(plain(num_hidden_layers=3), saved(f)),
    "The same shape, other weights": lambda f: PeftModel.from_pretrained(plain(seed=1), saved(f)),
    "A tensor is missing": lambda f: PeftModel.from_pretrained(
        plain(), edited(f, lambda t: t.pop("base_model.model.bert.layer_fusion.position"))
    ),
    "A tensor is surplus": lambda f: PeftModel.from_pretrained(
        plain(), edited(f, lambda t: t.update({"base_model.model.bert.layer_fusion.extra": torch.ones(2)}))
    ),
    "The file is cut short": cut_short,
    "The blocks are not found": two_lists,
    "The blocks are named wrongly": lambda f: attach("bert", "token", fusion_blocks="encoder.layers"),
    "A stack that is not there": lambda f: attach("bert", "token", fusion_stack="decoder"),
    "Layers out of range": lambda f: attach("bert", "token", fusion_layers=[1, 9]),
    "The head is quantised": quantised_head,
    "A part of the head would be forgotten": lambda f: attach("modernbert", "token", modules_to_save=None),
    "The head has no task": frozen_head,
    "The model carries an adapter already": lambda f: get_peft_model(
        attach("bert", "token"), FusionConfig(task_type="TOKEN_CLS")
    ),
    "Two fusions at once": lambda f: [
        model := attach("bert", "token"),
        model.add_adapter("second", FusionConfig(task_type="TOKEN_CLS")),
        model.base_model.set_adapter(["default", "second"]),
    ],
    "Several adapters in one batch": lambda f: attach("bert", "token").eval()(
        **inputs("bert", "token"), adapter_names=["default", "__base__"]
    ),
    "Merging": lambda f: attach("bert", "token").merge_and_unload(),
    "Weighted sums of adapters": lambda f: attach("bert", "token").add_weighted_adapter(["default"], [1.0], "sum"),
    "Generating with `deeper`": lambda f: attach("llama", "causal", fusion="deeper").generate(
        input_ids=torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False
    ),
    "Blocks that are skipped in training": lambda f: attach(
        "wav2vec2", "audio", lora=True, model=plain("wav2vec2", "audio", layerdrop=0.1)
    ),
    "Blocks run outside of the backbone": block_by_hand,
    "`torch.nn.DataParallel`": replica,
    "Compiled too early": compiled,
    "No weights over depth": lambda f: depth_weights(attach("bert", "token", fusion="concat"), **inputs("bert", "token")),
}


def sections():
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    return dict(re.findall(r"^### (.*?)\n+```text\n(.*?)```", text, flags=re.M | re.S))


def message(case, folder):
    with pytest.raises((ValueError, RuntimeError, KeyError, UserWarning)) as caught:
        CASES[case](folder)
    return f"{type(caught.value).__name__}: {caught.value.args[0]}"


def words(text):
    return re.sub(r"'/[^']*'", "'FOLDER'", " ".join(text.split()))


@pytest.mark.parametrize("case", CASES)
def test_the_page_quotes_what_is_raised(case, tmp_path, request):
    said = words(message(case, tmp_path))
    assert words(sections().get(case, "")) == said


def test_the_page_has_no_other_messages():
    assert list(sections()) == list(CASES)
