"""The shell's front door: parses, calls, prints."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    import typer.core
    from rich.console import Console
    from rich.markup import escape
    from safetensors import SafetensorError
except ImportError as error:
    raise SystemExit(
        f"The command line needs packages that are not installed ({error.name}). Install fusion-adapters with its extra [cli]."
    ) from error

from ..runs.terminal import json_line, lines_of_input, visible
from . import shortcuts
from .options import Json, RecipeFile, RecipeFiles, RunFolder, Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Layer fusion for frozen transformers models, from recipes.",
)
app.add_typer(shortcuts.app, name="shortcuts")
DEBUG = "FUSION_ADAPTERS_DEBUG"
CACHE, HERE = "--cache", Path("states")  # the option alone: a folder in that of the runs


class TrainCommand(typer.core.TyperCommand):
    """`--cache` may stand without a folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the command line."""
        for place, word in reversed(list(enumerate(args))):
            after = args[place + 1] if place + 1 < len(args) else "--"
            if word == CACHE and (after.startswith("--") or Path(after).is_file()):  # a file is a recipe, not the folder
                args = [*args[: place + 1], "", *args[place + 1 :]]
        return super().parse_args(ctx, args)


@app.command(cls=TrainCommand)
def train(
    ctx: typer.Context,
    recipes: RecipeFiles,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; it appears when the run is complete. Of several recipes the folder of all runs, by default outputs."
        ),
    ] = None,
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in that folder.")] = False,
    cache_folder: Annotated[
        str | None,
        typer.Option(
            CACHE,
            metavar="[DIR]",
            help="Train from layer states that 'cache' wrote, without the backbone. Several recipes compute there what is not there yet, "
            "by default in OUTPUT/states.",
        ),
    ] = None,
) -> None:
    """Train an adapter and write adapter/, metrics.json and run.json; several recipes with --cache, each in a folder of its name."""
    from ..runs.recipe import load_recipe
    from ..runs.several import load_recipes, run_recipes
    from ..runs.showing import show_run, show_several
    from ..runs.training import run_recipe

    if len(recipes) > 1:
        if cache_folder is None:
            raise ValueError(
                f"{len(recipes)} recipes are trained from one extraction of layer states, for which --cache asks. Add --cache, or --cache "
                "DIR for a folder of your own; without it, train each by a command of its own."
            )
        several, output = load_recipes(recipes, settings), output or Path("outputs")
        if not show_several(run_recipes(several, output, cache_folder or output / HERE, overwrite), several, output):
            raise typer.Exit(1)
        return
    if output is None:
        ctx.fail("Missing option '--output'.")
    if cache_folder == "":
        raise ValueError("--cache names no folder. One recipe trains from layer states that 'cache' wrote: --cache DIR.")
    chosen = load_recipe(recipes[0], settings)
    metrics = run_recipe(chosen, output, overwrite, None if cache_folder is None else Path(cache_folder))
    show_run(metrics, chosen, recipes[0].name, output)


@app.command()
def cache(
    recipes: RecipeFiles,
    output: Annotated[Path, typer.Option(help="Folder of the cache; an extraction that was stopped goes on there.")],
    settings: Settings = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32, float8 or int8 (half the bytes).")] = "float16",
) -> None:
    """Compute the layer states of the recipes' data once; train --cache then runs without the backbone."""
    from ..runs.several import cache_recipes, load_recipes
    from ..runs.training import cache_recipe

    chosen = load_recipes(recipes, settings)
    if len(chosen) > 1:
        print(cache_recipes(chosen, output, dtype))
    else:
        print(cache_recipe(chosen[recipes[0].stem], output, dtype))


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="The recipe of a comparison, see recipes/study_*.yaml.")],
    output: Annotated[Path, typer.Option(help="Folder of the comparison; one that was stopped goes on there.")],
    settings: Settings = None,
    quick: Annotated[bool, typer.Option(help="The recipe's small form, with output of the same shape.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
) -> None:
    """Compare methods over training sizes and seeds; write tables and figures."""
    from ..study import load_study, run_study

    run_study(load_study(recipe, settings, quick), output, workers)
    print(visible((output / "summary.md").read_text(encoding="utf-8")))
    print(output / "summary.json")


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="Folder of the benchmark; it appears when it is complete.")],
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, see recipes/benchmark/; by default the packaged corpus.")
    ] = None,
    settings: Settings = None,
    quick: Annotated[bool, typer.Option(help="Fewer examples, rounds and sizes; output of the same shape.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier benchmark in that folder.")] = False,
) -> None:
    """Measure speed, memory and checkpoint size against LoRA on this machine."""
    from ..bench import load_bench, run_bench

    run_bench(load_bench(recipe, settings, quick), output, overwrite)
    print((output / "summary.md").read_text(encoding="utf-8"))


@app.command()
def predict(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that train wrote, on one backbone.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A text (of a pair both, a tab between them); may be repeated. Without it, lines of standard input."
        ),
    ] = None,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the JSON to a file, a line a text, instead of printing.")
    ] = None,
) -> None:
    """Reload an adapter, or several, and print entities, classes, numbers, filled masks, or what follows a text."""
    texts = text or lines_of_input()
    if not texts:
        raise ValueError("There is no text to predict. Give --text '...', or lines on standard input.")
    from ..runs.answers import answers_of

    answers, console = answers_of(folders, output), Console()
    for note in answers.notes:
        Console(stderr=True).print(escape(visible(note)), style="yellow", highlight=False, soft_wrap=True)
    if output is not None:
        answers.write(texts, output)
        print(output)
    elif as_json:
        for line in answers.lines(texts):
            print(line, flush=True)  # whoever reads them need not wait for the last
    else:
        for shown in answers.shown(texts):
            console.print(shown, highlight=False, soft_wrap=isinstance(shown, str))


@app.command()
def inspect(
    folder: RunFolder,
    text: Annotated[str, typer.Option(help="The text to look at.")],
    output: Annotated[Path, typer.Option(help="The picture to write, a .png.")],
) -> None:
    """Draw which layers each token reads, as a heatmap of tokens against depth."""
    from ..runs.heatmap import draw_run

    draw_run(folder, text, output)
    print(output)


@app.command()
def budget(
    model: Annotated[str, typer.Option(help="A hub id or a folder; only its configuration is read.")],
    parameters: Annotated[str, typer.Option(help="What each method may train, heads excluded: 1000000, 1M, 2.5M, 50k.")],
    methods: Annotated[str, typer.Option(help="Names of methods, with commas between.")] = "dwatt,concat,deeper,mlp",
    lora: Annotated[str | None, typer.Option(help="Also LoRA on these modules, with commas between.")] = None,
    depth: Annotated[
        str | None, typer.Option(help="Of the first blocks alone (fusion_depth): a number or a fraction.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit methods to one budget of trainable parameters and print what each then costs."""
    from ..backbone.truncate import cut_model
    from ..runs.pretrained import locate
    from ..runs.recipe import BackboneRecipe
    from ..runs.tables import budget_table
    from ..tuner.costs import compare_budgets
    from ..tuner.counts import skeleton
    from ..tuner.sizes import read_count, read_depth

    names, modules = ([n.strip() for n in given.split(",") if n.strip()] for given in (methods, lora or ""))
    name, options = locate(BackboneRecipe.model_validate({"model": model}))
    backbone = skeleton(name, **options)
    if depth is not None:
        cut_model(backbone, read_depth(depth))
    rows = compare_budgets(backbone, names, read_count(parameters), modules)
    if as_json:
        print(json.dumps(rows))
    else:
        Console().print(budget_table(rows, f"{model}, at most {read_count(parameters):,} parameters"))


@app.command()
def estimate(
    recipe: RecipeFile,
    settings: Settings = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row; by default data.max_length, the most.")] = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GiB of the card; by default that of the GPU here, if there is one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what a recipe needs, without loading anything: memory of a step, disk of a cache, bytes of the adapter."""
    import torch

    from ..runs.estimating import estimate_recipe
    from ..runs.recipe import load_recipe
    from ..runs.showing import show_estimate

    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    found = estimate_recipe(load_recipe(recipe, settings), length)
    if as_json:
        print(json_line(found))
    else:
        show_estimate(found, memory)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, or an adapter's.")],
    backbone: Annotated[
        str | None, typer.Option(help="The model that the adapter is for, a hub id or a folder; it is loaded.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a saved adapter: files, digest, tensors and, with --backbone, that it loads. Exit code 1: a list of what is wrong."""
    from ..runs.showing import show_verdict
    from ..runs.verifying import verify as verify_adapter

    verdict = verify_adapter(folder, backbone)
    if as_json:
        print(json.dumps(verdict.as_json()))
    else:
        show_verdict(verdict)
    if verdict.problems:
        raise typer.Exit(1)


@app.command()
def export(
    folder: RunFolder,
    output: Annotated[Path, typer.Option(help="Folder to write; it appears when it is complete.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Write fusion and head as a program for torch alone: layer states in, scores out, wherever the backbone runs."""
    from ..runs.exporting import export_run
    from ..runs.tables import export_table

    note = export_run(folder, output, overwrite)
    if as_json:
        print(json_line(note))
        return
    console = Console()
    console.print(export_table(note, f"{note['adapter']['method']} and head of {folder}"))
    console.print(
        f"program: {output / 'program.pt2'}\nhow to call it: {output / 'README.md'}", highlight=False, soft_wrap=True
    )


@app.command(name="exec", context_settings={"allow_interspersed_args": False})
def execute_program(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="A program and its arguments, after --.")],
) -> None:
    """Run a program that imports peft itself (lm_eval, trl, a script of yours) with the method registered."""
    from ..runs.launching import execute

    raise typer.Exit(execute(command))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an error that a user can mend is one paragraph and exit code 2."""
    # a figure or an error is easier to find without the loading bars of every small model
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # it reports a kernel that is not installed when it is imported, and a cast at every product of an 8-bit backbone
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft still asks transformers 5 for it
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated.*")
    for stream in (sys.stdin, sys.stdout):  # a pipe has the system's encoding, on Windows often cp1252
        if not stream.isatty() and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")
    try:
        stopped = app(arguments, standalone_mode=False)
    except (ValueError, OSError, ImportError, SafetensorError) as error:  # the last for a full disk, say
        if os.environ.get(DEBUG):
            raise
        _print_error(error)
        raise SystemExit(2) from None
    except Exception as error:
        show: Any = getattr(error, "show", None)  # click's own errors: a wrong option, a missing argument
        if show is None:
            raise
        show()
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    if stopped:  # 130 after Ctrl-C
        raise SystemExit(stopped)


def _print_error(error: BaseException) -> None:
    text = visible(" ".join(str(error).split()) or type(error).__name__)
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(text)}", soft_wrap=True, highlight=False)
