"""Trains a drafter from layer states of plain text: towards the backbone's own next token, not the text's."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...backbone.atomic import written_whole
from ...states import StaleCacheError
from ..saving import backbone_of
from ..stream import Rows, frequent_tokens
from .drafter import DraftBlock, Drafter
from .feed import Batch, Feed, States
from .options import DrafterOptions
from .start import start

SLOWER = 0.1  # the rate of weights that are solved in closed form, beside that of the others
SAVE_EVERY = 60.0  # seconds
PROGRESS = "drafter_progress.safetensors"


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
        states: Their layer states, those of the last layer among them: a cache, or `RowStates`.
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
    tokens = None if options.tokens is None else torch.tensor(frequent_tokens(rows, options.tokens))
    torch.manual_seed(options.seed)
    block = DraftBlock(options.shape_of(backbone, None if tokens is None else len(tokens)))
    drafter = Drafter(model, block, tokens).to(torch.float32)
    feed = Feed(drafter, [rows[i] for i in long], states, options)
    started = time.perf_counter()
    losses = _train(drafter, feed, options, None if folder is None else Path(folder), progress)
    seconds = time.perf_counter() - started
    seen = sum(feed.counts[i] for batch in feed.batches() for i in batch)
    return TrainedDrafter(drafter.to(drafter.dtype), losses, seen, seconds, options)


def _train(drafter: Drafter, feed: Feed, options: DrafterOptions, folder: Path | None, progress: bool) -> list[list[float]]:
    block, batches = drafter.block, feed.batches()
    optimizer = torch.optim.AdamW(_groups(block, options), betas=(0.9, 0.95))
    sums = torch.zeros(10, options.steps + 1, dtype=torch.float64)
    store = None if folder is None else _Progress(folder / PROGRESS, feed, options)
    first = 0 if store is None else store.load(block, optimizer, sums)
    if first == 0:
        start(drafter, feed)
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


def losses_of(drafter: Drafter, batch: Batch, options: DrafterOptions) -> Tensor:
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


class _Progress:
    """A training that was stopped, as a file."""

    def __init__(self, file: Path, feed: Feed, options: DrafterOptions) -> None:
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
