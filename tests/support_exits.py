"""Tiny models, shortcuts and slow references for early exit."""

from __future__ import annotations

import torch
from families import DEPTH, FAMILIES, WIDTH, inputs

from fusion_adapters.backbone.record import recorded, run
from fusion_adapters.shortcuts import FUSED, ExitOptions, Readout, Shortcut, ShortcutSet
from fusion_adapters.shortcuts.early_exit.sure import margin
from fusion_adapters.shortcuts.saving import backbone_of

NEVER, ALWAYS = 1.112, -0.2
CAUSAL = ("llama", "gpt2", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "opt", "gpt-neox", "phi3", "mixtral")
KV = ("later", "cast")
ALIKE = ("llama", "gpt2", "gemma2")  # rotary, absolute positions, a sliding window


def some_shortcuts(width=WIDTH, depth=DEPTH, seed=0):
    """Random maps near the identity between all blocks, and fused ones to the last layer."""
    torch.manual_seed(seed)
    maps = [Shortcut(width, [i], j, bias=True) for i in range(1, depth) for j in range(i + 1, depth + 1)]
    maps += [Shortcut(width, range(i + 1), depth, kind=FUSED) for i in range(1, depth)]
    for shortcut in maps:
        n = len(shortcut.sources)
        shortcut.weight.data = torch.eye(width).repeat(1, n) / n + 0.1 * torch.randn(width, n * width)
    return ShortcutSet(maps, width, depth)


def prompts(family, padding=None, rows=2, seed=0):
    """A batch of prompts without an end inside; with `padding` the second is shorter by two tokens."""
    batch = inputs(family, "causal", seed=seed, padding=padding or "left")
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 2, 5)
    mask = batch["attention_mask"]
    if padding is None:
        ids, mask = ids.masked_fill(mask == 0, 7), torch.ones_like(mask)
    return {"input_ids": ids[:rows], "attention_mask": mask[:rows]}


WRITING = {
    "max_new_tokens": 14,
    "min_new_tokens": 14,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


class Forced:
    """A logits processor that has the model write given texts."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __call__(self, input_ids, scores):
        wanted = self.sequences[:, input_ids.shape[1]]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)


def replayed(model, batch, sequences):
    """What `generate` of the model itself gives when it writes the same tokens: logits `(B, steps, V)` and the cache."""
    options = {**WRITING, "max_new_tokens": sequences.shape[1] - batch["input_ids"].shape[1]}
    options["min_new_tokens"] = None
    output = model.generate(**batch, **options, logits_processor=[Forced(sequences)])
    assert torch.equal(output.sequences, sequences)
    return torch.stack(output.logits, 1), output.past_key_values


def middling(model, batch, quantile=0.5, kind="mat"):
    """A lambda, for a tiny `mean_length`, that this share of an exit's looks at some text does not pass."""
    torch.manual_seed(0)
    text = model.generate(**batch, max_new_tokens=24, min_new_tokens=24, do_sample=True)
    shortcuts, readout = some_shortcuts(), Readout(model)
    states = layer_states(model, {"input_ids": text}, range(DEPTH))
    with torch.no_grad():
        looks = torch.stack([margin(readout(shortcuts.get(layer, kind=kind)(states))) for layer in range(1, DEPTH)])
    return float(looks[:, :, batch["input_ids"].shape[1] :].quantile(quantile)) / 0.9


def differences(cache, other):
    """The greatest difference of keys and values of two caches, by layer."""
    found = []
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert one.get_seq_length() == two.get_seq_length()
        assert one.keys.shape == two.keys.shape
        found.append(max(float((one.keys - two.keys).abs().max()), float((one.values - two.values).abs().max())))
    return found


def layer_states(model, batch, layers):
    """Layer states `(B, T, d)` of one call, by number."""
    backbone, found = backbone_of(model), {}
    with torch.no_grad(), recorded(backbone, layers, found.__setitem__):
        run(backbone, {**batch, "use_cache": False})
    return found


def build(family, **settings):
    """A tiny causal model."""
    return FAMILIES[family].build("causal", **settings)


def options(threshold, **given):
    return ExitOptions(**{"layers": [1, 3], "threshold": threshold, "mean_length": 1e-3, **given})
