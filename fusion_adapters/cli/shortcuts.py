"""`fusion-adapters shortcuts`: fit linear shortcuts, judge them, look through the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..runs.terminal import json_line, visible
from .options import Json, Settings

app = typer.Typer(no_args_is_help=True, help="Linear shortcuts: cast a layer's state to the last layer by one matrix.")

ShortcutRecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe of shortcuts, see recipes/shortcuts_*.yaml.")
]
Fitted = Annotated[Path, typer.Option("--shortcuts", metavar="DIR", help="A folder that 'shortcuts fit' wrote.")]


@app.command()
def fit(
    recipe: ShortcutRecipeFile,
    output: Annotated[Path, typer.Option(help="Folder of the shortcuts; a fit that was stopped goes on for the same one.")],
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option(help="Replace earlier shortcuts in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Fit shortcuts in one pass over the training rows and write shortcuts.safetensors and shortcuts.json."""
    from ..runs.shortcut_recipe import load_shortcut_recipe
    from ..runs.shortcut_runs import fit_recipe

    run = fit_recipe(load_shortcut_recipe(recipe, settings), output, overwrite)
    if as_json:
        print(json_line(run))
        return
    size = sum(run["bytes"].values()) / 2**20
    print(
        f"{run['shortcuts']} shortcuts, fitted to {run['positions']:,} positions of {run['rows']:,} rows in {run['seconds']['fit']:.0f} s, "
        f"{size:,.1f} MiB"
    )
    print(output)


@app.command()
def tune(
    recipe: ShortcutRecipeFile,
    shortcuts: Fitted,
    output: Annotated[Path, typer.Option(help="Folder of the shortcuts, the trained ones among them.")],
    layers: Annotated[
        str | None, typer.Option(help="Train those from these layers alone, with commas between; each costs time.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 4,
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option(help="Replace earlier shortcuts in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train shortcuts by what the head says after the cast, from fitted ones on: kinds 'kl' and 'kl fused'."""
    from ..runs.shortcut_recipe import load_shortcut_recipe
    from ..runs.shortcut_tuning import tune_recipe

    chosen = load_shortcut_recipe(recipe, settings)
    try:
        wanted = None if layers is None else [int(part) for part in layers.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--layers {layers!r} is no list of layers. Give numbers with commas between: --layers 6,12,18."
        ) from error
    run = tune_recipe(chosen, shortcuts, output, wanted, epochs, overwrite)
    if as_json:
        print(json_line(run))
        return
    for told in run["trained"]:
        before, after = told["divergence"][0], told["divergence"][told["kept"]]
        print(
            f"{told['kind']} from layer {told['source']}: {before:.3f} to {after:.3f} nats on {run['held_out']:,} held-out positions"
        )
    print(output)


@app.command()
def evaluate(
    recipe: ShortcutRecipeFile,
    shortcuts: Fitted,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the scores; by default 'evaluation' in that of the shortcuts.")
    ] = None,
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option(help="Replace earlier scores in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Judge shortcuts on test rows: r2, Precision@k and surprisal against the full model; tables and pictures."""
    from ..runs.shortcut_recipe import load_shortcut_recipe
    from ..runs.shortcut_runs import evaluate_recipe

    folder, scores = evaluate_recipe(load_shortcut_recipe(recipe, settings), shortcuts, output, overwrite)
    if as_json:
        print(json_line([score.as_json() for score in scores]))
        return
    print(visible((folder / "summary.md").read_text(encoding="utf-8")))
    print(folder)


@app.command(name="exit")
def exit_early(
    recipe: ShortcutRecipeFile,
    shortcuts: Fitted,
    output: Annotated[Path, typer.Option(help="Folder of the exits; it appears when it is complete.")],
    agreement: Annotated[
        float, typer.Option(help="Share of positions, or texts, that keep the full model's choice.")
    ] = 0.95,
    exits: Annotated[int, typer.Option(help="Also choose so many layers to leave at; each costs a look at the head.")] = 3,
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option(help="Replace earlier exits in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Find when to leave the model early: thresholds for an agreement on dev rows, and the layers that they save on test rows."""
    from ..runs.shortcut_exits import exit_recipe
    from ..runs.shortcut_recipe import load_shortcut_recipe

    chosen = load_shortcut_recipe(recipe, settings)
    folder, found = exit_recipe(chosen, shortcuts, output, agreement, exits, overwrite)
    if as_json:
        print(json_line(found))
        return
    print(visible((folder / "summary.md").read_text(encoding="utf-8")))
    print(folder)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that 'shortcuts fit' wrote.")],
    text: Annotated[str, typer.Option(help="The text to look at.")],
    output: Annotated[Path, typer.Option(help="The picture to write, a .png.")],
    kind: Annotated[
        str | None, typer.Option(help="fused, mat or identity; by default fused, and mat where there is none.")
    ] = None,
) -> None:
    """Draw what each layer would say at each position of a text: tokens against layers."""
    from ..runs.lens_picture import draw_lens

    draw_lens(folder, text, output, kind)
    print(output)
