"""Trains a drafter from layer states of plain text: towards the backbone's own next token, not the text's."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..backbone.atomic import written_whole
from ..backbone.blocks import Backbone
from ..states import LayerStateCache, StaleCacheError, source_of
from .drafter import EPS, DraftBlock, Drafter, DrafterShape
from .moments import Moments, pairs_of
from .saving import backbone_of
from .solving import solve
from .stream import Choice, Collator, Rows, stream

PART_OF_HEAD = 64  # channels of a head
START_POSITIONS = 30_000  # to which the first weights are fitted
RIDGE = 1e-3
SLOWER = 0.1  # the rate of weights that are solved in closed form, beside that of the others
SAVE_EVERY = 60.0  # seconds
PROGRESS = "drafter_progress.safetensors"


@dataclass(frozen=True)
class DrafterOptions:
    """What is drafted from, and how the drafter is trained.

    Attributes:
        layers: Layers that the drafter reads; None for a low, a middle and the last one (6, 18 and 30 of 30).
        tokens: How many of the most frequent tokens of the text it can say; None for the whole vocabulary.
        inner: Width of its feed-forward part; None for twice the hidden size.
        steps: Drafted tokens a position is trained on: 1, or more, in which the drafter reads its own states as when it drafts.
        epochs: Passes over the text.
        batch_size: Rows of a step.
        learning_rate: Of AdamW, after a warm-up, falling to a tenth along a cosine.
        weight_decay: Of AdamW.
        temperature: Of the backbone's distribution that is learned; below 1 the greedy token counts for more.
        seed: Of the order of rows and the first weights.

    Raises:
        ValueError: If an option cannot be.
    """

    layers: Sequence[int] | None = None
    tokens: int | None = 8192
    inner: int | None = None
    steps: int = 1
    epochs: float = 4
    batch_size: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1.")
        for name in ("epochs", "learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: it must be above 0.")

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers to read, ascending.

        Raises:
            ValueError: If one is out of range.
        """
        found = (num_layers // 5, 3 * num_layers // 5, num_layers) if self.layers is None else tuple(self.layers)
        wrong = [layer for layer in found if not 0 <= layer <= num_layers]
        if wrong or not found:
            raise ValueError(
                f"layers={list(found)}: {wrong or 'none'} can be read. A backbone of {num_layers} blocks has the layers 0 (embeddings) to "
                f"{num_layers} (last block)."
            )
        return tuple(sorted(set(found)))

    def shape_of(self, backbone: Backbone, tokens: int | None) -> DrafterShape:
        """The shape of the drafter for a backbone."""
        size = backbone.hidden_size
        heads = max(1, size // PART_OF_HEAD)
        while size % (2 * heads):
            heads -= 1
        return DrafterShape(size, self.layers_of(backbone.num_layers), heads, self.inner or 2 * size, tokens)


@dataclass
class TrainedDrafter:
    """What a training gave.

    Attributes:
        drafter: The drafter, ready for use.
        losses: The mean cross-entropy to the backbone's distribution, of each tenth of the training, in nats, by step.
        tokens_seen: Positions trained on, all passes together.
        seconds: Of the training alone.
        options: How.
    """

    drafter: Drafter
    losses: list[list[float]]
    tokens_seen: int
    seconds: float
    options: DrafterOptions = field(default_factory=DrafterOptions)


class HeldStates:
    """Layer states of rows in memory, as float16, from one pass of the backbone.

    Args:
        model: The model.
        rows: Tokenised rows.
        collator: Pads a list of rows on the right.
        layers: The layers to keep.
        batch_size: Rows of one call.
        progress: Show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        collator: Collator,
        layers: Sequence[int],
        batch_size: int = 8,
        progress: bool = True,
    ) -> None:
        self.layers = sorted(set(layers))
        self._found: dict[int, Tensor] = {}
        chunks = stream(source_of(model), rows, self.layers, collator, Choice(), batch_size)
        for chunk in tqdm(
            chunks, total=-(-len(rows) // batch_size), desc="layer states", unit="batch", disable=not progress
        ):
            states = torch.stack([chunk.states[i] for i in self.layers]).to("cpu", torch.float16)  # (N, n, d)
            for number in chunk.rows.unique().tolist():
                self._found[number] = states[:, chunk.rows == number]

    def find(self, rows: Rows) -> list[int]:
        """The numbers of the rows."""
        return list(range(len(rows)))

    def read(self, numbers: Sequence[int], layers: Sequence[int]) -> Tensor:
        """States of rows one after the other, `(N, tokens, d)`."""
        columns = [self.layers.index(i) for i in layers]
        return torch.cat([self._found[i][columns] for i in numbers], dim=1)


States = LayerStateCache | HeldStates


def train_drafter(
    model: nn.Module,
    rows: Rows,
    states: States,
    options: DrafterOptions | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
) -> TrainedDrafter:
    """Trains a drafter for a frozen causal language model, from layer states of text that were computed once.

    The drafter learns the backbone's own distribution over the tokens that it can say, as it follows from the last layer's states: no
    pass of the backbone is needed. Its first weights are closed-form: least squares from what it reads to the next position's last
    state, a fused shortcut over one position.

    ```python
    states = cache_layer_states(model, rows, "states", collator, layers=[6, 18, 30])
    drafter = train_drafter(model, rows, states).drafter
    save_drafter(drafter, "drafter")
    ```

    Args:
        model: The model; nothing inside it may train.
        rows: Tokenised rows (`input_ids`), without padding.
        states: Their layer states, those of the last layer among them: a cache, or `HeldStates`.
        options: How.
        folder: Where weights and optimiser are kept meanwhile, each minute, so that a training that was stopped goes on. The file is
            removed at the end.
        progress: Show a bar.

    Raises:
        ValueError: If the model is not causal, a layer was not cached, or the rows are too few or too short.
        StaleCacheError: If the folder holds the progress of another training.
    """
    options, backbone = options or DrafterOptions(), backbone_of(model)
    layers = options.layers_of(backbone.num_layers)
    lacking = sorted({*layers, backbone.num_layers} - set(states.layers))
    if lacking:
        raise ValueError(
            f"The states do not hold the layers {lacking}, which a drafter of the layers {list(layers)} of {backbone.num_layers} is "
            f"trained from; they hold {list(states.layers)}. Extract them with layers={sorted({*layers, backbone.num_layers})}."
        )
    long = [i for i, row in enumerate(rows) if len(row["input_ids"]) > options.steps + 1]
    if not long:
        raise ValueError(
            f"None of the {len(rows)} rows has more than {options.steps + 1} tokens, so none shows what follows a draft. Give longer rows."
        )
    tokens = None if options.tokens is None else frequent_tokens(rows, options.tokens)
    torch.manual_seed(options.seed)
    block = DraftBlock(options.shape_of(backbone, None if tokens is None else len(tokens)))
    drafter = Drafter(model, block, tokens).to(torch.float32)
    feed = _Feed(drafter, [rows[i] for i in long], states, options)
    started = time.perf_counter()
    losses = _train(drafter, feed, options, None if folder is None else Path(folder), progress)
    seconds = time.perf_counter() - started
    seen = sum(feed.counts[i] for batch in feed.batches() for i in batch)
    return TrainedDrafter(drafter.to(drafter.dtype), losses, seen, seconds, options)


def frequent_tokens(rows: Rows, count: int) -> Tensor:
    """The most frequent tokens of rows, int64, ascending; fewer than `count` if the rows have fewer."""
    found = Counter(int(i) for row in rows for i in row["input_ids"])
    return torch.tensor(sorted(token for token, _ in found.most_common(count)), dtype=torch.long)


@dataclass
class _Batch:
    """States, tokens and what the backbone says, of some rows, padded on the right.

    Attributes:
        states: `(B, T, d)` for each layer of the drafter.
        tokens: int64 `(B, T)`.
        last: `(B, T, d)`, of the last layer.
        real: bool `(B, T)`.
    """

    states: list[Tensor]
    tokens: Tensor
    last: Tensor
    real: Tensor


class _Feed:
    """Batches in the order of a seed."""

    def __init__(self, drafter: Drafter, rows: Rows, states: States, options: DrafterOptions) -> None:
        self.drafter, self.states, self.options = drafter, states, options
        self.tokens = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        self.counts = [len(t) for t in self.tokens]
        self.numbers = states.find(rows)
        self.layers = sorted({*drafter.layers, drafter.backbone.num_layers})

    def batches(self) -> list[list[int]]:
        """Rows of each step, all passes one after the other."""
        whole = math.ceil(self.options.epochs)
        drawn = torch.Generator().manual_seed(self.options.seed)
        found = [batch for _ in range(whole) for batch in self.once(drawn)]
        return found[: max(1, round(len(found) * self.options.epochs / whole))]

    def once(self, drawn: torch.Generator | None = None) -> list[list[int]]:
        """Rows of each step of one pass."""
        order = torch.randperm(len(self.tokens), generator=drawn or torch.Generator().manual_seed(0)).tolist()
        size = self.options.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def read(self, batch: Sequence[int]) -> _Batch:
        device = self.drafter.backbone.device
        found = self.states.read([self.numbers[i] for i in batch], self.layers).to(device, torch.float32)  # (N, n, d)
        counts = [self.counts[i] for i in batch]
        split = found.split(counts, dim=1)
        padded = torch.stack([F.pad(s, (0, 0, 0, max(counts) - s.shape[1])) for s in split], dim=1)  # (N, B, T, d)
        tokens = torch.stack([F.pad(self.tokens[i], (0, max(counts) - self.counts[i])) for i in batch]).to(device)
        real = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
        return _Batch([padded[self.layers.index(i)] for i in self.drafter.layers], tokens, padded[-1], real)


def _train(drafter: Drafter, feed: _Feed, options: DrafterOptions, folder: Path | None, progress: bool) -> list[list[float]]:
    block, batches = drafter.block, feed.batches()
    optimizer = torch.optim.AdamW(_groups(block, options), betas=(0.9, 0.95))
    sums = torch.zeros(10, options.steps + 1, dtype=torch.float64)
    store = None if folder is None else _Progress(folder / PROGRESS, feed, options)
    first = 0 if store is None else store.load(block, optimizer, sums)
    if first == 0:
        _start(drafter, feed)
    saved = time.monotonic()
    bar = tqdm(total=len(batches), initial=first, desc="drafter", unit="step", disable=not progress)
    with bar, torch.enable_grad():
        for number in range(first, len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = group["top"] * _rate(number, len(batches))
            losses = losses_of(drafter, feed.read(batches[number]), options)  # (steps,)
            optimizer.zero_grad(set_to_none=True)
            (losses * 0.8 ** torch.arange(options.steps, device=losses.device)).sum().backward()
            nn.utils.clip_grad_norm_(block.parameters(), 1.0)
            optimizer.step()
            sums[10 * number // len(batches)] += torch.cat([losses.detach().cpu().double(), torch.ones(1)])
            bar.update()
            bar.set_postfix_str(" ".join(f"{v:.3f}" for v in losses.tolist()), refresh=False)
            if store is not None and number + 1 < len(batches) and time.monotonic() - saved > SAVE_EVERY:
                store.save(number + 1, block, optimizer, sums)
                saved = time.monotonic()
    if store is not None:
        store.file.unlink(missing_ok=True)
    block.requires_grad_(False)
    return [(row[:-1] / row[-1]).tolist() for row in sums if row[-1]]


def _groups(block: DraftBlock, options: DrafterOptions) -> list[dict[str, Any]]:
    """Parameters with their rates: what is solved in closed form moves slowly, on inputs that vary together."""
    solved = {id(p) for m in (block.states_in, block.words_in, block.own_in) for p in m.parameters()}
    solved |= {id(block.state_gain), id(block.word_gain)}
    groups = []
    for slow in (False, True):
        for flat in (False, True):
            some = [p for p in block.parameters() if (id(p) in solved, p.dim() == 1) == (slow, flat)]
            top = options.learning_rate * (SLOWER if slow else 1)
            groups.append({"params": some, "top": top, "weight_decay": 0.0 if flat or slow else options.weight_decay})
    return groups


def _rate(number: int, total: int) -> float:
    warm = max(1, min(100, total // 8))
    if number < warm:
        return (number + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (number - warm) / max(1, total - warm)))


def losses_of(drafter: Drafter, batch: _Batch, options: DrafterOptions) -> Tensor:
    """Cross-entropy to the backbone's distribution, of each drafted token, `(steps,)` in nats.

    From checked position t, step s reads token `t + s` and drafts token `t + s + 1`, which the backbone gives from its state at
    `t + s`. It sees the first steps of positions up to t, and its own earlier ones.
    """
    block, steps = drafter.block, options.steps
    length = batch.tokens.shape[1] - steps  # origins t whose steps are all within the text
    with torch.no_grad():
        wanted = (drafter.logits(batch.last[:, 1:]).float() / options.temperature).softmax(-1)  # (B, T - 1, V')
        words = drafter.embeddings(batch.tokens[:, 1:]).to(batch.last.dtype)  # (B, T - 1, d)
    same = torch.eye(length, dtype=torch.bool, device=batch.tokens.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    losses = []
    given = block.fused([z[:, :length] for z in batch.states])  # (B, length, d)
    for step in range(steps):
        x = given + block.words(words[:, step : step + length])
        q, k, v = block.keys_of(x, step)
        keys, values = [*keys, k], [*values, v]
        seen = torch.cat([same.new_ones(same.shape).tril(), *([same] * step)], dim=1)  # (length, (step + 1) length)
        attended = F.scaled_dot_product_attention(q, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=seen)
        own = block.after(x, attended)  # (B, length, d)
        log_q = drafter.logits(own).float().log_softmax(-1)
        each = -(wanted[:, step : step + length] * log_q).sum(-1)  # (B, length)
        real = batch.real[:, step + 1 : step + 1 + length]
        losses.append((each * real).sum() / real.sum().clamp_min(1))
        given = block.again(own)
    return torch.stack(losses)


@torch.no_grad()
def _start(drafter: Drafter, feed: _Feed) -> None:
    """Closed-form weights: from what the drafter reads to the next position's last state, and from that to what it reads next."""
    block, size = drafter.block, drafter.block.shape.hidden_size
    count = len(drafter.layers)
    squares, n = torch.zeros(count + 1, size, dtype=torch.float64), 0

    def normed(z: Tensor) -> Tensor:
        return F.rms_norm(z, (size,), None, EPS)

    def chosen() -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        """What is read of each position, the position's own last state, and the next one's."""
        taken = 0
        for batch in feed.once():
            if taken >= START_POSITIONS:
                return
            some = feed.read(batch)
            real = some.real[:, 1:]
            real[:, 0] = False  # the first position holds massive activations
            inputs = [normed(z[:, :-1][real]) for z in some.states]
            inputs.append(normed(drafter.embeddings(some.tokens[:, 1:])[real].float()))
            taken += len(inputs[0])
            yield inputs, normed(some.last[:, :-1][real]), normed(some.last[:, 1:][real])

    for inputs, _, _ in chosen():
        squares += torch.stack([x.double().square().sum(0) for x in inputs]).cpu()
        n += len(inputs[0])
    gains = (squares / max(n, 1)).clamp_min(1e-8).rsqrt().float().to(block.word_gain.device)  # (k + 1, d)
    block.state_gain.copy_(gains[:-1])
    block.word_gain.copy_(gains[-1])
    sources, target = list(range(count + 1)), count + 1
    moments = Moments(size, pairs_of(sources, target))
    for inputs, _, following in chosen():
        moments.add({**{i: x * gains[i] for i, x in enumerate(inputs)}, target: following})
    found = solve(moments, sources, target, ridge=RIDGE)
    weight, bias = found.weight.to(gains.device), found.bias  # (d, (k + 1) d)
    assert bias is not None
    block.states_in.weight.copy_(weight[:, : count * size])
    block.words_in.weight.copy_(weight[:, count * size :])
    block.states_in.bias.copy_(bias)
    moments = Moments(size, pairs_of([0], 1))
    for inputs, last, _ in chosen():
        fused = block.states_in(torch.cat([x * gains[i] for i, x in enumerate(inputs[:-1])], dim=-1))
        moments.add({0: last, 1: fused})
    found = solve(moments, [0], 1, ridge=RIDGE)
    bias = found.bias
    assert bias is not None
    block.own_in.weight.copy_(found.weight)
    block.own_in.bias.copy_(bias)


class _Progress:
    """A training that was stopped, as a file."""

    def __init__(self, file: Path, feed: _Feed, options: DrafterOptions) -> None:
        self.file = file
        digest = hashlib.sha256(json.dumps({**asdict(options), "shape": feed.drafter.block.shape.as_json()}).encode())
        for tokens in feed.tokens:
            digest.update(tokens.numpy().tobytes())
        self.key = digest.hexdigest()

    def save(self, done: int, block: nn.Module, optimizer: torch.optim.Optimizer, sums: Tensor) -> None:
        tensors = {f"block {n}": p.detach().cpu().contiguous() for n, p in block.named_parameters()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer {number} {n}": t.cpu().contiguous() for n, t in state.items()}
        with written_whole(self.file) as temporary:
            save_file({**tensors, "sums": sums}, temporary, metadata={"key": self.key, "steps": str(done)})

    def load(self, block: nn.Module, optimizer: torch.optim.Optimizer, sums: Tensor) -> int:
        """Puts back what a stopped training left; the number of steps that were done."""
        if not self.file.is_file():
            return 0
        with safe_open(self.file, "pt") as opened:
            notes = opened.metadata() or {}
            if notes.get("key") != self.key:
                raise StaleCacheError(
                    f"{str(self.file)!r} holds the progress of another training: other rows, or other options. Give another folder, or "
                    "delete the file."
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        sums.copy_(tensors["sums"])
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(tensors[f"block {name}"])
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer "):
                _, number, part = name.split(" ")
                state.setdefault(int(number), {})[part] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(notes["steps"])
