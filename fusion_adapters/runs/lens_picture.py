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
GREY = (0.6, 0.6, 0.6)
LEAST = 0.08  # of the colour, at a probability of 0
SHADES = (0.1, 0.5, 0.9)  # in the legend


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
    found = view_text(folder, text, kind)
    title = f"What each layer of {found.model} would say"
    draw_view(found.pieces, found.view, found.said, output, title, found.skip, found.next)


def draw_view(
    pieces: Sequence[str],
    view: View,
    said: Sequence[Sequence[str]],
    path: Path,
    title: str,
    skip: int = 0,
    says_next: bool = True,
) -> None:
    """Draws layers against positions, each cell with the first token under the cast.

    Blue where it is the one that the model itself says at the end, orange elsewhere; the deeper, the more probable.

    Args:
        pieces: The pieces of the text, `T` of them; the first 24 are drawn.
        view: What the layers say.
        said: Its tokens as text, `N` lists of `T`.
        path: The PNG to write.
        title: Printed above.
        skip: So many positions at the beginning were left out of the fit; what is cast from there is grey.
        says_next: Whether what is said at a position is the piece after it.
    """
    agrees, sure = view.agrees[:, :MOST].numpy(), view.probabilities[:, :MOST].numpy()  # (N, T)
    rows, columns = agrees.shape
    hue = np.where(agrees[..., None], AGREE, OTHER)  # (N, T, 3)
    hue[:-1, :skip] = GREY
    picture = _shade(hue, sure[..., None])
    figure = Figure(figsize=(max(7.0, COLUMN * columns + 1.5), ROW * rows + 1.75), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, aspect="auto", origin="lower", interpolation="nearest")
    for (row, column), probability in np.ndenumerate(sure):
        dark = bool(agrees[row, column]) and probability > 0.55
        axes.text(
            column, row, _short(said[row][column]), ha="center", va="center", fontsize=7, parse_math=False,
            color="white" if dark else "black", clip_on=True,
        )  # fmt: skip
    usual = max(view.kinds[:-1], key=view.kinds[:-1].count)
    axes.set_yticks(range(rows), [_name(view, i, usual) for i in range(rows)], fontsize=7.5)
    axes.set_xticks(range(columns), [_short(piece) for piece in pieces[:MOST]], fontsize=8, parse_math=False)
    axes.tick_params(labeltop=True)
    axes.set_ylabel("layer", fontsize=9)
    axes.set_xlabel(
        "the text; a cell says what comes next" if says_next else "the text; a cell says what stands there", fontsize=9
    )
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    own = Rectangle((-0.5, rows - 1.5), columns, 1, fill=False, edgecolor="black", linewidth=1.2, clip_on=False)
    axes.add_patch(own)
    cut = f", first {MOST} of {len(pieces)} tokens" if len(pieces) > MOST else ""
    axes.set_title(f"{title} ({usual}{cut})", fontsize=10)
    keys = [
        Patch(color=tuple(_shade(np.array(hue), np.array(p)).tolist()), label=f"{name}, p = {p}")
        for name, hue in (("the model's own answer", AGREE), ("another token", OTHER))
        for p in SHADES
    ]
    keys += [Patch(color=GREY, label="not fitted here")] if skip else []
    figure.legend(
        handles=keys, loc="outside lower center", ncols=min(len(keys), max(2, columns // 3)), frameon=False, fontsize=8
    )
    with written_whole(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # drawn as a box: models speak more scripts than a font
        figure.savefig(temporary, dpi=150, format="png")


def _shade(hue: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """A colour, the nearer to white the smaller the probability."""
    return 1 - (LEAST + (1 - LEAST) * probability) * (1 - hue)


def _name(view: View, row: int, usual: str) -> str:
    layer = view.layers[row]
    if row == len(view.layers) - 1:
        return f"{layer} (the model)"
    notes = [note for note in ("embeddings" if layer == 0 else "", view.kinds[row]) if note not in ("", usual)]
    return f"{layer} ({', '.join(notes)})" if notes else str(layer)


def _short(piece: str) -> str:
    text = shown_piece(piece)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
