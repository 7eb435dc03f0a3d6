"""The model families that the suite covers: tiny random models of each, their heads, inputs and LoRA targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import get_peft_model

from fusion_adapters import FusionConfig

WIDTH, DEPTH, VOCABULARY, LABELS, LENGTH = 32, 4, 120, 5, 9
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**COMMON, "vocab_size": VOCABULARY, **SPECIAL}
DECODER = {**TEXT, "num_key_value_heads": 2}
STACKS = {
    "d_model": WIDTH,
    "encoder_layers": DEPTH,
    "decoder_layers": DEPTH - 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
SOUND = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "layerdrop": 0.0,
    "apply_spec_augment": False,  # random masks over time, in training
}
# what peft calls the task of a head; None where it has no name
TASKS = {
    "token": "TOKEN_CLS",
    "sequence": "SEQ_CLS",
    "qa": "QUESTION_ANS",
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "masked": None,
    "image": None,
    "audio": None,
    "none": "FEATURE_EXTRACTION",
}
SUFFIX = {
    "token": "ForTokenClassification",
    "sequence": "ForSequenceClassification",
    "qa": "ForQuestionAnswering",
    "causal": "ForCausalLM",
    "masked": "ForMaskedLM",
    "image": "ForImageClassification",
    "seq2seq": "ForConditionalGeneration",
}


@dataclass
class Family:
    """A family of models.

    `classes` maps a head to a class of transformers; `save` names heads that peft does not know by itself.
    """

    config: str
    settings: dict[str, Any]
    classes: dict[str, str]
    lora: list[str]
    save: dict[str, list[str]] = field(default_factory=dict)
    stack: str | None = None
    unquantised: tuple[str, ...] = ()  # what the family cannot have in 8 bits

    def build(self, head: str, seed: int = 0, **settings: Any) -> transformers.PreTrainedModel:
        """A tiny random model in evaluation mode; the same weights for the same arguments."""
        torch.manual_seed(seed)
        labels = 2 if head == "qa" else LABELS  # of a question: start and end
        config = getattr(transformers, self.config)(**{**self.settings, "num_labels": labels, **settings})
        return getattr(transformers, self.classes[head])(config).eval()

    def fields(self, head: str, **fields: Any) -> dict[str, Any]:
        """Fields of a FusionConfig for a head."""
        stack = {"fusion_stack": self.stack} if self.stack and head not in ("token", "audio") else {}
        save = {"modules_to_save": self.save[head]} if head in self.save else {}
        task = None if "Whisper" in self.config else TASKS[head]  # peft's seq2seq class asks for token ids
        return {"task_type": task, **stack, **save, **fields}


def _classes(prefix: str, *heads: str, **others: str) -> dict[str, str]:
    return {**{head: prefix + SUFFIX[head] for head in heads}, **others}


ENCODER_HEADS = ("token", "sequence", "qa", "masked")
DECODER_HEADS = ("causal", "sequence", "token")

FAMILIES: dict[str, Family] = {
    "bert": Family("BertConfig", TEXT, _classes("Bert", *ENCODER_HEADS), ["query", "value"]),
    "roberta": Family("RobertaConfig", TEXT, _classes("Roberta", *ENCODER_HEADS), ["query", "value"]),
    "xlm-roberta": Family("XLMRobertaConfig", TEXT, _classes("XLMRoberta", *ENCODER_HEADS), ["query", "value"]),
    "distilbert": Family(
        "DistilBertConfig",
        {"dim": WIDTH, "n_layers": DEPTH, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCABULARY},
        _classes("DistilBert", *ENCODER_HEADS),
        ["q_lin", "v_lin"],
        save={"sequence": ["pre_classifier", "classifier"]},
    ),
    "electra": Family("ElectraConfig", {**TEXT, "embedding_size": 16}, _classes("Electra", *ENCODER_HEADS), ["query", "value"]),
    "deberta-v2": Family(
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
        _classes("DebertaV2", *ENCODER_HEADS),
        ["query_proj", "value_proj"],
        save={"sequence": ["pooler", "classifier"]},
    ),
    "modernbert": Family(
        "ModernBertConfig",
        {**TEXT, "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        _classes("ModernBert", *ENCODER_HEADS),
        ["Wqkv"],
        save={"token": ["head", "classifier"], "sequence": ["head", "classifier"], "qa": ["head", "classifier"]},
    ),
    "albert": Family("AlbertConfig", {**TEXT, "embedding_size": 16}, _classes("Albert", *ENCODER_HEADS), ["query", "value"]),
    "gpt2": Family(
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY, **SPECIAL},
        {"causal": "GPT2LMHeadModel", **_classes("GPT2", "sequence", "token")},
        ["c_attn"],
    ),
    "opt": Family(
        "OPTConfig",
        {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64},
        _classes("OPT", "causal", "sequence", "qa"),
        ["q_proj", "v_proj"],
    ),
    "gpt-neox": Family("GPTNeoXConfig", TEXT, _classes("GPTNeoX", *DECODER_HEADS), ["query_key_value"]),
    "llama": Family("LlamaConfig", DECODER, _classes("Llama", *DECODER_HEADS, "qa"), ["q_proj", "v_proj"]),
    "mistral": Family("MistralConfig", DECODER, _classes("Mistral", *DECODER_HEADS), ["q_proj", "v_proj"]),
    "qwen2": Family("Qwen2Config", DECODER, _classes("Qwen2", *DECODER_HEADS), ["q_proj", "v_proj"]),
    "qwen3": Family("Qwen3Config", {**DECODER, "head_dim": 8}, _classes("Qwen3", *DECODER_HEADS), ["q_proj", "v_proj"]),
    "gemma2": Family(
        "Gemma2Config",
        {**DECODER, "head_dim": 8, "sliding_window": 8},
        _classes("Gemma2", *DECODER_HEADS),
        ["q_proj", "v_proj"],
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        {**DECODER, "head_dim": 8, "sliding_window": 8},
        {"causal": "Gemma3ForCausalLM", "sequence": "Gemma3TextForSequenceClassification"},
        ["q_proj", "v_proj"],
    ),
    "phi3": Family("Phi3Config", DECODER, _classes("Phi3", *DECODER_HEADS), ["qkv_proj"]),
    "mixtral": Family(
        "MixtralConfig",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        _classes("Mixtral", *DECODER_HEADS),
        ["q_proj", "v_proj"],
    ),
    "mamba": Family(
        "MambaConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "state_size": 4, "vocab_size": VOCABULARY, **SPECIAL},
        _classes("Mamba", "causal"),
        ["in_proj"],
        unquantised=("dt_proj", "x_proj"),
    ),
    "t5": Family(
        "T5Config",
        {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": DEPTH, "num_decoder_layers": DEPTH - 1, "num_heads": 4,
         "vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
        _classes("T5", "seq2seq", "token", "sequence"),
        ["q", "v"],
        save={"sequence": ["classification_head"]},
    ),
    "bart": Family(
        "BartConfig",
        {**STACKS, "max_position_embeddings": 64, "forced_eos_token_id": None},
        _classes("Bart", "seq2seq", "sequence", "qa"),
        ["q_proj", "v_proj"],
        save={"sequence": ["classification_head"]},
    ),
    "vit": Family(
        "ViTConfig", {**COMMON, "image_size": 16, "patch_size": 8}, _classes("ViT", "image"), ["q_proj", "v_proj"],
        save={"image": ["classifier"]},
    ),
    "dinov2": Family(
        "Dinov2Config", {**COMMON, "mlp_ratio": 2, "image_size": 16, "patch_size": 8}, _classes("Dinov2", "image"),
        ["q_proj", "v_proj"], save={"image": ["classifier"]},
    ),
    "wav2vec2": Family(
        "Wav2Vec2Config", {**COMMON, **SOUND, "vocab_size": VOCABULARY}, {"audio": "Wav2Vec2ForSequenceClassification"},
        ["q_proj", "v_proj"], save={"audio": ["projector", "classifier"]},
    ),
    "hubert": Family(
        "HubertConfig", {**COMMON, **SOUND, "vocab_size": VOCABULARY}, {"audio": "HubertForSequenceClassification"},
        ["q_proj", "v_proj"], save={"audio": ["projector", "classifier"]},
    ),
    "whisper": Family(
        "WhisperConfig",
        {**STACKS, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "classifier_proj_size": 16},
        {"audio": "WhisperForAudioClassification", "seq2seq": "WhisperForConditionalGeneration"},
        ["q_proj", "v_proj"], save={"audio": ["projector", "classifier"]},
    ),
}  # fmt: skip
# the same families with a fusion in the other stack, or in both
for name in ("t5", "bart"):
    for stack in ("encoder", "both"):
        base = FAMILIES[name]
        FAMILIES[f"{name}-{stack}"] = Family(
            base.config, base.settings, {"seq2seq": base.classes["seq2seq"]}, base.lora, stack=stack
        )
GRID = [(family, head) for family, f in FAMILIES.items() for head in f.classes]
GENERATING = [(family, head) for family, head in GRID if head in ("causal", "seq2seq")]


def inputs(family: str, head: str, seed: int = 0, padding: str = "right") -> dict[str, torch.Tensor]:
    """A batch of two for a head, labels included; of texts, the second is two tokens shorter than the first."""
    generator = torch.Generator().manual_seed(seed)
    if head == "image":
        labels = torch.randint(0, LABELS, (2,), generator=generator)
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": labels}
    if family == "whisper":
        result = {"input_features": torch.randn(2, 8, 32, generator=generator)}
        shape = (2,) if head == "audio" else (2, 6)
        return {**result, "labels": torch.randint(0, LABELS, shape, generator=generator)}
    if head == "audio":
        labels = torch.randint(0, LABELS, (2,), generator=generator)
        return {"input_values": torch.randn(2, 400, generator=generator), "labels": labels}
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, -1] = ids[1, -3] = SPECIAL["eos_token_id"]
    ids[1, -2:] = mask[1, -2:] = 0
    if padding == "left":
        ids[1], mask[1] = ids[1].roll(2), mask[1].roll(2)
    result = {"input_ids": ids, "attention_mask": mask}
    if head == "sequence":
        return {**result, "labels": torch.randint(0, LABELS, (2,), generator=generator)}
    if head == "qa":
        return {**result, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    if head == "token":
        return {**result, "labels": torch.randint(0, LABELS, ids.shape, generator=generator).masked_fill(mask == 0, -100)}
    return {**result, "labels": ids.masked_fill(mask == 0, -100)}


def answer(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits (of questions: start and end) of a model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])


def first_head(family: str) -> str:
    """The head that stands for a family where one is enough."""
    return next(iter(FAMILIES[family].classes))


def attach(family: str, head: str | None = None, lora: bool = False, model=None, name: str = "default", **fields):
    """A tiny model of a family with an adapter."""
    spec, head = FAMILIES[family], head or first_head(family)
    if lora:
        fields = {"r": 4, "target_modules": spec.lora, "lora_dropout": 0.0, **fields}
    model = spec.build(head) if model is None else model
    return get_peft_model(model, FusionConfig(**spec.fields(head, **fields)), adapter_name=name)
