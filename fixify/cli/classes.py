"""Run `fixify classes keep|add|rename|merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fixify.cli.options import Device, Force, Json, Out
from fixify.cli.output import Output
from fixify.errors import UsageError

if TYPE_CHECKING:
    from fixify.classes import Edited

app = typer.Typer(
    no_args_is_help=True,
    help="Keep, add, rename and merge classes of a slim checkpoint; those that stay keep their logits bit for bit.",
)

_Checkpoint = Annotated[Path, typer.Argument(help="A slim checkpoint.")]
_Names = Annotated[list[str] | None, typer.Argument(help="Classes, by name or number.", show_default=False)]
_Labels = Annotated[
    Path | None,
    typer.Option(help="A file of classes instead: one per line, or a class map.", show_default=False),
]


def _given(names: list[str] | None, labels: Path | None) -> list[str] | Path | None:
    """Return the names, or the file of them.

    Raises:
        UsageError: Both are given.
    """
    if names and labels is not None:
        raise UsageError("Classes are named as arguments or in a file, not both.", hint="Drop --labels.")
    return labels if labels is not None else (names or None)


def _required(names: list[str] | None, labels: Path | None) -> list[str] | Path:
    given = _given(names, labels)
    if given is None:
        raise UsageError("No classes are given.", hint="Name them as arguments, or give a file: --labels FILE")
    return given


def _tell(done: Edited, output: Output) -> None:
    from fixify._values import counted

    for note in done.notes:
        output.say(note)
    output.result(done.to_dict())
    output.say(
        f"Wrote {done.path}: {counted(done.before, 'class', 'classes')} before, "
        f"{counted(done.info.num_classes, 'class', 'classes')} now."
    )


@app.command("keep")
def keep(
    checkpoint: _Checkpoint,
    names: _Names = None,
    labels: _Labels = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Keep some classes, in the order given, and drop the others."""
    import fixify

    _tell(fixify.keep_classes(checkpoint, _required(names, labels), out, force=force), Output(as_json=as_json))


@app.command("add")
def add(
    checkpoint: _Checkpoint,
    names: Annotated[list[str] | None, typer.Argument(help="Names of the new classes.", show_default=False)] = None,
    labels: _Labels = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="A folder with a folder of images per new class: choose codes and biases by them.",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Class vectors, one row per new class: choose codes by them.", show_default=False),
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name of the matrix in --embeddings.", show_default=False)
    ] = None,
    device: Device = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add classes with free codes behind the others.

    Without --images and --embeddings the codes are arbitrary, and the new classes have to be learned.
    """
    import fixify

    done = fixify.add_classes(
        checkpoint,
        _given(names, labels),
        out,
        images=images,
        embeddings=embeddings,
        key=tuple(key or ()),
        device=device,
        force=force,
    )
    output = Output(as_json=as_json)
    _tell(done, output)
    if images is None and embeddings is None:
        output.next_step(f"fixify finetune {done.path} --data DATA", "learn the new classes")


@app.command("rename")
def rename(
    checkpoint: _Checkpoint,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[OLD=NEW]...", help="Old and new names.", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A file of the names of all classes instead.", show_default=False)
    ] = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Give classes other names; the weights stay as they are."""
    import fixify

    given = _required(names, labels)
    new = given if isinstance(given, Path) else dict(_pair(text) for text in given)
    _tell(fixify.rename_classes(checkpoint, new, out, force=force), Output(as_json=as_json))


@app.command("merge")
def merge(
    checkpoint: _Checkpoint,
    names: Annotated[list[str], typer.Argument(help="Classes, by name or number.")],
    into: Annotated[str, typer.Option(help="Name of the new class.")],
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make one class of several, in the place of the first."""
    import fixify

    _tell(fixify.merge_classes(checkpoint, names, into, out, force=force), Output(as_json=as_json))


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.rpartition("=")
    if not equals or not old or not new:
        raise UsageError(f"Not a pair of names: {text!r}.", hint="For example: fixify classes rename CKPT tench=Tinca")
    return old, new
