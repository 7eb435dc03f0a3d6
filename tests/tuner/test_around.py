"""What stands around peft: transformers' own adapter calls, pipelines, TRL, the hub."""

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, answer, attach, first_head, inputs
from peft import AutoPeftModelForCausalLM, AutoPeftModelForTokenClassification, PeftMixedModel, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from support import disturb
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

from fusion_adapters import FusionConfig
from fusion_adapters.tuner import fusion_layers

FEW = pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5-both", "albert"])


def tokenizer(extra=()):
    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, **{f"w{i}": i for i in range(4, 120)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
    )


def config_of(family, **fields):
    return FusionConfig(**FAMILIES[family].fields(first_head(family), **fields))


@FEW
@pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])
def test_transformers_adds_saves_and_loads_an_adapter(family, lora, tmp_path):
    batch = inputs(family, first_head(family))
    lora_fields = {"r": 4, "target_modules": FAMILIES[family].lora} if lora else {}
    model = FAMILIES[family].build(first_head(family))
    before = answer(model, batch)
    model.add_adapter(config_of(family, **lora_fields), adapter_name="mine")
    assert (answer(model, batch) - before).abs().max() < 1e-6
    disturb(model)
    expected = answer(model, batch)
    assert (expected - before).abs().max() > 1e-4
    model.disable_adapters()
    model.enable_adapters()
    model.save_pretrained(tmp_path)  # of a model with an adapter, transformers writes the adapter alone
    assert not (tmp_path / "model.safetensors").exists()
    again = FAMILIES[family].build(first_head(family))
    again.load_adapter(str(tmp_path), adapter_name="mine")
    torch.testing.assert_close(answer(again, batch), expected, rtol=0, atol=1e-6)
    wrapped = PeftModel.from_pretrained(FAMILIES[family].build(first_head(family)), tmp_path)
    torch.testing.assert_close(answer(wrapped, batch), expected, rtol=0, atol=1e-6)
    again.delete_adapter("mine")
    assert not any(layer.fusions for layer in fusion_layers(again))


@pytest.mark.parametrize(
    ("family", "loader"),
    [("bert", AutoPeftModelForTokenClassification), ("llama", AutoPeftModelForCausalLM)],
)
def test_auto_classes(family, loader, tmp_path):
    batch = inputs(family, first_head(family))
    FAMILIES[family].build(first_head(family)).save_pretrained(tmp_path / "base")
    model = type(FAMILIES[family].build(first_head(family))).from_pretrained(tmp_path / "base")
    model = disturb(attach(family, model=model, lora=family == "llama"))
    model.save_pretrained(tmp_path / "adapter")
    again = loader.from_pretrained(tmp_path / "adapter", **({"num_labels": 5} if family == "bert" else {}))
    torch.testing.assert_close(answer(again, batch), answer(model, batch), rtol=0, atol=1e-6)


def test_what_peft_offers_to_lora_alone_is_refused_in_words(tmp_path):
    model = attach("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Hotswapping only supports LORA"):
        hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(ValueError, match=r"not compatible with the `PeftMixedModel`"):
        get_peft_model(FAMILIES["bert"].build("token"), config_of("bert"), mixed=True)
    with pytest.raises(ValueError, match=r"not supported for mixed models"):
        PeftMixedModel.from_pretrained(FAMILIES["bert"].build("token"), tmp_path)


@pytest.mark.parametrize(("family", "head"), [("vit", "image"), ("whisper", "audio"), ("bert", "sequence")])
def test_a_head_without_a_task_is_not_forgotten_in_silence(family, head):
    spec = FAMILIES[family]
    with pytest.warns(UserWarning, match=r"stays frozen and is not saved.*modules_to_save=\[.*'classifier'\]"):
        get_peft_model(spec.build(head), FusionConfig())
    names = spec.save.get(head, ["classifier"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stays frozen.*")
        get_peft_model(spec.build(head), FusionConfig(modules_to_save=names))
        get_peft_model(FAMILIES["llama"].build("causal"), FusionConfig())


@pytest.mark.parametrize("merged", [False, True], ids=["peft", "base"])
def test_pipelines(merged):
    model = disturb(attach("bert"), scale=0.3)
    model = model.get_base_model() if merged else model
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer())
    found = tagger("w5 w6 w7")
    ids = tokenizer()("w5 w6 w7", return_tensors="pt")
    scores, best = answer(model, dict(ids))[0].softmax(-1).max(-1)
    assert [f["index"] for f in found] == [0, 1, 2]
    assert [f["entity"] for f in found] == [f"LABEL_{i}" for i in best.tolist()]
    torch.testing.assert_close(torch.tensor([float(f["score"]) for f in found]), scores, rtol=1e-4, atol=1e-5)

    writer = disturb(attach("llama"), scale=0.3)
    writer = writer.get_base_model() if merged else writer
    text = pipeline("text-generation", model=writer, tokenizer=tokenizer())
    prompt = tokenizer()("w5 w6 w7", return_tensors="pt")
    expected = writer.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    answered = text("w5 w6 w7", max_new_tokens=4, do_sample=False, return_tensors=True)
    assert answered[0]["generated_token_ids"] == expected[0].tolist()


@pytest.mark.parametrize("form", ["text", "completion", "lora"])
def test_trl_trains_with_the_config_alone(tmp_path, form):
    trl = pytest.importorskip("trl", reason="trl is not installed (extra: dev)")
    model = FAMILIES["llama"].build("causal")
    texts = [" ".join(f"w{4 + (7 * i + j) % 20}" for j in range(12)) for i in range(16)]
    rows = [{"text": text} if form == "text" else {"prompt": text[:18], "completion": text[18:]} for text in texts]
    lora = {"r": 4, "target_modules": FAMILIES["llama"].lora} if form == "lora" else {}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        logging_steps=1, use_cpu=True, max_length=16, bf16=False, eos_token="[EOS]", pad_token="[PAD]",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=FusionConfig(fusion="dwatt", task_type="CAUSAL_LM", **lora),
    )
    assert fusion_layers(trainer.model), "the fusion is not attached"
    assert any(".lora_" in name for name, _ in trainer.model.named_parameters()) == bool(lora)
    row = trainer.train_dataset[0]
    assert form == "text" or -100 in row["labels"], "the prompt has a loss"
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    batch = inputs("llama", "causal")
    again = PeftModel.from_pretrained(FAMILIES["llama"].build("causal"), tmp_path / "adapter")
    torch.testing.assert_close(answer(again, batch), answer(trainer.model, batch), rtol=0, atol=1e-5)


def test_pushing_goes_up_to_the_network_with_a_card_that_says_how_to_load(tmp_path, monkeypatch):
    pushed = {}

    class Hub:
        def create_repo(self, name, **kwargs):
            return type("Url", (), {"repo_id": name})

        def upload_folder(self, folder_path, **kwargs):
            pushed.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir() if p.is_file()})
            raise ConnectionError("no network here")

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    base = FAMILIES["bert"].build("token")
    base.config._name_or_path = base.name_or_path = "somebody/backbone"
    model = attach("bert", model=base, lora=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path / "run"),
            max_steps=1,
            report_to=[],
            use_cpu=True,
            hub_model_id="me/mine",
            hub_token="x",
            push_to_hub=False,
        ),
        train_dataset=[{k: v[0] for k, v in inputs("bert", "token").items()}],
    )
    trainer.train()
    with pytest.raises(ConnectionError, match="no network here"):
        trainer.push_to_hub()
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= pushed.keys()
    assert "model.safetensors" not in pushed
    card = pushed["README.md"].decode()
    fusion = sum(p.numel() for layer in fusion_layers(model) for p in layer.fusions.parameters())
    assert "base_model: somebody/backbone" in card and "library_name: peft" in card
    assert "import fusion_adapters" in card and "dwatt" in card and f"{fusion:,}" in card
    assert json.loads(pushed["adapter_config.json"])["fusion"] == "dwatt"


def test_a_card_is_written_once_and_survives_copies_of_the_model(tmp_path):
    model = attach("bert", lora=True)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    clone = copy.deepcopy(model)
    clone.save_pretrained(tmp_path)
    pickle.loads(pickle.dumps(clone))
    card = (tmp_path / "README.md").read_text()
    assert card.count("## How to load this adapter") == card.count("import fusion_adapters") == 1
    clone.save_pretrained(tmp_path / "later")  # as after a training, whose checkpoints were saves too
    assert "| file |" in (tmp_path / "later" / "README.md").read_text()
    assert clone.create_or_update_model_card.model is clone
