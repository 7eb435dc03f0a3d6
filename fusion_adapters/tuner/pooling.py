"""Heads that `fusion_pool="mean"` goes with: those that read one position of a text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..backbone.blocks import Backbone
from ..backbone.families import is_causal_lm, output_embeddings, reads_last_token
from .config import FusionConfig
from .layer import FusionLayer

# Of peft's tasks and of classes of transformers, those whose heads answer at every position.
_TASKS = ("TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM")
_CLASSES = (
    *("ForTokenClassification", "ForQuestionAnswering", "LMHead", "ForConditionalGeneration", "ForCTC"),
    *("FrameClassification", "Segmentation"),
)


def check_pool(model: nn.Module, backbones: Sequence[Backbone], config: FusionConfig) -> None:
    """Raises ValueError if an adapter with `fusion_pool="mean"` is to feed a head that reads every position, or an encoder's decoder."""
    if config.fusion_pool is None:
        return
    kind = type(model).__name__
    task = getattr(config.task_type, "value", config.task_type) or ""
    every = task in _TASKS or any(name in kind for name in _CLASSES)
    if every or is_causal_lm(model) or output_embeddings(model) is not None:
        raise ValueError(
            f"fusion_pool='mean' puts means over the text in the place of the states of its tokens, and {kind} answers at every position: "
            "neighbours would get nearly the same answer. Use it with a head over whole texts (AutoModelForSequenceClassification), or "
            "leave fusion_pool unset."
        )
    if getattr(getattr(model, "config", None), "is_decoder", False) and backbones[0].causal and not reads_last_token(model):
        raise ValueError(
            f"fusion_pool='mean' is a running mean in a causal backbone (is_decoder), and the head of {kind} reads the first token, where "
            "nothing has been read yet. Load the model without is_decoder, or leave fusion_pool unset."
        )
    if any(backbone.stack == "encoder" for backbone in backbones):
        raise ValueError(
            f"fusion_pool='mean' would put one mean in the place of all states of an encoder, and what comes after it in {kind} reads "
            "each of them. Use fusion_stack='decoder' where there is one, or leave fusion_pool unset."
        )


def reads_means(model: nn.Module, layer: FusionLayer) -> bool:
    """Whether of a text's layer states the model reads one mean over all of its positions, and nothing else.

    The mean is the same at every position of a bidirectional backbone. In a decoder it stands at the last real token, which the head
    must be known to read.
    """
    fusion = layer.active_fusion
    if fusion is None or not fusion.pools or fusion.mixes_positions:
        return False
    return not layer.backbone.causal or reads_last_token(model)
