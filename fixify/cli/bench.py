"""Run `fixify bench head|loss|convert|step`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fixify.cli.options import Force, Json
from fixify.cli.output import Output

if TYPE_CHECKING:
    from fixify.benchmarks.convert import ConvertBenchmark
    from fixify.benchmarks.head import HeadBenchmark
    from fixify.benchmarks.loss import LossBenchmark
    from fixify.benchmarks.samples import Size

app = typer.Typer(
    no_args_is_help=True, help="Measure fixed heads beside learned ones on this machine: head, loss, convert, step."
)

_Plot = Annotated[
    Path | None, typer.Option("--plot", help="Draw it, too: a .png, .pdf or .svg file.", show_default=False)
]
_Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", metavar="NxC", help="Features x classes; can be repeated.", show_default=False),
]
_Heads = Annotated[
    list[str] | None,
    typer.Option(
        "--head",
        metavar="KIND",
        help="hadamard, matched, orthogonal, binary, binary-64, ...; can be repeated.",
        show_default=False,
    ),
]
_Threads = Annotated[int | None, typer.Option(help="Threads. Default: all cores.", min=1, show_default=False)]
_Batch = Annotated[int, typer.Option("--batch", min=1, help="Samples per batch.")]


@app.command("head")
def head(
    size: _Sizes = None,
    kind: _Heads = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Samples per batch; can be repeated. Default: 1, 64, 256.", min=1, show_default=False),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Threads; can be repeated. Default: 1, and all cores.", min=1, show_default=False),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Time forward and backward in training, not the forward pass in use.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=3, help="Turns, of which the least time counts.")] = 15,
    against: Annotated[
        Path | None,
        typer.Option(help="The --json of another run: exit with 3 if a ratio is lower.", show_default=False),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Share of a ratio that may be lost.", min=0, max=1)] = 0.3,
    plot: _Plot = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time the forward pass of fixed heads beside nn.Linear, in turns in one run.

    The figures are ratios: the time of nn.Linear divided by that of the head. Above 1 the head is faster.
    """
    from fixify.benchmarks.head import BATCHES, SIZES, benchmark_head, compare_ratios, read_reference
    from fixify.benchmarks.machine import thread_counts
    from fixify.benchmarks.samples import KINDS
    from fixify.errors import CheckFailed
    from fixify.reporting.benchmark_tables import comparison_table, head_table

    output = Output(as_json=as_json)
    _check(plot, force)
    reference = None if against is None else read_reference(against)
    sizes = _sizes(size) or SIZES
    batches, counts = batch or BATCHES, threads or thread_counts()
    with output.progress("measuring", total=len(sizes) * len(batches) * len(counts)) as advance:
        found = benchmark_head(
            sizes,
            kinds=kind or KINDS,
            batches=batches,
            num_threads=counts,
            backward=backward,
            repeats=repeats,
            on_row=lambda row: advance(note=f"{row.size}, batch {row.batch}"),
        )
    comparison = None if reference is None else compare_ratios(found, reference, tolerance=tolerance)
    said = {} if comparison is None else {"against": comparison.to_dict()}
    worse = [] if comparison is None or not comparison.regressions else [comparison_table(comparison)]
    output.result(found.to_dict() | said, head_table(found), *worse)
    _draw(found, plot, force, output)
    if comparison is not None:
        if comparison.regressions:
            raise CheckFailed(
                f"{len(comparison.regressions)} of {len(comparison.changes)} ratios lost more than "
                f"{100 * tolerance:.0f} % against {against}.",
                hint="Close other programs and run it again; a larger --tolerance allows for a noisy machine.",
            )
        output.say(f"{len(comparison.changes)} ratios compared with {against}: none lost more than {tolerance:.0%}")


@app.command("loss")
def loss(
    classes: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of classes; can be repeated. Default: 1,000 to 1,000,000.", min=2, show_default=False
        ),
    ] = None,
    num_features: Annotated[int, typer.Option("--features", min=1, help="Width of the features.")] = 512,
    batch: _Batch = 64,
    kind: Annotated[str, typer.Option("--head", help="Kind of the fixed head.")] = "hadamard",
    threads: _Threads = None,
    budget: Annotated[float, typer.Option(min=0.01, help="Memory that a loss may take, in GB.")] = 8.0,
    repeats: Annotated[int, typer.Option(min=1, help="Passes, of which the least time counts.")] = 5,
    plot: _Plot = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure time and memory of the loss over many classes: learned, fixed, and fixed in blocks of classes.

    Each figure comes from a process of its own. What cannot fit the budget is not tried.
    """
    from fixify.benchmarks.loss import CLASSES, benchmark_loss
    from fixify.reporting.benchmark_tables import loss_table

    output = Output(as_json=as_json)
    _check(plot, force)
    wanted = classes or CLASSES
    with output.progress("measuring", total=len(wanted)) as advance:
        found = benchmark_loss(
            wanted,
            kind=kind,
            num_features=num_features,
            batch=batch,
            num_threads=threads,
            budget=1e9 * budget,
            repeats=repeats,
            on_row=lambda row: advance(note=f"{row.num_classes:,} classes"),
        )
    output.result(found.to_dict(), loss_table(found))
    _draw(found, plot, force, output)


@app.command("convert")
def convert(
    size: _Sizes = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--head", metavar="KIND", help="matched, binary, binary-64, ...; can be repeated.", show_default=False
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Feature vectors to calibrate with.")] = 0,
    threads: _Threads = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which a conversion is stopped.")] = 600.0,
    plot: _Plot = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure time and memory of choosing codes for a classifier with correlated class vectors."""
    from fixify.benchmarks.convert import KINDS, SIZES, benchmark_convert
    from fixify.reporting.benchmark_tables import convert_table

    output = Output(as_json=as_json)
    _check(plot, force)
    sizes, kinds = _sizes(size) or SIZES, kind or KINDS
    with output.progress("measuring", total=len(sizes) * len(kinds)) as advance:
        found = benchmark_convert(
            sizes,
            kinds=kinds,
            num_images=images,
            num_threads=threads,
            timeout=timeout,
            on_row=lambda row: advance(note=f"{row.size}, {row.kind}"),
        )
    output.result(found.to_dict(), convert_table(found))
    _draw(found, plot, force, output)


@app.command("step")
def step(
    model: Annotated[str, typer.Argument(help="A network of timm, torchvision or the paper.")] = (
        "mobilenetv3_small_050"
    ),
    kind: Annotated[str, typer.Option("--head", help="Kind of the fixed head.")] = "hadamard",
    num_classes: Annotated[int, typer.Option("--classes", min=2, help="Number of classes.")] = 11_221,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Images per batch and process.")] = 32,
    image_size: Annotated[int, typer.Option("--img-size", min=1, help="Height and width of the images.")] = 64,
    processes: Annotated[
        list[int] | None,
        typer.Option(help="Number of processes; can be repeated. Default: 1 and 2.", min=1, show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each kind; the median counts.")] = 15,
    as_json: Json = False,
) -> None:
    """Show where the time of a fine-tuning step goes, with a learned and with a fixed classifier."""
    from fixify.benchmarks.step import benchmark_step
    from fixify.reporting.benchmark_tables import step_table

    output = Output(as_json=as_json)
    counts = processes or [1, 2]
    with output.progress("measuring", total=len(counts)) as advance:
        found = benchmark_step(
            model,
            head=kind,
            num_classes=num_classes,
            batch=batch,
            image_size=image_size,
            processes=counts,
            repeats=repeats,
            on_row=lambda row: advance(note=f"{row.processes} processes"),
        )
    output.result(found.to_dict(), step_table(found))


def _sizes(texts: list[str] | None) -> list[Size]:
    from fixify.benchmarks.samples import Size

    return [Size.parse(text) for text in texts or []]


def _check(plot: Path | None, force: bool) -> None:
    if plot is not None:
        from fixify.reporting.benchmark_plots import check_plot

        check_plot(plot, force=force)


def _draw(
    found: HeadBenchmark | LossBenchmark | ConvertBenchmark, plot: Path | None, force: bool, output: Output
) -> None:
    if plot is not None:
        from fixify.reporting.benchmark_plots import draw

        draw(found, plot, force=force)
        output.say(f"plot: {plot}")
