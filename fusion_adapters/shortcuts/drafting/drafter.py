"""A fused drafter: low, middle and high states of the last checked position, one small block, the backbone's own head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbone.blocks import Backbone
from ...backbone.families import input_embeddings
from ..readout import Readout

EPS = 1e-6  # of the norms
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class DrafterShape:
    """How large a drafter is.

    Attributes:
        hidden_size: The width `d` of the backbone, and of the drafter.
        layers: Layers whose states it reads, ascending.
        heads: Attention heads of its block.
        inner: Width of its feed-forward part.
        tokens: How many tokens it can say; None for the whole vocabulary.

    Raises:
        ValueError: If the heads do not divide the width into even parts, or there are no layers.
    """

    hidden_size: int
    layers: tuple[int, ...]
    heads: int
    inner: int
    tokens: int | None

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers={list(self.layers)}: name the layers that the drafter reads, ascending, each once.")
        if self.heads < 1 or self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"heads={self.heads}: a width of {self.hidden_size} must be divided by the heads into parts of even size."
            )
        if self.inner < 1 or (self.tokens is not None and self.tokens < 1):
            raise ValueError(f"inner={self.inner}, tokens={self.tokens}: both must be at least 1.")

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {**asdict(self), "layers": list(self.layers)}


class DraftCache:
    """Keys and values of the positions that a drafter has read, in one piece of memory that grows by doubling.

    Args:
        mask: bool `(B, T)`, False where a row is padded on the left; None if none is.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.length = 0
        self.mask = mask
        self._kept: Tensor | None = None  # (2, B, heads, room, d / heads)

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts keys and values `(B, heads, T, d / heads)` behind those that are there; returns all of them."""
        new, begin = keys.shape[2], self.length
        self.length += new
        if self._kept is None or self.length > self._kept.shape[3]:
            room = max(64, 2 * self.length)
            kept = keys.new_empty(2, *keys.shape[:2], room, keys.shape[3])
            if self._kept is not None:
                kept[:, :, :, :begin] = self._kept[:, :, :, :begin]
            self._kept = kept
        self._kept[0, :, :, begin : self.length] = keys
        self._kept[1, :, :, begin : self.length] = values
        return self._kept[0, :, :, : self.length], self._kept[1, :, :, : self.length]

    def crop(self, length: int) -> None:
        """Forgets all but the first positions."""
        self.length = min(self.length, length)

    def seen(self, new: int) -> Tensor | None:
        """Which positions each of the last `new` may look at, bool, to be broadcast to `(B, heads, new, length)`; None for all."""
        seen = None
        if new > 1:
            seen = torch.ones(new, self.length, dtype=torch.bool).tril(self.length - new)[None, None]
        if self.mask is not None and not bool(self.mask.all()):
            rest = self.mask.new_ones(len(self.mask), max(0, self.length - self.mask.shape[1]))
            real = torch.cat([self.mask[:, : self.length], rest], dim=1)[:, None, None]  # (B, 1, 1, length)
            seen = real if seen is None else seen.to(real.device) & real
            # a padded position has nothing to look at but itself
            own = torch.eye(self.length, dtype=torch.bool, device=real.device)[self.length - new :]
            seen = seen | own[None, None]
        return seen


class DraftBlock(nn.Module):
    """`a_t = block(U [n(z_i1); ..; n(z_ik)]_t + E n(e_{t+1}) + b)`, whose readout is a draft of token `t + 2`.

    `z_i` are layer states of position t, `e` word embeddings, `n` RMS norms with a gain for each channel, and the block one causal
    transformer block with rotary positions. Further tokens are drafted from `O a_t` in the place of `U [..]`, as EAGLE
    (arXiv 2401.15077) does with its own features; reading three layers is EAGLE-3's (arXiv 2503.01840).

    Args:
        shape: How large it is.
    """

    def __init__(self, shape: DrafterShape) -> None:
        super().__init__()
        size, count = shape.hidden_size, len(shape.layers)
        self.shape = shape
        self.state_gain = nn.Parameter(torch.ones(count, size))
        self.word_gain = nn.Parameter(torch.ones(size))
        self.states_in = nn.Linear(count * size, size)
        self.words_in = nn.Linear(size, size, bias=False)
        self.own_in = nn.Linear(size, size)
        self.attention_gain = nn.Parameter(torch.ones(size))
        self.queries_keys_values = nn.Linear(size, 3 * size, bias=False)
        self.mixed = nn.Linear(size, size, bias=False)
        self.inner_gain = nn.Parameter(torch.ones(size))
        self.gate_up = nn.Linear(size, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, size, bias=False)
        for out in (self.mixed, self.down):  # at first the block hands on what it is given
            nn.init.zeros_(out.weight)
        self.turns: Tensor
        self.register_buffer("turns", _turns(size // shape.heads), persistent=False)

    def fused(self, states: Sequence[Tensor]) -> Tensor:
        """`U [..]` of the layer states `(..., d)`, in the order of the layers."""
        size = (self.shape.hidden_size,)
        here = self.states_in.weight  # its device and dtype
        normed = [F.rms_norm(z.to(here), size, g, EPS) for z, g in zip(states, self.state_gain, strict=True)]
        return self.states_in(torch.cat(normed, dim=-1))  # (..., d)

    def again(self, own: Tensor) -> Tensor:
        """`O a` of the drafter's own states `(..., d)`."""
        return self.own_in(F.rms_norm(own, (self.shape.hidden_size,), None, EPS))

    def words(self, embedded: Tensor) -> Tensor:
        """`E n(e)` of word embeddings `(..., d)`."""
        return self.words_in(F.rms_norm(embedded.to(self.word_gain.dtype), (self.shape.hidden_size,), self.word_gain, EPS))

    def keys_of(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, heads, T, d / heads)` of inputs `(B, T, d)` whose first stands at place `first`."""
        size, heads = self.shape.hidden_size, self.shape.heads
        found = self.queries_keys_values(F.rms_norm(x, (size,), self.attention_gain, EPS))  # (B, T, 3 d)
        q, k, v = found.unflatten(-1, (3, heads, size // heads)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, d / heads)
        places = torch.arange(first, first + x.shape[1], device=x.device)
        angles = places[:, None] * self.turns  # (T, d / heads / 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return _turned(q, cos, sin), _turned(k, cos, sin), v

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention, `(B, heads, T, d / heads)`: the rest of the block."""
        x = x + self.mixed(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(F.rms_norm(x, (self.shape.hidden_size,), self.inner_gain, EPS)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def forward(self, x: Tensor, cache: DraftCache) -> Tensor:
        """Reads positions behind those of a cache.

        Args:
            x: `(B, T, d)`, what `fused` or `again` and `words` add up to.
            cache: Gains the positions.

        Returns:
            The states `a`, `(B, T, d)`.
        """
        q, k, v = self.keys_of(x, cache.length)
        keys, values = cache.add(k, v)
        seen = cache.seen(x.shape[1])
        seen = None if seen is None else seen.to(x.device)
        return self.after(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=seen))


def _turns(size: int) -> Tensor:
    return ROTARY_BASE ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)  # (size / 2,)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: the two halves of the channels are turned against one another."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Drafter:
    """A block that drafts tokens for the backbone that it was trained on, and what it uses of that: embeddings, final norm and head.

    ```python
    drafter = load_drafter("drafter", model)
    model.generate(**inputs, custom_generate=drafter.generate_function())   # the tokens of plain greedy, sooner
    ```

    Args:
        model: A causal language model, with or without adapters.
        block: The trained block.
        tokens: int64 `(V',)`, which tokens it can say; None for all.

    Raises:
        ValueError: If the model is not causal, has no head, or a list of tokens is given and the head is not linear.
    """

    def __init__(self, model: nn.Module, block: DraftBlock, tokens: Tensor | None) -> None:
        self.readout = Readout(model)
        self.model = self.readout.model
        self.block = block
        self.tokens = tokens
        _check_causal(self.backbone)
        self.embeddings: nn.Module = input_embeddings(self.backbone.root)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if tokens is not None:
            self.weight, self.bias = _rows(self.readout, tokens)
        self.to(self.dtype)

    @property
    def backbone(self) -> Backbone:
        """The backbone."""
        return self.readout.backbone

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read."""
        return self.block.shape.layers

    @property
    def dtype(self) -> torch.dtype:
        """That of the head where it is one of floating point, else float32."""
        weight = next(self.readout.head.parameters())
        return weight.dtype if weight.is_floating_point() and weight.element_size() > 1 else torch.float32

    def to(self, dtype: torch.dtype) -> Drafter:
        """Puts the block onto the backbone's device, in a dtype."""
        device = self.backbone.device
        turns = self.block.turns
        self.block.to(device, dtype)
        self.block.turns = turns.to(device)  # angles stay float32
        self.tokens = None if self.tokens is None else self.tokens.to(device)
        return self

    def logits(self, state: Tensor) -> Tensor:
        """Logits `(..., V')` over the drafter's tokens, of states in the place of the last block's, `(..., d)`."""
        if self.weight is None:
            return self.readout(state)
        return F.linear(self.readout.normed(state).to(self.weight.dtype), self.weight, self.bias)

    def named(self, numbers: Tensor) -> Tensor:
        """Tokens of the vocabulary, of their numbers among those that the drafter can say."""
        return numbers if self.tokens is None else self.tokens[numbers]

    def begin(self, states: Sequence[Tensor], following: Tensor, cache: DraftCache) -> Tensor:
        """Reads checked positions: their layer states `(B, T, d)` and the tokens `(B, T)` that follow them; returns `a`, `(B, T, d)`."""
        return self.block(self.block.fused(states) + self.block.words(self.embeddings(following)), cache)

    def go_on(self, own: Tensor, following: Tensor, cache: DraftCache) -> Tensor:
        """Reads one drafted position: the drafter's own state `(B, 1, d)` and the token `(B, 1)` after it; returns `a`, `(B, 1, d)`."""
        return self.block(self.block.again(own) + self.block.words(self.embeddings(following)), cache)


def _rows(readout: Readout, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows of the head for some tokens, in one piece; of a packed head as it computes them."""
    head = readout.linear
    tokens = tokens.to(head.weight.device)
    with torch.no_grad():
        bias = None if head.bias is None else head.bias[tokens].contiguous()
        if head.weight.is_floating_point() and head.weight.element_size() > 1 and head.weight.dim() == 2:
            return head.weight[tokens].detach().contiguous(), bias
        unit = torch.eye(head.in_features, device=readout.backbone.device)
        found = head(unit) - (0 if head.bias is None else head.bias)  # (d, V)
        return found.T[tokens].float().contiguous(), bias


def _check_causal(backbone: Backbone) -> None:
    if not backbone.causal:
        raise ValueError(
            f"A {backbone.model_type!r} sees the text on both sides and writes no text token by token, so there is nothing to draft. Load "
            "a causal language model (AutoModelForCausalLM)."
        )
