"""A heatmap of the attention over depth: which layers each token reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from ..backbone.atomic import written_whole
from .plots import spaced
from .predicting import depth_map, load_run
from .terminal import visible

MAX_TOKENS = 60
TALLEST = 6.0  # inches of a map of many layers, whose rows are then narrower than a label
LINE, MOST = 0.2, 32  # inches from one label to the next; labels that can be found
_BLANKS = str.maketrans({"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"})


def draw_depth_map(
    tokens: Sequence[str], layers: Sequence[int], weights: Tensor, path: str | Path, title: str, last_layer: int
) -> None:
    """Draws tokens against layers and writes a PNG.

    Args:
        tokens: The word pieces as text, `T` of them; at most 60 are drawn.
        layers: The numbers of the `N` layers, ascending; where they are many, some have their number on the axis.
        weights: `(T, N)`, or `(T, H, N)`, of which the mean over the heads is drawn.
        path: The PNG to write.
        title: Printed above.
        last_layer: The number of the last block, to name it on the axis.

    Raises:
        ValueError: If the path does not end in .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"The picture {str(path)!r} must be a .png file.")
    heads = weights.shape[1] if weights.dim() == 3 else 1
    grid = (weights.mean(dim=1) if weights.dim() == 3 else weights)[:MAX_TOKENS].T  # (N, T)
    shown = [shown_piece(token) for token in tokens[:MAX_TOKENS]]
    height = min(0.42 * len(layers), max(TALLEST, LINE * len(layers) / 2))  # inches of the map itself
    figure = Figure(figsize=(max(5.0, 0.42 * len(shown) + 2.2), max(2.6, height + 1.9)), layout="constrained")
    axes = figure.add_subplot()
    # one hue from light to dark: reads the same in print and for the colour-blind; uniform weights lie mid-scale or below
    image = axes.imshow(
        grid.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=max(float(grid.max()), 2 / len(layers)), origin="lower"
    )
    # a token may hold dollar signs, which are no formula
    axes.set_xticks(range(len(shown)), shown, rotation=55, ha="right", rotation_mode="anchor", fontsize=9, parse_math=False)
    names = {0: "0 (embeddings)", last_layer: f"{last_layer} (last block)"}
    ticks = spaced(layers, min(MOST, int(height / LINE)))
    axes.set_yticks(ticks, [names.get(layers[i], str(layers[i])) for i in ticks], fontsize=9)
    axes.set_ylabel("layer")
    cut = f", first {MAX_TOKENS} of {len(tokens)} tokens" if len(tokens) > MAX_TOKENS else ""
    axes.set_title(title + (f" (mean of {heads} heads{cut})" if heads > 1 or cut else ""), fontsize=10)
    bar = figure.colorbar(image, ax=axes, label="weight over depth")
    bar.ax.axhline(1 / len(layers), color="black", linewidth=1, linestyle=":")
    axes.set_xlabel(f"token (dotted line on the scale: uniform weight, 1/{len(layers)})", fontsize=9)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def shown_piece(token: str) -> str:
    """A piece as a label: without the blanks around it, unless it has nothing else."""
    text = token.strip(" ") or "\N{OPEN BOX}" * len(token)
    return visible(text.translate(_BLANKS))


def draw_run(folder: str | Path, text: str, output: Path) -> None:
    """Draws which layers each token of a text reads in a run, see `draw_depth_map`.

    Args:
        folder: A folder that `fusion-adapters train` wrote.
        text: The text.
        output: The picture to write, a .png.

    Raises:
        ValueError: See `depth_map`.
    """
    run = load_run(folder)
    tokens, layers, weights = depth_map(run, text)
    config = run.model.active_peft_config
    title = f"{config.fusion}: attention over the layers of {run.recipe.backbone.model}"
    depth = config.fusion_depth or config.fusion_num_layers
    # of both stacks of an encoder-decoder: the weights are the decoder's
    draw_depth_map(tokens, layers, weights, output, title, depth[-1] if isinstance(depth, list) else depth)
