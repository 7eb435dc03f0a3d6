"""Families, heads and depths for the tests of `fusion_depth`, and what a model without its upper blocks answers, by hand."""

import contextlib

import pytest
import torch
from families import DEPTH, FAMILIES, GRID, answer

from fusion_adapters.backbone.blocks import find_backbones
from fusion_adapters.backbone.families import is_causal_lm, state_in, state_out, with_state_out

HEADS = ("token", "sequence", "qa", "image", "audio")
# each family with its heads that are trained, depths in turn; a tiny wav2vec 2.0 of two blocks has two lists of two
PLACES = [
    (family, head, DEPTH - 1 if head == "audio" else 1 + number % (DEPTH - 1))
    for number, (family, head) in enumerate((f, h) for f, h in GRID if h in HEADS)
]
VOCABULARY = [(family, head) for family, head in GRID if head in ("causal", "masked", "seq2seq") and "both" not in family]
STACKED = ("t5", "bart", "whisper")  # not cut: two stacks
places = pytest.mark.parametrize(("family", "head", "depth"), PLACES, ids=[f"{f}-{h}-{d}" for f, h, d in PLACES])


def stacked(family, head):
    return family in STACKED and (family, head) != ("t5", "token")


def running_parts(model, backbone):
    """Counts, while in the body, the calls of parts of each block."""
    calls = dict.fromkeys(range(1, backbone.whole.num_layers + 1), 0)

    def count(number):
        def hook(module, args):
            calls[number] += 1

        return hook

    @contextlib.contextmanager
    def counted():
        handles = [
            next(
                m for m in block.modules() if m is not block and not isinstance(m, torch.nn.ModuleList)
            ).register_forward_pre_hook(count(number))
            for number, block in enumerate(backbone.whole.blocks, start=1)
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    return counted()


def by_hand(family, head, fusion, depth, batch):
    """The answer of a model whose blocks above `depth` are taken off its list, and whose last block answers with the fused state."""
    model = FAMILIES[family].build(head)
    (backbone,) = find_backbones(model)
    assert not is_causal_lm(model)
    blocks = backbone.base.get_submodule(backbone.path)
    states = {}
    if len(blocks) == backbone.num_layers:
        del blocks[depth:]
        assert len(blocks) == depth
    backbone.root.config.num_hidden_layers = depth
    order = list(blocks) if len(blocks) == depth else list(blocks) * depth  # ALBERT: one block
    count = 0

    def keep_input(block, args, kwargs):
        states.setdefault(0, state_in(args, kwargs))

    def keep(block, args, kwargs, output):
        nonlocal count
        count += 1
        states[count] = state_out(output)
        if count == depth:
            return with_state_out(output, fusion([states[i] for i in fusion.layers], states[depth]))
        return None

    order[0].register_forward_pre_hook(keep_input, with_kwargs=True)
    for block in dict.fromkeys(order):
        block.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        return answer(model, batch)
