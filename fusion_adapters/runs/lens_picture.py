"""The logit-lens picture: for each position of a text, from the bottom up, what each layer would say."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..backbone.atomic import written_whole
from ..shortcuts.lens import View
from .heatmap import shown_piece
from .shortcut_runs import view_text

MOST = 24  # positions that are drawn
WIDEST = 9  # letters in a cell
COLUMN, ROW = 0.74, 0.235  # inches
AGREE, OTHER = (0.0, 0.447, 0.698), (0.902, 0.624, 0.0)  # Okabe and Ito's blue and orange
LEAST = 0.08  # of the colour, at a probability of 0


def draw_lens(folder: str | Path, text: str, output: Path, kind: str | None = None) -> None:
    """Draws what each layer of a language model would say at each position of a text.

    Args:
        folder: A folder that `fusion-adapters shortcuts fit` wrote.
        text: The text.
        output: The picture to write, a .png.
        kind: The kind of shortcuts; None for the fused ones, and `mat` where there are none.

    Raises:
        ValueError: If the output is no .png, and see `view_text`.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"The picture {str(output)!r} must be a .png file.")
    pieces, view, said, model = view_text(folder, text, kind)
    draw_view(pieces, view, said, output, f"What each layer of {model} would say")


def draw_view(pieces: Sequence[str], view: View, said: Sequence[Sequence[str]], path: Path, title: str) -> None:
    """Draws layers against positions, each cell with the first token under the cast.

    Blue where it is the one that the model itself says at the end, orange elsewhere; the deeper, the more probable.

    Args:
        pieces: The pieces of the text, `T` of them; the first 24 are drawn.
        view: What the layers say.
        said: Its tokens as text, `N` lists of `T`.
        path: The PNG to write.
        title: Printed above.
    """
    agrees, sure = view.agrees[:, :MOST].numpy(), view.probabilities[:, :MOST].numpy()  # (N, T)
    rows, columns = agrees.shape
    hue = np.where(agrees[..., None], AGREE, OTHER)
    depth = LEAST + (1 - LEAST) * sure[..., None]
    picture = 1 - depth * (1 - hue)  # (N, T, 3), towards white
    figure = Figure(figsize=(COLUMN * columns + 1.9, ROW * rows + 1.75), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, aspect="auto", origin="lower", interpolation="nearest")
    for (row, column), probability in np.ndenumerate(sure):
        dark = bool(agrees[row, column]) and probability > 0.55
        axes.text(
            column, row, _short(said[row][column]), ha="center", va="center", fontsize=7, parse_math=False,
            color="white" if dark else "black", clip_on=True,
        )  # fmt: skip
    last = len(view.layers) - 1
    axes.set_yticks(range(rows), [_name(view, i) for i in range(rows)], fontsize=7.5)
    axes.set_xticks(range(columns), [_short(piece) for piece in pieces[:MOST]], fontsize=8, parse_math=False)
    axes.set_xlabel("the text; a causal model says what comes next")
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.add_patch(Rectangle((-0.5, last - 0.5), columns, 1, fill=False, edgecolor="black", linewidth=1.2, clip_on=False))
    cut = f" (first {MOST} of {len(pieces)} tokens)" if len(pieces) > MOST else ""
    axes.set_title(title + cut, fontsize=10)
    keys = [Patch(color=AGREE, label="the model's own answer"), Patch(color=OTHER, label="another token")]
    figure.legend(
        handles=keys, loc="outside lower center", ncols=2, frameon=False, fontsize=8, title="deeper: more probable"
    )
    with written_whole(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # drawn as a box: models speak more scripts than a font
        figure.savefig(temporary, dpi=150, format="png")


def _name(view: View, row: int) -> str:
    layer = view.layers[row]
    if row == len(view.layers) - 1:
        return f"{layer} (the model)"
    where = f"{layer} (embeddings)" if layer == 0 else str(layer)
    return f"{where}, {view.kinds[row]}" if len(set(view.kinds[:-1])) > 1 else where


def _short(piece: str) -> str:
    text = shown_piece(piece)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
