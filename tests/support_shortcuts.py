"""Rows, states and sums for tests of shortcuts, read literally: one row at a time, without padding and without the package's streams."""

import numpy as np
import torch
from support import tiny
from support_cache import pad

from fusion_adapters.backbone.blocks import find_backbones
from fusion_adapters.shortcuts import FitOptions, fit_shortcuts
from fusion_adapters.shortcuts.moments import Moments

VOCABULARY = 120


def rows_of_tokens(count=120, seed=0, labelled=False):
    """Rows of 4 to 14 tokens; with labels every third position has one."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = 4 + (7 * i) % 11
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        row = {"input_ids": ids, "attention_mask": [1] * length}
        if labelled:
            row["labels"] = [ids[p] if (p + i) % 3 == 0 else -100 for p in range(length)]
        rows.append(row)
    return rows


def states_of(model, rows, skip=0):
    """All layer states of all positions but the first `skip` of each row, `(n, d)` by layer: inputs and outputs of the blocks."""
    (backbone,) = find_backbones(model)
    found = {layer: [] for layer in range(backbone.num_layers + 1)}
    taken = {}
    handles = [
        backbone.blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: taken.update({0: args[0] if args else kwargs["hidden_states"]}), with_kwargs=True
        )
    ]
    for number, block in enumerate(backbone.blocks, start=1):
        handles.append(
            block.register_forward_hook(
                lambda block, args, output, number=number: taken.update(
                    {number: output[0] if isinstance(output, tuple) else output}
                )
            )
        )
    model.eval()
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]), attention_mask=torch.tensor([row["attention_mask"]]))
            for layer, state in taken.items():
                found[layer].append(state[0, skip:])
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(states) for layer, states in found.items()}


def moments_of(states, pairs):
    """The sums over given states, in one piece."""
    layer = next(iter(states))
    moments = Moments(states[layer].shape[-1], pairs)
    moments.add(states)
    return moments


def wide(states, layers):
    """States side by side as numpy, `(n, k d)` in float64."""
    return np.concatenate([states[layer].double().numpy() for layer in layers], axis=1)


def fitted(model=None, rows=None, **options):
    """Shortcuts of a tiny decoder."""
    model = tiny("llama", "lm") if model is None else model
    return fit_shortcuts(
        model, rows_of_tokens() if rows is None else rows, pad, FitOptions(**options), progress=False
    ).shortcuts


def close(found, expected, tolerance=1e-6):
    """Whether a float32 tensor equals a float64 array to a share of its largest value."""
    expected = torch.as_tensor(np.ascontiguousarray(expected))
    return float((found.detach().double() - expected).abs().max()) <= tolerance * float(expected.abs().max())
