"""The mean weights over depth by label: which layers a fusion reads, for cards and the figures of comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..tasks.base import IGNORED
from ..tuner import fusion_layers
from .evaluation import Evaluation
from .trainers import labelled_logits


def depth_by_label(
    model: nn.Module, trainer: Any, evaluation: Evaluation
) -> tuple[dict[str, list[float]] | None, list[int]]:
    """The mean weight that tokens of each label give each layer, over heads and development data; and the layers.

    None for a fusion without weights. The labels are those of `Task.depth_labels`.
    """
    task, labels = evaluation.task, evaluation.task.depth_labels(evaluation.labels)
    layers = fusion_layers(model)
    fusion = layers[-1].active_fusion if layers else None
    if fusion is None or not fusion.has_weights or fusion.mixes_positions:
        return None, []
    totals = torch.zeros(len(labels), len(fusion.layers))
    counts = torch.zeros(len(labels))
    model.eval()
    for batch in trainer.get_eval_dataloader(evaluation.dataset):
        with layers[-1].recorded() as found, torch.no_grad():
            if task.vocabulary_head:  # logits of a vocabulary at every position would fill the memory
                labelled_logits(model, batch, predicts_next=task.predicts_next)
            else:
                model(**batch)
        weights = found[-1].cpu()
        weights = weights if weights.dim() == 3 else weights.mean(2)  # (B, T, N), or (1, tokens, N) from a cache
        gold = task.depth_groups(batch["labels"].cpu(), batch["input_ids"].shape).flatten()
        if weights.shape[:2] != batch["input_ids"].shape:
            gold = gold[batch["layer_states"]["positions"].cpu()]
        elif "attention_mask" in batch:
            gold = torch.where(batch["attention_mask"].flatten().cpu().bool(), gold, IGNORED)
        known = gold != IGNORED
        totals.index_add_(0, gold[known], weights.flatten(0, 1)[known].float())
        counts.index_add_(0, gold[known], torch.ones(int(known.sum())))
    means = {label: (totals[i] / counts[i]).tolist() for i, label in enumerate(labels) if counts[i] > 0}
    return {label: [round(v, 5) for v in weights] for label, weights in means.items()}, list(fusion.layers)
