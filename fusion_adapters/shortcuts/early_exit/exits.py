"""Early exit of causal language models: `generate` that stops each pass at the first chosen layer that is sure (arXiv 2303.09435)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...backbone.walk import evaluating
from ...states.source import base_of
from ..maps import ShortcutSet
from ..readout import Readout
from .checks import check_exits, check_given, check_writer
from .options import ExitOptions
from .sure import TokenCheck
from .writing import Writing


@dataclass
class Exited:
    """A text that was written with early exit.

    Attributes:
        output: What `generate` of the model returns.
        layers: int64 `(steps,)`: the layer whose state decided each token after the prompt's pass, which runs whole and decides the first;
            `L` is the last. The rows of a batch decide together.
        passes: int64 `(steps,)`: how many blocks ran in each of these steps, for however many tokens at once; with `kv="later"` among them
            those that caught up.
        num_layers: `L`.
    """

    output: Any
    layers: Tensor
    passes: Tensor
    num_layers: int

    @property
    def sequences(self) -> Tensor:
        """The texts, `(B, T)`."""
        return self.output if isinstance(self.output, Tensor) else self.output.sequences

    @property
    def saved(self) -> float:
        """The share of layers that were not needed to decide the tokens, the paper's measure."""
        return 1 - float(self.layers.float().mean()) / self.num_layers if len(self.layers) else 0.0

    @property
    def passes_saved(self) -> float:
        """The share of blocks that did not run: less than `saved` where some were made up for."""
        return 1 - float(self.passes.float().mean()) / self.num_layers if len(self.passes) else 0.0


class EarlyExit:
    """Early exit of a causal language model.

    ```python
    exits = EarlyExit(model, shortcuts, calibration.options())
    written = exits.generate(**tokenizer(prompts, return_tensors="pt"), max_new_tokens=64)
    written.sequences, written.saved
    ```

    At each chosen layer the state of the token is cast to the last layer, and final norm and head give probabilities; if the two
    greatest lie far enough apart, the pass ends there. The rest does not run. A batch goes on until all rows that still write are sure:
    they share the blocks, so a row that leaves alone would save next to nothing.

    The model is changed only while `generate` runs; other threads must not call it meanwhile.

    Args:
        model: A causal language model; it may hold LoRA or be quantised.
        shortcuts: Of its backbone.
        options: Where and when.

    Raises:
        ValueError: If the model cannot exit early (no decoder of one stack, a cache that is not kept block by block, a fusion attached),
            or a shortcut or layer is not there.
    """

    def __init__(self, model: nn.Module, shortcuts: ShortcutSet, options: ExitOptions) -> None:
        self.host: Any = base_of(model)
        self.options = options
        self.readout = Readout(model)
        self.backbone = self.readout.backbone
        check_exits(model, self.backbone, shortcuts, options.layers)
        check_writer(self.host, self.backbone)
        self.shortcuts = shortcuts
        self.maps = {layer: shortcuts.get(layer, kind=options.kind) for layer in options.layers}
        self.check = TokenCheck(self.readout, options.short_list)

    def generate(self, inputs: Tensor | None = None, **given: Any) -> Exited:
        """Writes as `generate` of the model does, by greedy search or sampling, with the logits of the layer that a token left at.

        Args:
            inputs: As `generate` of transformers takes it.
            **given: All else that it takes; `custom_generate` alone is ours.

        Raises:
            ValueError: If texts are not written token by token (beams, assistants), without a cache or with one that does not grow, or
                the states of all layers are asked for.
        """
        check_given(given)
        # transformers gives a streamer to its own loops alone
        writing = Writing(
            self.host, self.backbone, self.maps, self.shortcuts, self.check, self.options, given.get("streamer")
        )
        with evaluating(self.host):
            output = self.host.generate(inputs, custom_generate=writing.write, **given)
        written = (output if isinstance(output, Tensor) else output.sequences).shape[1] - writing.prompt
        steps = max(written - 1, 0)  # some devices let one more step run before they look whether the text has ended
        return Exited(
            output, torch.tensor(writing.layers[:steps]), torch.tensor(writing.passes[:steps]), self.backbone.num_layers
        )
