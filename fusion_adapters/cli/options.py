"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, see recipes/.")]
RecipeFiles = Annotated[list[Path], typer.Argument(metavar="RECIPE", help="Recipes, see recipes/.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe: section.key=value.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that train wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
