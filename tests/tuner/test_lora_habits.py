"""What people who know peft's LoRA do with an adapter, and what must not differ from LoRA alone."""

import copy
import shutil
import warnings

import pytest
import torch
from families import answer, attach, first_head, inputs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import LORA, attached, batch, disturb, layer_of, logits, tiny
from torch import nn
from transformers import BertConfig, BertPreTrainedModel, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers.models.bert.modeling_bert import BertModel

from fusion_adapters import FusionConfig
from fusion_adapters.runs.pretrained import locate
from fusion_adapters.runs.recipe import BackboneRecipe
from fusion_adapters.tuner.counts import count_trainable

NEW = 7  # tokens


def grown(family="llama", head="lm"):
    torch.manual_seed(0)
    model = tiny(family, head)
    model.resize_token_embeddings(model.config.vocab_size + NEW)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [120, 121]}, "modules_to_save": ["lm_head"]},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("save", ["auto", True])
def test_a_vocabulary_that_grew(fields, save, tmp_path):
    model = disturb(attached("llama", "lm", model=grown(), **fields, **LORA["llama"]))
    expected = logits(model, "lm")
    model.save_pretrained(tmp_path, save_embedding_layers=save)
    again = PeftModel.from_pretrained(grown(), tmp_path)
    torch.testing.assert_close(logits(again, "lm"), expected, rtol=0, atol=0)


def test_a_vocabulary_that_grew_and_the_best_model(tmp_path):
    model = attached("llama", "lm", model=grown(), modules_to_save=["embed_tokens", "lm_head"])
    rows = [{k: v[i] for k, v in batch("lm").items()} for i in range(2)] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def mixtral():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_local_experts": 4, "vocab_size": 120}
    return MixtralForCausalLM(MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "w1", "w2", "w3"], ["w1", "w2", "w3"], ["q_proj"]], ids=str)
def test_lora_on_experts_is_that_of_lora(targets, tmp_path):
    lora = get_peft_model(mixtral(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    config = FusionConfig(task_type="CAUSAL_LM", fusion="last", r=4, target_modules=targets)
    ours = get_peft_model(mixtral(), config)
    theirs = {n: p.shape for n, p in lora.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in ours.named_parameters() if p.requires_grad} == theirs

    model = disturb(get_peft_model(mixtral(), FusionConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)))
    expected = logits(model, "lm")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(mixtral(), tmp_path), "lm"), expected)


def test_a_budget_for_lora_on_experts():
    fields = {"task_type": "CAUSAL_LM", "fusion": "last", "target_modules": ["q_proj", "w1", "w2", "w3"]}
    model = get_peft_model(mixtral(), FusionConfig(**fields, fusion_budget=60_000))
    rank = model.peft_config["default"].r
    assert rank > 1 and 0.8 * 60_000 < count_trainable(model)["lora"] <= 60_000
    same = get_peft_model(mixtral(), LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=fields["target_modules"]))
    assert count_trainable(model)["lora"] == sum(p.numel() for p in same.parameters() if p.requires_grad)


def test_lora_where_mamba_cannot_have_it():
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        attach("mamba", target_modules=["out_proj"], r=2)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {"modules_to_save": ["query"]}),
        ("bert", {"modules_to_save": ["value"]}),
        ("llama", {"fusion": "mlp", "modules_to_save": ["mlp"]}),
        ("bert", {"fusion": "deeper", "fusion_copy_last": True, "modules_to_save": ["LayerNorm"]}),
    ],
    ids=str,
)
def test_a_module_to_save_whose_name_a_fusion_has_too(family, fields, tmp_path):
    with pytest.raises(ValueError, match=r"is also the end of the name of a part of the fusion .*self\."):
        attached(family, **fields)
    with pytest.raises(ValueError, match="part of the fusion"):  # of the adapter that is there already
        attached(family, **{**fields, "modules_to_save": None}).add_adapter(
            "other", FusionConfig(task_type="TOKEN_CLS", fusion="last", modules_to_save=fields["modules_to_save"])
        )
    if fields["modules_to_save"] == ["query"]:
        model = disturb(attached(family, modules_to_save=["self.query"]))
        expected = logits(model)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny(family), tmp_path)), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_conversion_of_a_mutated_start_carries_the_fusion(init, tmp_path):
    model = attached("bert", init_lora_weights=init, **LORA["bert"])
    model.save_pretrained(tmp_path / "initial")
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    tensors = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    assert any("layer_fusion" in name for name in tensors) and any("classifier" in name for name in tensors)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path / "converted")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


def test_the_config_of_a_loaded_adapter_makes_another_without_its_folder(tmp_path):
    disturb(attached("bert")).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny("bert"), tmp_path / "adapter", is_trainable=True)
    shutil.rmtree(tmp_path / "adapter")
    model.add_adapter("reference", model.peft_config["default"])
    model.add_adapter("copy", copy.deepcopy(model.peft_config["default"]))
    assert {"reference", "copy"} < set(model.peft_config)


class Tagger(BertPreTrainedModel):
    """A class of somebody's own: another argument, another name for the backbone's place."""

    config_class = BertConfig

    def __init__(self, config, num_tags):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.tags = nn.Linear(config.hidden_size, num_tags)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return self.tags(self.bert(input_ids, **kwargs).last_hidden_state)


class Around(nn.Module):
    """No model of transformers, with one inside."""

    def __init__(self):
        super().__init__()
        self.inner = tiny("bert").bert

    def forward(self, input_ids):
        return self.inner(input_ids).last_hidden_state


@pytest.mark.parametrize("make", [lambda: Tagger(tiny("bert").config, 3), Around], ids=["subclass", "module"])
@pytest.mark.parametrize("budget", [9000, "lora:r=16"])
def test_budgets_of_classes_of_ones_own(make, budget):
    blocks = {"fusion_blocks": "inner.encoder.layer"} if make is Around else {}
    fields = {"r": 2, "target_modules": ["query", "value"], **blocks}
    model = make()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model = get_peft_model(model, FusionConfig(fusion_budget=budget, **fields))
    allowed = 9000 if budget == 9000 else 4 * 2 * 16 * 2 * 32
    found = count_trainable(model)
    assert 0.8 * allowed < found["fusion"] + found["lora"] <= allowed
    assert all(torch.equal(p, before[n]) for n, p in model.get_base_model().named_parameters() if n in before)


def test_a_budget_with_a_start_that_wants_even_ranks():
    model = attached("bert", fusion="last", fusion_budget=5000, init_lora_weights="orthogonal", target_modules=["query"])
    assert 0 < count_trainable(model)["lora"] <= 5000


def test_modes_follow_the_adapter_that_is_chosen():
    model = attached("bert", lora_dropout=0.5, **LORA["bert"])
    model.add_adapter("alone", FusionConfig(task_type="TOKEN_CLS"))
    root = layer_of(model).backbone.root
    model.train()
    assert root.encoder.layer[0].training
    model.set_adapter("alone")
    assert not root.encoder.layer[0].training and layer_of(model).training
    model.set_adapter("default")
    assert root.encoder.layer[0].training and root.encoder.layer[0].attention.self.query.lora_dropout["default"].training
    model.eval()
    model.set_adapter("alone")
    assert not any(module.training for module in model.modules())
    model.add_adapter("third", FusionConfig(task_type="TOKEN_CLS"))
    assert not any(m.training for n, m in model.named_modules() if ".third" not in n)


def test_noise_on_frozen_embeddings_is_told():
    model = attached("bert")
    model.get_input_embeddings().neftune_noise_alpha = 5
    with pytest.warns(UserWarning, match="neftune_noise_alpha adds no noise here"):
        model.train()
    model = attached("bert", **LORA["bert"])
    model.get_input_embeddings().neftune_noise_alpha = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.train()


def stop(*_):
    raise RuntimeError("stop")


@pytest.mark.parametrize("family", ["bert", "llama", "albert", "mamba"])
def test_forward_called_past_the_hooks(family):
    """As sentence-transformers does."""
    model = disturb(attach(family, fusion_layers=[0, 1, -1]), scale=0.3).eval()
    given = {k: v for k, v in inputs(family, first_head(family)).items() if k in ("input_ids", "attention_mask")}
    backbone = layer_of(model).backbone
    with torch.no_grad():
        expected = backbone.root(**given).last_hidden_state
        with model.disable_adapter():
            plain = backbone.root.forward(**given).last_hidden_state
        assert (plain - expected).abs().max() > 1e-3
        for fails in (False, True, False):
            if fails:
                handle = backbone.blocks[-1].register_forward_pre_hook(stop)
                with pytest.raises(RuntimeError, match="stop"):
                    backbone.root.forward(**given)
                handle.remove()
            torch.testing.assert_close(backbone.root.forward(**given).last_hidden_state, expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(answer(model, inputs(family, first_head(family))).isnan().any(), torch.tensor(False))
    assert layer_of(model).taps.open_calls == 0


def test_sentence_transformers_encodes_with_an_adapter(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder, _ = locate(BackboneRecipe(model="sentence-transformers/all-MiniLM-L6-v2"))
    if folder.startswith("sentence-transformers/"):
        pytest.skip("the package with the MiniLM weights is not installed (extra: demo)")
    model = library.SentenceTransformer(folder)
    before = torch.as_tensor(model.encode(["A short text."]))
    model.add_adapter(FusionConfig())
    torch.testing.assert_close(torch.as_tensor(model.encode(["A short text."])), before, rtol=0, atol=1e-5)
    disturb(model)
    assert (torch.as_tensor(model.encode(["A short text."])) - before).abs().max() > 1e-3
