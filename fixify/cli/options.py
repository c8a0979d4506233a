"""Options of the commands: those that several share, and those generated from an option class.

A field of an option class (`fixify._options.option`) has a help, flags and a default. `takes` gives a command one
parameter per field, so that a default is written once, in the class.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from fixify._options import CheckedOptions

PANELS = {
    "bare": "Classifier without a network",
    "augmentation": "Augmentation (timm's names)",
    "distillation": "Distillation",
    "labels": "Labels of the data",
    "machine": "Machine",
    "watching": "Watching",
}
"""Titles of the parts of a command's help."""

_SOURCE = "_option_class"
_NOT_GIVEN: tuple[Any, ...] = (None, (), [])


def _complete_recipe(incomplete: str) -> list[str]:
    from fixify.recipes.shipped import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


# Options that several commands share.

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output file.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Where to write.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run in the folder, exactly.")]
Download = Annotated[bool, typer.Option("--download", help="Download torch/... data that is missing.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the first accelerator, else cpu.")]
NprocPerNode = Annotated[
    int | None,
    typer.Option(
        help="Train in N processes on this machine, one per GPU, as torchrun does.",
        min=1,
        rich_help_panel=PANELS["machine"],
        show_default=False,
    ),
]
MaxRestarts = Annotated[
    int | None,
    typer.Option(
        help="Restart the processes up to N times after one is lost. Default: 0.",
        min=0,
        rich_help_panel=PANELS["machine"],
        show_default=False,
    ),
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged (EMA) weights of a training checkpoint.")]
Arch = Annotated[
    str | None,
    typer.Option(
        help="Architecture, e.g. resnet50, timm/resnet50, torchvision/resnet50. Default: read from the file.",
        show_default=False,
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
        help="File with the label of each class: names in order, or name and label (text, TSV, JSON, YAML).",
        rich_help_panel=PANELS["labels"],
        show_default=False,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A recipe: a name (fixify recipes ls) or a file. Options of the command line take precedence.",
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
        help="Change an option of the recipe, e.g. finetune.lr=3e-4; can be repeated.",
        show_default=False,
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        help="Log to tensorboard, trackio or wandb as well; can be repeated.",
        rich_help_panel=PANELS["watching"],
        show_default=False,
    ),
]
TensorBoard = Annotated[
    bool,
    typer.Option("--tensorboard", help="Short for --track tensorboard.", rich_help_panel=PANELS["watching"]),
]


# Options generated from an option class.


def takes(source: str, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a class. The command receives those that were typed as the dictionary `options`.

    Args:
        source: "module:Class". It is imported only when the command is run or asked for its help.
        names: The fields; none for all that have a flag.
    """

    def mark(command: Callable[..., None]) -> Callable[..., None]:
        setattr(command, _SOURCE, (source, names))
        return command

    return mark


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return the function that Typer makes a command of: one parameter per option of `takes`."""
    if not hasattr(command, _SOURCE):
        return command
    source, names = getattr(command, _SOURCE)
    module, _, name = source.partition(":")
    options: type[CheckedOptions] = getattr(importlib.import_module(module), name)
    generated = parameters(options, names)
    # A hidden old spelling is a parameter of its own, with the name of its field.
    field_of = {parameter.name: field for field, found in generated.items() for parameter in found}

    def run(**values: Any) -> None:
        given = {field: values.pop(name) for name, field in field_of.items() if values[name] not in _NOT_GIVEN}
        command(**{key: value for key, value in values.items() if key not in field_of}, options=given)

    own = inspect.signature(command, eval_str=True).parameters.values()
    shown = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in own if parameter.name != "options"]
    shown += [parameter for found in generated.values() for parameter in found]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    run.__doc__ = command.__doc__
    return run


def parameters(options: type[CheckedOptions], names: tuple[str, ...] = ()) -> dict[str, list[inspect.Parameter]]:
    """Build the parameters of a command from an option class.

    Args:
        options: The class.
        names: The fields; none for all.

    Returns:
        For each field that has a flag, its parameter, then one for its hidden spellings if it has any. All default to
        None, which stands for "not given".
    """
    from fixify._options import flag_of

    found: dict[str, list[inspect.Parameter]] = {}
    for name in names or options.model_fields:
        info = options.model_fields[name]
        flag = flag_of(name, info)
        kind = _plain_type(info.annotation)
        if not flag.names:
            continue
        spellings = flag.names
        if kind is bool and info.default is not False:
            spellings = tuple(f"{spelling}/--no-{spelling.removeprefix('--')}" for spelling in flag.names)
        shown = typer.Option(
            *spellings,
            help=help_of(info),
            rich_help_panel=PANELS[flag.panel] if flag.panel else None,
            show_default=False,
            metavar=flag.metavar,
        )
        found[name] = [_parameter(name, kind, shown)]
        if flag.hidden:
            found[name].append(_parameter(f"{name}_as_before", kind, typer.Option(*flag.hidden, hidden=True)))
    return found


def help_of(info: FieldInfo) -> str:
    """Write the help of a field: its description, the values that a `Literal` allows, and the default."""
    said, default, own = (info.description or "").partition(" Default:")
    choices = _choices(info.annotation)
    if choices:
        said += f" One of {', '.join(choices)}."
    unset = info.default is None or info.default is False or info.default == ()
    if not default and not unset and not info.is_required():
        default, own = " Default:", f" {_spelled(info.default)}."
    return said + default + own


def _parameter(name: str, kind: Any, shown: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, shown]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain_type(hint: Any) -> Any:
    """Return what Typer parses: no None, no limits, text for a `Literal` or a path, a list for any number of values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return _plain_type(kinds[0]) if len(kinds) == 1 else str
    if origin is Annotated:
        return _plain_type(arguments[0])
    if origin is Literal or hint is Path:
        return str
    if origin is tuple and arguments[-1] is Ellipsis:
        return list[_plain_type(arguments[0])]  # type: ignore[misc]
    return hint


def _choices(hint: Any) -> list[str]:
    """List the values of a `Literal`; none if something else is allowed too."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    if sum(argument is not type(None) for argument in get_args(hint)) > 1 and get_origin(hint) is not tuple:
        return []
    return [choice for argument in get_args(hint) for choice in _choices(argument)]


def _spelled(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{part:.4g}" for part in value)
    return {True: "yes"}.get(value, str(value)) if isinstance(value, bool) else str(value)
