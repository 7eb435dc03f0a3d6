"""All modules of a model in one pass, where attaching looks through hundreds of them a dozen times; and all of them in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def modules_of(*roots: nn.Module) -> list[nn.Module]:
    """The modules of models, each once, in the order of `modules()`, which takes several times as long for deep ones."""
    found: dict[int, nn.Module] = {}
    left: list[nn.Module | None] = list(reversed(roots))
    while left:
        module = left.pop()
        if module is None or id(module) in found:
            continue
        found[id(module)] = module
        if module._modules:
            left.extend(reversed(module._modules.values()))
    return list(found.values())


def parameters_of(*roots: nn.Module) -> Iterator[nn.Parameter]:
    """Their parameters; one that several modules share comes several times."""
    return (p for module in modules_of(*roots) for p in module._parameters.values() if p is not None)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the body."""
    modes = [(module, module.training) for module in modules_of(model)]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
