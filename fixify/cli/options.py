"""Options that several commands share, so that they are spelled and explained the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _complete_recipe(incomplete: str) -> list[str]:
    from fixify.recipes.shipped import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output file.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Where to write.", show_default=False)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the first accelerator there is, else cpu.")
]
Seed = Annotated[int, typer.Option(help="Seed; the same seed gives the same result.", min=0)]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged (EMA) weights of a training checkpoint.")]
Arch = Annotated[
    str | None,
    typer.Option(
        help="Architecture, e.g. resnet50, timm/resnet50, torchvision/resnet50. Default: found out.", show_default=False
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A recipe: a name (fixify recipes ls) or a file. Options given here win over its own.",
        autocompletion=_complete_recipe,
        show_default=False,
    ),
]
RecipeName = Annotated[
    str, typer.Argument(help="A name (fixify recipes ls) or a file.", autocompletion=_complete_recipe)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change an option of the recipe, e.g. finetune.lr=3e-4; may be given again.",
        show_default=False,
    ),
]
