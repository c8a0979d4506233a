"""Run `fixify report MODELS...` and `fixify report RUN_DIR...`."""

from __future__ import annotations

import os
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

    Given folders of runs, or a folder that holds several, it writes one HTML page that shows the runs side by side:
    RUN_DIR/report.html, or -o. With --json it prints the page's data, and writes the page only with -o.
    """
    from fixify.errors import UsageError

    output = Output(as_json=as_json)
    names = models or []
    if all_models or paper:
        _refuse_besides(all_models, paper, names, arch, out)
        (_report_all if all_models else _report_paper)(output)
    elif runs := _runs_among(names):
        _report_runs(runs, names, out, output, force=force)
    elif out is not None:
        raise UsageError("-o is for the page of runs.", hint="Name the folder of a run, or drop -o.")
    else:
        _report_models(names, arch, output)


def _runs_among(names: list[str]) -> list[Path]:
    if not any(map(os.path.isdir, names)):
        return []  # what reads runs imports torch
    from fixify.reporting.runs import runs_among

    return runs_among(names)


def _refuse_besides(all_models: bool, paper: bool, models: list[str], arch: str | None, out: Path | None) -> None:
    """Refuse --all or --paper together with anything else to count."""
    from fixify.errors import UsageError

    option = "--all" if all_models else "--paper"
    others = ["--paper"] * (all_models and paper) + models[:1] + ["--arch"] * bool(arch) + ["-o"] * (out is not None)
    if others:
        raise UsageError(f"{option} cannot be combined with {others[0]}.", hint="Report them one after the other.")


def _report_models(names: list[str], arch: str | None, output: Output) -> None:
    import fixify
    from fixify.cli.common import slim_files_here, with_architecture
    from fixify.cli.libraries import import_libraries_for

    names = names or slim_files_here("report")
    import_libraries_for(names)
    from fixify.reporting.costs import ModelReport
    from fixify.reporting.tables import models_table, savings_table

    def counted(name: str) -> ModelReport:
        return with_architecture(lambda known: fixify.report(name, arch=known), arch, output)

    rows = []
    with output.progress("counting", total=len(names)) as advance:
        for name in names:
            rows.append(counted(name))
            advance(note=name)
    savings = [savings_table(rows[0].savings)] if len(rows) == 1 else []
    output.result({"models": [row.to_dict() for row in rows]}, models_table(rows), *savings)
    for row in rows:
        for note in (*([] if row.note is None else [row.note]), *row.notes):
            output.say(f"{row.name}: {note}")


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
        raise UsageError("-o is for the page of runs on images; language models get a table.", hint="Drop -o.")
    runs = read_language_runs(folders)
    output.result({"runs": [run.to_dict() for run in runs]}, language_table(runs))


def _report_paper(output: Output) -> None:
    from fixify.reporting.paper import paper, paper_tables

    found = paper()
    output.result(found.to_dict(), *paper_tables(found))


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
