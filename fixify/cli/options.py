"""Options that several commands share, so that they are spelled and explained the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DATA_PANEL = "Labels of the data"
MACHINE_PANEL = "Machine"


def _complete_recipe(incomplete: str) -> list[str]:
    from fixify.recipes.shipped import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output file.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Where to write.", show_default=False)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the first accelerator there is, else cpu.")
]
NprocPerNode = Annotated[
    int | None,
    typer.Option(
        help="Train in so many processes here, one a GPU, as torchrun does.",
        min=1,
        rich_help_panel=MACHINE_PANEL,
        show_default=False,
    ),
]
MaxRestarts = Annotated[
    int | None,
    typer.Option(
        help="Start them again, so often, if one is lost. Default: 0.",
        min=0,
        rich_help_panel=MACHINE_PANEL,
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed; the same seed gives the same result.", min=0)]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged (EMA) weights of a training checkpoint.")]
Arch = Annotated[
    str | None,
    typer.Option(
        help="Architecture, e.g. resnet50, timm/resnet50, torchvision/resnet50. Default: found out.", show_default=False
    ),
]
_DATA = (
    "A folder with train/ and val/, or a name: imagenet, cifar10, cifar100, fashion-mnist, torch/NAME, hfds/NAME "
    "(Hugging Face), wds/FOLDER (webdataset)."
)
Data = Annotated[str, typer.Option(help=_DATA)]
RecipeData = Annotated[str | None, typer.Option("--data", help=f"{_DATA} Default: the recipe's.", show_default=False)]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        help="A file that says which class has which label: names in order, or name and label (text, TSV, JSON, YAML).",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
ClassOrder = Annotated[
    str | None,
    typer.Option(
        help="How class folders are sorted: natural (timm) or lexical (torchvision). Default: natural, and by name "
        "where the checkpoint has class names.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
InputKey = Annotated[
    str | None,
    typer.Option(
        help="Of hfds/... the column of images, of wds/... their endings (jpg;png).",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
TargetKey = Annotated[
    str | None,
    typer.Option(
        help="Of hfds/... the column of labels, of wds/... their field in the JSON files.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
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
