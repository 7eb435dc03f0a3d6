"""What is measured, as data: each case by the name that it has in results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

SHARE = 0.2  # of the paper's budget, for the small fusions
LOWER = 0.4  # of the blocks, for the fusion that needs no more of them


@dataclass(frozen=True)
class Case:
    """One thing that is timed, or whose memory is measured.

    Attributes:
        name: Its name in results.
        work: What a round does: train for an `"epoch"`, answer all rows without a graph (`"forward"`), or extract their layer
            states (`"extraction"`).
        fusion: The method; None for no fusion.
        share: Of what the paper's DWAtt trains on this backbone, which the fusion then trains; None for the method's default.
        depth: The fraction of the blocks that run, see `fusion_depth`; None for all.
        lora: Whether the recipe's LoRA is attached, alone or beside the fusion.
        source: Where an epoch's layer states come from: `"live"` from the backbone, `"cached"` from disk; `"loop"`, held in
            memory, for a bare loop without Trainer and without backbone.
        compiled: Whether the fusion goes through torch.compile.
        head: Whether a forward pass goes through the task head too.
    """

    name: str
    work: Literal["epoch", "forward", "extraction"] = "epoch"
    fusion: str | None = None
    share: float | None = None
    depth: float | None = None
    lora: bool = False
    source: Literal["live", "cached", "loop"] = "live"
    compiled: bool = False
    head: bool = True


def _named(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


EPOCHS = _named(
    Case("LoRA", lora=True),
    Case("LoRA + DWAtt", fusion="dwatt", share=1, lora=True),
    Case("last, live", fusion="last"),
    Case("DWAtt, live", fusion="dwatt", share=1),
    Case("last, cached", fusion="last", source="cached"),
    Case("DWAtt, cached", fusion="dwatt", share=1, source="cached"),
    Case("DWAtt 20 %, cached", fusion="dwatt", share=SHARE, source="cached"),
    Case("DWAtt 20 %, cached, compiled", fusion="dwatt", share=SHARE, source="cached", compiled=True),
    Case("dwconcat, cached", fusion="dwconcat", share=1, source="cached"),
    Case("dwconcat 20 %, cached", fusion="dwconcat", share=SHARE, source="cached"),
    Case("Concat 20 %, cached", fusion="concat", share=SHARE, source="cached"),
    Case("DWAtt, loop in memory", fusion="dwatt", share=1, source="loop"),
    Case("DWAtt 20 %, loop in memory", fusion="dwatt", share=SHARE, source="loop"),
)
FORWARDS = _named(
    Case("bare model", "forward"),
    Case("last attached", "forward", fusion="last"),
    Case("DWAtt attached", "forward", fusion="dwatt", share=1),
    Case("Concat 20 % on 40 % of the blocks", "forward", fusion="concat", share=SHARE, depth=LOWER),
)
EXTRACTIONS = _named(
    Case("bare forward", "forward", head=False),
    Case("extraction", "extraction"),
)
CASES = {**EPOCHS, **FORWARDS, **EXTRACTIONS}


def epoch_cases(model: nn.Module) -> list[str]:
    """The cases of an epoch that can be run.

    torch.compile wants a C++ compiler and Python's headers; the bare loop calls the head by hand, as BERT's: dropout, then classifier.

    Args:
        model: The backbone with its head.
    """
    looped = hasattr(model, "classifier") and hasattr(model, "dropout")
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
        compiles = True
    except Exception:
        compiles = False
    return [name for name, case in EPOCHS.items() if compiles >= case.compiled and looped >= (case.source == "loop")]
