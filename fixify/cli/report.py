"""`fixify report MODELS...`"""

from __future__ import annotations

from typing import Annotated

import typer

from fixify.cli.options import Arch, Json
from fixify.cli.output import Output


def report(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Architecture names and checkpoints, slim or ordinary. Default: *.fixed.safetensors here."),
    ] = None,
    all_models: Annotated[
        bool, typer.Option("--all", help="Every architecture of timm and torchvision: what can be converted.")
    ] = False,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Count parameters: what the classifier costs, and what fixing it saves or has saved.

    Names need no weights: `fixify report resnet50 mobilenetv3_small_100`.
    """
    from fixify.cli.asking import with_architecture
    from fixify.cli.slim import slim_files_here
    from fixify.errors import UsageError
    from fixify.reporting import report as count
    from fixify.reporting.tables import models_table, savings_table

    output = Output(as_json=as_json)
    if all_models:
        if models:
            raise UsageError(f"--all counts every architecture; it goes without {models[0]!r}.")
        _report_all(output)
        return
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


def _report_all(output: Output) -> None:
    from fixify.reporting.tables import coverage_summary_table, coverage_table
    from fixify.zoo.architectures import list_architectures
    from fixify.zoo.coverage import coverage

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
