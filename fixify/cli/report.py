"""`fixify report MODELS...` and `fixify report RUN_DIR...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fixify.cli.options import Arch, Force, Json, Out
from fixify.cli.output import Output


def report(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Architecture names and checkpoints, or folders of runs. Default: *.fixed.safetensors here."
        ),
    ] = None,
    all_models: Annotated[
        bool,
        typer.Option("--all", help="Every architecture of timm, torchvision and the paper: what can be converted."),
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The networks of Hoffer et al. (2018): their figures beside ours.")
    ] = False,
    arch: Arch = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Count parameters: what the classifier costs, and what fixing it saves or has saved.

    Names need no weights: `fixify report resnet50 mobilenetv3_small_100`.

    Of folders of runs, or a folder that holds several, it makes one HTML page instead, with the runs side by side:
    RUN_DIR/report.html, or -o. With --json it prints the page's data, and writes the page only where -o says.
    """
    from fixify.cli.common import slim_files_here, with_architecture
    from fixify.errors import UsageError
    from fixify.reporting import report as count
    from fixify.reporting.tables import models_table, savings_table

    output = Output(as_json=as_json)
    if all_models or paper:
        _refuse_besides(all_models, paper, models or [], arch, out)
        (_report_all if all_models else _report_paper)(output)
        return
    if runs := _runs_among(models or []):
        _report_runs(runs, models or [], out, output, force=force)
        return
    if out is not None:
        raise UsageError("-o is for the page of runs.", hint="Name the folder of a run, or leave -o out.")
    names = models or slim_files_here("report")
    rows = []
    with output.progress("counting", total=len(names)) as advance:
        for name in names:
            rows.append(with_architecture(lambda known: count(name, arch=known), arch, output))  # noqa: B023
            advance(note=name)
    tables = [models_table(rows)]
    if len(rows) == 1:
        tables.append(savings_table(rows[0].savings))
    output.result({"models": [row.to_dict() for row in rows]}, *tables)
    for row in rows:
        if row.note is not None:
            output.say(f"{row.name}: {row.note}")


def _refuse_besides(all_models: bool, paper: bool, models: list[str], arch: str | None, out: Path | None) -> None:
    """--all and --paper say all that there is to count."""
    from fixify.errors import UsageError

    what = "--all counts every architecture" if all_models else "--paper counts the networks of the paper"
    others = ["--paper"] * (all_models and paper) + models[:1] + ["--arch"] * bool(arch) + ["-o"] * (out is not None)
    if others:
        raise UsageError(f"{what}; it goes without {others[0]}.", hint="Count them one after the other.")


def _report_paper(output: Output) -> None:
    from fixify.reporting.paper import paper, paper_tables

    found = paper()
    output.result(found.to_dict(), *paper_tables(found))


def _runs_among(names: list[str]) -> list[Path]:
    """The folders of runs that are meant; all of the names are such, or none."""
    from fixify.errors import UsageError
    from fixify.reporting.runs import runs_in

    found = {name: runs_in(Path(name)) for name in names if Path(name).is_dir()}
    runs = [run for found_in in found.values() for run in found_in]
    others = [name for name in names if not found.get(name)]
    if runs and others:
        raise UsageError(
            f"{runs[0]} is the folder of a run, and {others[0]} is not: a page shows runs, a table counts models.",
            hint="Report them one after the other.",
        )
    return runs


def _report_runs(folders: list[Path], names: list[str], out: Path | None, output: Output, *, force: bool) -> None:
    from fixify._files import refuse_existing, write_atomic
    from fixify.language.run import is_language_run
    from fixify.reporting.page import PAGE_FILE, write_page
    from fixify.reporting.run_report import report_runs
    from fixify.reporting.runs import read_runs
    from fixify.reporting.tables import runs_table

    if any(map(is_language_run, folders)):
        _report_language(folders, out, output)
        return
    path = Path(names[0]) / PAGE_FILE if out is None else out
    to_write = out is not None or not output.as_json
    if to_write:
        refuse_existing(path, force=force)
    report = report_runs(read_runs(folders))
    if to_write:
        write_atomic(path, write_page(report))
    output.result(report.to_dict(), runs_table(report))
    if to_write:
        output.say(f"page: {path}")


def _report_language(folders: list[Path], out: Path | None, output: Output) -> None:
    from fixify.errors import UsageError
    from fixify.language.run import is_language_run, read_language_runs
    from fixify.reporting.tables import language_table

    if others := [folder for folder in folders if not is_language_run(folder)]:
        raise UsageError(
            f"{others[0]} is a run on images, and others here are of language models.",
            hint="Report them one after the other.",
        )
    if out is not None:
        raise UsageError("-o is for the page of runs on images; language models get a table.", hint="Leave -o out.")
    runs = read_language_runs(folders)
    output.result({"runs": [run.to_dict() for run in runs]}, language_table(runs))


def _report_all(output: Output) -> None:
    from fixify.models.architectures import list_architectures
    from fixify.models.classifiers import coverage
    from fixify.reporting.tables import coverage_summary_table, coverage_table

    rows = []
    with output.progress("building architectures", total=len(list_architectures())) as advance:
        for row in coverage():
            rows.append(row)
            advance(note=row.ref)
    said = [
        {
            "model": row.ref,
            "convertible": row.convertible,
            "reason": row.reason,
            "parameters": row.num_parameters,
            "classifier_parameters": row.head_parameters,
        }
        for row in rows
    ]
    output.result({"models": said}, coverage_table(rows), "", coverage_summary_table(rows))
