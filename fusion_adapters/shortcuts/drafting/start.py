"""The first weights of a drafter, in closed form: a fused shortcut from what it reads to the next position's last state."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moments import Moments, pairs_of
from ..solving import solve
from .drafter import EPS, Drafter
from .feed import Feed

START_POSITIONS = 30_000  # to which the first weights are fitted
RIDGE = 1e-3


@torch.no_grad()
def start(drafter: Drafter, feed: Feed) -> None:
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
