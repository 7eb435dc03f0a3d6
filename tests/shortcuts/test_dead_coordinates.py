"""r2 where a coordinate of the state never varies: it says nothing, and must not rule the mean."""

import math

import torch
from sklearn.metrics import r2_score
from support import tiny
from support_text import tokenizer
from transformers import DataCollatorWithPadding

from fusion_adapters.shortcuts import FitOptions, fit_shortcuts
from fusion_adapters.shortcuts.evaluate import evaluate_shortcuts


def test_r2_is_a_mean_over_the_coordinates_that_vary():
    model = tiny("bert", "sequence")
    norm = model.bert.encoder.layer[-1].output.LayerNorm
    norm.weight.data[3], norm.weight.data[5] = 1e-30, 0.0
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(1, 50, (9,), generator=generator).tolist()} for _ in range(30)]
    rows = [{**row, "attention_mask": [1] * 9} for row in rows]
    collator = DataCollatorWithPadding(tokenizer())
    fitted = fit_shortcuts(model, rows, collator, FitOptions(sources=[2], fused=None, ridge=1e-3), progress=False)
    scores = evaluate_shortcuts(model, fitted.shortcuts, rows, collator, progress=False)
    with torch.no_grad():
        ids = torch.tensor([row["input_ids"] for row in rows])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    wanted, state = hidden[4].flatten(0, 1), hidden[2].flatten(0, 1)
    alive = [i for i in range(wanted.shape[1]) if i not in (3, 5)]
    assert len(scores) == 2
    for score in scores:
        found = state if score.kind == "identity" else fitted.shortcuts.get(2)({2: state})
        assert math.isclose(score.r2, r2_score(wanted[:, alive], found[:, alive]), rel_tol=1e-4)
