"""Shortcuts trained by what the head says (tuned-lens, arXiv 2303.08112): least squares are the start, the model's own output the aim."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..states import LayerStateCache, Source, source_of
from .held import HeldStates, hold_states
from .maps import FUSED, IDENTITY, MAT, ShortcutSet
from .readout import Readout
from .saving import check_fits
from .stream import Choice, Collator, Rows
from .teaching import Teacher, divergence
from .trained import TrainedMap, tuned_kind

AT_ONCE = 256  # positions that are judged at a time


@dataclass(frozen=True)
class TuneOptions:
    """How shortcuts are trained.

    Attributes:
        kinds: Which of a set are; those to the last layer.
        rate: AdamW's, of values that are scaled to a variance of 1; divided by the number of sources, because a step moves the sum over
            all of them. It falls to 0 along a cosine.
        epochs: Passes over the positions.
        per_step: How many positions a step takes, a batch.
        drawn: How many tokens a step compares beside the likely ones, see `Teacher`; None for the whole vocabulary.
        held_out: The part of the rows that is not trained on, by which the best state of each map is kept, where no others are given.
        judged: The most positions of these that are looked at after each pass.
        seed: Of the order of positions and of what is drawn.
        positions: See `Choice`.
        skip: See `Choice`; None for 1 in a causal model, else 0.
        batch_size: Rows of one call of the backbone.

    Raises:
        ValueError: If an option cannot be.
    """

    kinds: Sequence[str] = (MAT, FUSED)
    rate: float = 1e-3
    epochs: int = 4
    per_step: int = 256
    drawn: int | None = 4096
    held_out: float = 0.1
    judged: int = 1024
    seed: int = 0
    positions: str = "all"
    skip: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str) or not self.kinds or IDENTITY in self.kinds:
            raise ValueError(
                f"kinds={self.kinds!r}: give a list of kinds of shortcuts that have a matrix, ['{MAT}', '{FUSED}'] for example."
            )
        counts = {"epochs": self.epochs, "per_step": self.per_step, "judged": self.judged, "batch_size": self.batch_size}
        for name, value in {**counts, **({} if self.drawn is None else {"drawn": self.drawn})}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate}: it must be above 0.")
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out={self.held_out}: the part of the rows by which the best state is chosen must lie between 0 and 1; 0.1, say."
            )
        Choice(self.positions, self.skip or 0, self.seed)


@dataclass(frozen=True)
class Tuning:
    """How the training of one shortcut went.

    Attributes:
        kind: Of the trained one.
        source: The layer that it casts from.
        divergences: The mean KL on held-out positions, in nats, before training and after each pass.
        best: Which of these was kept, 0 for the start.
    """

    kind: str
    source: int
    divergences: list[float]
    best: int


@dataclass
class Tuned:
    """What a training gave.

    Attributes:
        shortcuts: Those that were given, and the trained ones beside them.
        tunings: How it went, one for each trained shortcut.
        positions: The number of positions that were trained on.
        held_out: The number of those that chose the best state.
        seconds: Of all of it.
        options: How.
    """

    shortcuts: ShortcutSet
    tunings: list[Tuning]
    positions: int
    held_out: int
    seconds: float
    options: TuneOptions = field(default_factory=TuneOptions)


def tune_shortcuts(
    model: nn.Module | Source,
    shortcuts: ShortcutSet,
    rows: Rows,
    collator: Collator,
    options: TuneOptions | None = None,
    *,
    watched: Rows | None = None,
    readout: Readout | None = None,
    cache: LayerStateCache | None = None,
    progress: bool = True,
) -> Tuned:
    """Trains shortcuts so that the head says of the cast state what it says of the true one.

    The loss is `KL(model's tokens || tokens after the cast)`. The backbone runs once over the rows; the states that are needed stay in
    memory as float16, `positions x layers x hidden size x 2` bytes, which the first progress bar tells before it begins. Of each map the
    state that is best on held-out rows is kept, the start among them. The same arguments give the same maps, on one machine.

    Args:
        model: A language model, with its head.
        shortcuts: Where to start from, see `fit_shortcuts`; they stay as they are.
        rows: Tokenised rows, those of the fit or others.
        collator: Pads them on the right.
        options: How.
        watched: Rows by which the best state is chosen; None holds back some of the others. Those that least squares were fitted to
            flatter the start, so give some that they were not.
        readout: Of the same model; None makes one.
        cache: States of all these rows on disk, of all layers that are read; None computes them.
        progress: Show bars.

    Returns:
        The trained maps among the given ones, as further kinds: `kl` from `mat`, `kl fused` from `fused`.

    Raises:
        ValueError: If there is no shortcut of these kinds to the last layer, too few rows, or no head over a vocabulary.
    """
    options, started = options or TuneOptions(), time.perf_counter()
    source = source_of(model)
    backbone = source.backbone
    check_fits(shortcuts, backbone)
    starts = [s for s in shortcuts if s.kind in options.kinds and s.target == backbone.num_layers]
    if not starts:
        raise ValueError(
            f"There is no shortcut of kind {' or '.join(options.kinds)} to the last layer ({backbone.num_layers}) to start from; the kinds "
            f"to it are: {', '.join(shortcuts.kinds()) or 'none'}. Fit some (fit_shortcuts), or name these."
        )
    if readout is None:
        if isinstance(model, Source):
            raise ValueError("A source has no head to train by. Give the model, or its readout.")
        readout = Readout(model)
    choice = Choice(options.positions, int(backbone.causal) if options.skip is None else options.skip, options.seed)
    layers = sorted({layer for s in starts for layer in s.sources} | {backbone.num_layers})
    everything = [*rows, *(watched or [])]
    held = hold_states(
        source, everything, layers, collator, choice, batch_size=options.batch_size, cache=cache, progress=progress
    )
    generator = torch.Generator().manual_seed(options.seed)
    train, judge = _split(held, len(rows), len(watched or []), options, generator)
    with source.quiet():
        maps = [TrainedMap(s, held, train) for s in starts]
        teacher = Teacher(readout, held.dtype, options.drawn)
        tunings = _train(maps, teacher, held, train, judge, options, generator, backbone.device, progress)
    result = ShortcutSet([*shortcuts, *(m.result() for m in maps)], shortcuts.hidden_size, shortcuts.num_layers)
    seconds = time.perf_counter() - started
    return Tuned(result.to(backbone.device), tunings, len(train), len(judge), seconds, options)


def _split(
    held: HeldStates, rows: int, watched: int, options: TuneOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The numbers of the positions to train on, and of those to judge by: of other rows."""
    out = torch.zeros(rows + watched, dtype=torch.bool)
    out[rows:] = True
    if not watched:
        out[torch.randperm(rows, generator=generator)[: max(1, round(options.held_out * rows))]] = True
    apart = out[held.rows]
    train, judge = (~apart).nonzero()[:, 0], apart.nonzero()[:, 0]
    if not len(train) or not len(judge):
        raise ValueError(
            f"{rows} rows to train on and {watched or f'held_out={options.held_out} of these'} to judge by leave {len(train)} positions to "
            f"train on and {len(judge)} to judge by. Give more rows: shorter ones of the same text, for example."
        )
    return train, judge[torch.randperm(len(judge), generator=generator)[: options.judged]]


def _train(
    maps: list[TrainedMap],
    teacher: Teacher,
    held: HeldStates,
    train: Tensor,
    judge: Tensor,
    options: TuneOptions,
    generator: torch.Generator,
    device: torch.device,
    progress: bool,
) -> list[Tuning]:
    last = max(held.states)
    likely = None
    if teacher.linear is not None:
        parts = tqdm(train.split(AT_ONCE), desc="likely tokens", unit="batch", disable=not progress)
        likely = torch.cat([teacher.likely(held.states[last][some].to(device)).cpu() for some in parts])
    groups = [{"params": m.parameters, "lr": options.rate / len(m.start.sources)} for m in maps]
    optimizer = torch.optim.AdamW(groups, options.rate, weight_decay=0.0)
    steps = options.epochs * -(-len(train) // options.per_step)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found = [[value] for value in _judged(maps, teacher, held, judge, device)]
    best = [m.state() for m in maps]
    bar = tqdm(total=steps, desc="training", unit="step", disable=not progress)
    with bar:
        for _ in range(options.epochs):
            for some in torch.randperm(len(train), generator=generator).split(options.per_step):
                states = held.at(train[some], device)
                words = None if likely is None else teacher.draw(likely[some], generator)
                with torch.no_grad():
                    aim = teacher.says(states[last], words)
                total = 0.0
                for m in maps:
                    with torch.enable_grad():
                        loss = divergence(aim, teacher.logits(m(states), words)).mean()
                    for parameter, gradient in zip(m.parameters, torch.autograd.grad(loss, m.parameters), strict=True):
                        parameter.grad = gradient
                    total += float(loss.detach())
                optimizer.step()
                schedule.step()
                bar.set_postfix(kl=f"{total / len(maps):.3f}", refresh=False)
                bar.update()
            for i, value in enumerate(_judged(maps, teacher, held, judge, device)):
                if value < min(found[i]):
                    best[i] = maps[i].state()
                found[i].append(value)
    for m, state in zip(maps, best, strict=True):
        m.load(state)
    return [
        Tuning(tuned_kind(m.start.kind), m.start.source, values, values.index(min(values)))
        for m, values in zip(maps, found, strict=True)
    ]


@torch.no_grad()
def _judged(
    maps: list[TrainedMap], teacher: Teacher, held: HeldStates, numbers: Tensor, device: torch.device
) -> list[float]:
    """The mean divergence of each map over the whole vocabulary."""
    totals = [0.0] * len(maps)
    for some in numbers.split(AT_ONCE):
        states = held.at(some, device)
        aim = teacher.says(states[max(states)])
        for i, m in enumerate(maps):
            totals[i] += float(divergence(aim, teacher.logits(m(states))).double().sum())
    return [total / len(numbers) for total in totals]
