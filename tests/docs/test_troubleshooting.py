"""Every message quoted in docs/troubleshooting.md is the one that is raised, word for word."""

import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES, attach, inputs
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support_cache import cached, some_rows

from fusion_adapters import FusionConfig, LayerStateCache, ManyAdapters, depth_weights
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
    kind, _, said = result.stderr.strip().splitlines()[-1].partition(": ")
    assert kind == "KeyError"
    raise KeyError(said)


def cut_short(folder):
    path = saved(folder) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    PeftModel.from_pretrained(plain(), folder)


def switched_meanwhile():
    model = attach("bert", "token", lora=True)
    model.add_adapter("second", model.peft_config["default"])

    def switch(*_):
        thread = threading.Thread(target=model.set_adapter, args=("second",))
        thread.start()
        thread.join()

    fusion_layers(model)[0].backbone.blocks[1].register_forward_pre_hook(switch)
    model.eval()(**inputs("bert", "token"))


def other_names(folder):
    def named(*labels):
        model = plain(num_labels=2)
        model.config.id2label, model.config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
        return model

    attach("bert", "token", model=named("O", "B-PER")).save_pretrained(folder)
    PeftModel.from_pretrained(named("B-PER", "O"), folder)


def replica(folder):
    model = attach("bert", "token")
    fusion_layers(model)[0].backbone.root._is_replica = True
    model(**inputs("bert", "token"))


def two_lists(folder):
    model = plain()
    model.bert.encoder.more = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    attach("bert", "token", model=model)


def cast(folder):
    model = attach("bert", "token", model=plain()).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.train()


def fewer_blocks(folder):
    model = attach("llama", "token")
    model.config.num_hidden_layers = 2
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        model(**inputs("llama", "token"))


def compiled(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach("bert", "token", model=torch.compile(plain()))


def frozen_head(folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stays frozen.*")
        get_peft_model(plain("vit", "image"), FusionConfig())


def headless(folder):
    plain("bert", "masked").bert.save_pretrained(folder)
    get_peft_model(type(plain("bert", "masked")).from_pretrained(folder), FusionConfig())


def quantised_head(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    from transformers import BitsAndBytesConfig

    plain().save_pretrained(folder)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    attach("bert", "token", model=type(plain()).from_pretrained(folder, quantization_config=eight, device_map={"": "cpu"}))


def block_by_hand(folder):
    model = attach("bert", "token")
    fusion_layers(model)[0].backbone.blocks[0](torch.randn(1, 3, 32))


def opened_by_another(folder, seed, layers):
    cached(attach("bert", "token", fusion_layers=[2, 3, 4]), some_rows(2), folder)
    LayerStateCache(folder, attach("bert", "token", model=plain(seed=seed), fusion_layers=layers))


def begun_elsewhere(folder):
    backbone = attach("llama", "sequence", fusion_pool="mean").get_base_model().model
    begun = backbone(input_ids=torch.tensor([[1, 5, 6]]), use_cache=True).past_key_values
    backbone(input_ids=torch.tensor([[7]]), past_key_values=begun)


def begun_lower(folder):
    model = attach("llama", "token", fusion_depth=2)
    backbone = model.get_base_model().model
    begun = backbone(input_ids=torch.tensor([[1, 5, 6]]), use_cache=True).past_key_values
    with model.disable_adapter():
        backbone(input_ids=torch.tensor([[7]]), past_key_values=begun)


# the heading of each message in the page, words of the message itself
CASES = {
    "KeyError: 'FUSION'": without_the_plug_in,
    "The adapter was made for another backbone": lambda f: PeftModel.from_pretrained(plain(num_hidden_layers=3), saved(f)),
    "The adapter was made for a backbone of the same shape but with other weights": lambda f: PeftModel.from_pretrained(
        plain(seed=1), saved(f)
    ),
    "The adapter was made for a backbone of the same shape but with another configuration": lambda f: (
        PeftModel.from_pretrained(plain(layer_norm_eps=1e-6), saved(f))
    ),
    "... tensors are missing": lambda f: PeftModel.from_pretrained(
        plain(), edited(f, lambda t: t.pop("base_model.model.bert.layer_fusion.position"))
    ),
    "... have no place in the model": lambda f: PeftModel.from_pretrained(
        plain(), edited(f, lambda t: t.update({"base_model.model.bert.layer_fusion.extra": torch.ones(2)}))
    ),
    "The weights of the adapter in 'FOLDER' are not those that it was saved with": lambda f: PeftModel.from_pretrained(
        plain(), edited(f, lambda t: t["base_model.model.bert.layer_fusion.position"].add_(1))
    ),
    "The options in adapter_config.json of 'FOLDER' are not those that the adapter was saved with": lambda f: [
        path := saved(f) / "adapter_config.json",
        path.write_text(path.read_text().replace('"fusion_heads": 8', '"fusion_heads": 4')),
        PeftModel.from_pretrained(plain(), f),
    ],
    "The weights of the adapter in 'FOLDER' cannot be read": cut_short,
    "... With these names its answers would mean something else": other_names,
    "... could not be determined: one list of blocks is wanted": two_lists,
    "... does not name a list of blocks": lambda f: attach("bert", "token", fusion_blocks="encoder.layers"),
    "... is not an encoder-decoder, its blocks are one stack": lambda f: attach("bert", "token", fusion_stack="decoder"),
    "... out of range. A backbone of 4 blocks has the layer states": lambda f: attach("bert", "token", fusion_layers=[1, 9]),
    "... was quantised with the backbone": quantised_head,
    "... would stay frozen and would not be saved": lambda f: attach("modernbert", "token", modules_to_save=None),
    "... stays frozen and is not saved with the adapter": frozen_head,
    "The checkpoint of ... lacks": headless,
    "fusion_pool='mean' puts means over the text in the place of the states of its tokens": lambda f: attach(
        "bert", "token", fusion_pool="mean"
    ),
    "... was made for something else": lambda f: opened_by_another(f, seed=1, layers=[2, 3, 4]),
    "... does not hold": lambda f: opened_by_another(f, seed=0, layers=None),
    "The model is a PeftModel already": lambda f: get_peft_model(
        attach("bert", "token"), FusionConfig(task_type="TOKEN_CLS")
    ),
    "... adapters with a fusion cannot be active together": lambda f: [
        model := attach("bert", "token"),
        model.add_adapter("second", FusionConfig(task_type="TOKEN_CLS")),
        model.base_model.set_adapter(["default", "second"]),
    ],
    "Another thread switched, disabled or deleted an adapter": lambda f: switched_meanwhile(),
    "adapter_names mixes adapters that stop at different blocks": lambda f: [
        model := attach("bert", "token"),
        model.add_adapter("lower", FusionConfig(task_type="TOKEN_CLS", fusion_depth=2)),
        model.eval()(**inputs("bert", "token"), adapter_names=["default", "lower"]),
    ],
    "... holds LoRA, which changes the blocks": lambda f: ManyAdapters(attach("bert", "token", lora=True)),
    "... is attached to another backbone than the others": lambda f: ManyAdapters(
        attach("bert", "token"), get_peft_model(plain(seed=1), FusionConfig(task_type="TOKEN_CLS"), adapter_name="second")
    ),
    "... cannot be folded into the backbone's weights and would be lost": lambda f: attach(
        "bert", "token"
    ).merge_and_unload(),
    "add_weighted_adapter combines LoRA matrices": lambda f: attach("bert", "token").add_weighted_adapter(
        ["default"], [1.0], "sum"
    ),
    "... where its own blocks cannot see them": lambda f: attach("llama", "causal", fusion="deeper").generate(
        input_ids=torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False
    ),
    "fusion_pool='mean' takes means over the positions of a text": begun_elsewhere,
    "... was written in a call of an adapter with fusion_depth=": begun_lower,
    "The backbone skips each block with probability": lambda f: attach(
        "wav2vec2", "audio", lora=True, model=plain("wav2vec2", "audio", layerdrop=0.1)
    ),
    "A block of the backbone ran outside of a call of the backbone": block_by_hand,
    "torch.nn.DataParallel copies the backbone to other devices, but not the fusion": replica,
    "The model was compiled before the adapter was attached": compiled,
    "... gives no weights over depth": lambda f: depth_weights(
        attach("bert", "token", fusion="concat"), **inputs("bert", "token")
    ),
    "... tensors of the fusion of the adapter 'default' that train are bfloat16": cast,
    "The backbone's configuration names": fewer_blocks,
}


def sections():
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    return dict(re.findall(r"^### (.*?)\n+```text\n(.*?)```", text, flags=re.M | re.S))


def message(case, folder):
    with pytest.raises((ValueError, RuntimeError, KeyError, UserWarning)) as caught:
        CASES[case](folder)
    return f"{type(caught.value).__name__}: {caught.value.args[0]}"


def words(text):
    return re.sub(r"\b[0-9a-f]{16}\b", "HASH", re.sub(r"'/[^']*'", "'FOLDER'", " ".join(text.split())))


@pytest.mark.parametrize("case", CASES)
def test_the_page_quotes_what_is_raised(case, tmp_path, request):
    said = words(message(case, tmp_path))
    assert all(part in said for part in case.split("..."))
    assert words(sections().get(case, "")) == said


def test_the_page_has_no_other_messages():
    assert list(sections()) == list(CASES)
