"""What stands after the blocks of a model: from a state in the place of the last one to logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.blocks import Backbone
from ..backbone.families import output_embeddings
from ..backbone.fed import fed, watched
from ..backbone.walk import evaluating
from ..states import source_of
from .saving import backbone_of

PROBE = 4  # positions
CLOSE = 1e-5  # of the largest logit


class Readout:
    """Final norm and head over the vocabulary, by position: `(..., d)` to `(..., V)`.

    Where the model applies modules one after the other and nothing else, these are called by themselves, which is checked against the
    model; else (logits that are scaled or capped outside of a module) the model is called, with the state in the place of its blocks.

    Args:
        model: A causal or a masked language model. A fusion that is attached to it is left out.

    Raises:
        ValueError: If it has no head over a vocabulary.
    """

    def __init__(self, model: nn.Module) -> None:
        base: Any = getattr(model, "get_base_model", None)
        self.model: nn.Module = model if base is None else base()
        self.backbone: Backbone = backbone_of(self.model)
        head = output_embeddings(self.model)
        if head is None:
            raise ValueError(
                f"{type(self.model).__name__} has no head over a vocabulary, so a state says no token. Load it with one "
                "(AutoModelForCausalLM, AutoModelForMaskedLM)."
            )
        self.head: nn.Module = head
        self.chain: list[nn.Module] | None = None
        self._forms: list[Any] = []
        self._fusions = source_of(model).fusions
        self._probe()

    @property
    def linear(self) -> nn.Linear:
        """The head's matrix over the vocabulary.

        Raises:
            ValueError: If the head is not one linear layer, or something is done to its logits.
        """
        if not isinstance(self.head, nn.Linear) or self.chain is None or self.chain[-1] is not self.head:
            raise ValueError(
                f"The head of {type(self.model).__name__} is not a linear layer that comes last ({type(self.head).__name__}, "
                + (
                    "and its logits are scaled or capped after it"
                    if self.chain is None
                    else f"in {type(self.chain[-1]).__name__}"
                )
                + "), so no part of its vocabulary can be had alone. Use the whole vocabulary (leave the short list unset)."
            )
        return self.head

    def normed(self, state: Tensor) -> Tensor:
        """What the linear head reads, `(..., d)`: the state through all that comes before."""
        assert self.linear is not None and self.chain is not None
        for module in self.chain[:-1]:
            state = module(state)
        return state

    def __call__(self, state: Tensor) -> Tensor:
        """Logits `(..., V)` of a state `(..., d)` that stands for that of the last block."""
        flat = state.reshape(-1, 1, state.shape[-1])  # (n, 1, d): a table of positions may be shorter than n
        if self.chain is not None:
            for module in self.chain:
                flat = module(flat)
        else:
            flat = self._answer(torch.zeros(flat.shape[:2], dtype=torch.long, device=flat.device), flat)
        return flat.reshape(*state.shape[:-1], flat.shape[-1])

    def _answer(self, ids: Tensor, state: Tensor) -> Tensor:
        with self._unfused(), fed(self.backbone, self._forms, {self.backbone.num_layers: state}):
            return self.model(input_ids=ids).logits

    @contextlib.contextmanager
    def _unfused(self) -> Iterator[None]:
        """In the body, a fusion that is attached is left out: the state stands for that of the last block itself."""
        with contextlib.ExitStack() as stack:
            for layer in self._fusions:
                stack.enter_context(layer.unfused())
            yield

    @torch.no_grad()
    def _probe(self) -> None:
        """Finds what runs after the last block, and whether it is all there is."""
        model, backbone = self.model, self.backbone
        with evaluating(model):
            ids = torch.arange(PROBE, device=backbone.device).unsqueeze(0)
            with self._unfused(), watched(backbone) as seen:
                model(input_ids=ids)
            self._forms = list(seen.forms)
            state = seen.states[backbone.num_layers]
            # the head by itself, else with the module that holds it and computes something between its parts
            for apart in (True, False):
                chain, logits = self._run_after(state, apart)
                if self.chain is None and _equals(chain, state, logits):
                    self.chain = chain

    def _run_after(self, state: Tensor, apart: bool) -> tuple[list[nn.Module], Tensor]:
        """The outermost modules that are called with a state after the blocks, in order, and the logits.

        Args:
            state: `(1, T, d)`.
            apart: Go into modules that hold the head.
        """
        found: list[nn.Module] = []
        inside, passed = 0, 0  # modules that are being called now; blocks that have answered
        backbone = self.backbone
        ends = [backbone.blocks[-1], *([self.head] if apart else [])]
        around = {id(m) for m in self.model.modules() if any(m is not end and _holds(m, end) for end in ends)}

        def count(block: nn.Module, args: Any, output: Any) -> None:
            nonlocal passed
            passed += 1

        def begin(module: nn.Module, args: Any) -> None:
            nonlocal inside
            if (
                passed == backbone.num_layers
                and not inside
                and args
                and isinstance(args[0], Tensor)
                and args[0].shape[:2] == state.shape[:2]
            ):
                found.append(module)
            inside += 1

        def end(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal inside
            inside -= 1

        inside_blocks = {id(m) for block in backbone.blocks for m in block.modules()}
        handles = [block.register_forward_hook(count) for block in dict.fromkeys(backbone.blocks)]
        for module in self.model.modules():
            if id(module) not in around and id(module) not in inside_blocks:
                handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        try:
            logits = self._answer(torch.arange(state.shape[1], device=state.device).unsqueeze(0), state)
        finally:
            for handle in handles:
                handle.remove()
        return found, logits


def _equals(chain: list[nn.Module], state: Tensor, logits: Tensor) -> bool:
    """Whether modules one after the other give these logits."""
    x = state
    try:
        for module in chain:
            x = module(x)
    except Exception:  # a module that wants more than the state
        return False
    same = isinstance(x, Tensor) and x.shape == logits.shape
    return same and float((x - logits).abs().max()) <= CLOSE * float(logits.abs().max())


def _holds(module: nn.Module, block: nn.Module) -> bool:
    return any(m is block for m in module.modules())
