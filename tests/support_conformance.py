"""Which family, method and LoRA the tests of conformance run with, and what they look at."""

import itertools

import pytest
from families import FAMILIES, first_head
from support import METHODS

from fusion_adapters import FusionConfig

# each family at least once, the methods and LoRA in turn: each method twice, with LoRA and without
ROUNDS = [(method, (number + turn) % 2 == 1) for turn in (0, 1) for number, method in enumerate(METHODS)]
LONGEST = range(max(len(FAMILIES), len(ROUNDS)))
TURNS = [(family, *pair) for _, family, pair in zip(LONGEST, itertools.cycle(FAMILIES), itertools.cycle(ROUNDS))]
# besides, every method in four families, in two of them with LoRA
EVERY = [
    (family, method, (number + turn) % 2 == 1)
    for turn, family in enumerate(("bert", "gpt2", "llama", "t5-both"))
    for number, method in enumerate(METHODS)
]
in_turn = pytest.mark.parametrize(("family", "method", "lora"), TURNS)
every_method = pytest.mark.parametrize(("family", "method", "lora"), list(dict.fromkeys([*TURNS, *EVERY])))


def config_of(family, method, lora, **fields):
    spec = FAMILIES[family]
    if lora:
        fields = {"r": 4, "target_modules": spec.lora, **fields}
    return FusionConfig(**spec.fields(first_head(family), **{**METHODS[method], **fields}))


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def structure(model):
    """All that a failing call could leave changed."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    return list(model.state_dict()), trains, hooks, sorted(model.peft_config), list(model.active_adapters)
