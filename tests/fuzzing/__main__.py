"""Run inputs of every kind and print a table of what became of them; exit code 1 if one fell."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fuzzing.judge import MEGABYTES, SECONDS, Summary, run
from fuzzing.kinds import all_kinds
from fuzzing.seeds import in_folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzzing", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all kinds together (of each kind with --kinds)")
    parser.add_argument("--kinds", nargs="+", help="only these")
    parser.add_argument("--start", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many minutes")
    parser.add_argument("--log", type=Path, help="append the counts of each kind as a line of JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    ends = time.monotonic() + 60 * given.minutes
    found: dict[str, Summary] = {}
    with tempfile.TemporaryDirectory() as name:
        kinds = all_kinds(in_folder(Path(name)))
        if unknown := set(given.kinds or ()) - set(kinds):
            parser.error(f"there is no kind {', '.join(unknown)}; the kinds are {', '.join(kinds)}")
        for kind in kinds.values():
            if given.kinds and kind.name not in given.kinds:
                continue
            count = given.inputs if given.kinds else given.inputs * kind.share // 1000
            summary = found[kind.name] = Summary()
            folder = Path(name) / kind.name
            folder.mkdir()
            for outcome in run(kind, range(given.start, given.start + count), folder):
                summary.add(outcome)
                if outcome.fell or outcome.seconds > SECONDS or outcome.megabytes > MEGABYTES:
                    print(outcome, file=sys.stderr, flush=True)
                if time.monotonic() > ends:
                    break
            if given.log:
                with given.log.open("a") as file:
                    counts = {"kind": kind.name, "start": given.start, "inputs": summary.inputs, "read": summary.read}
                    worst = {"slowest": str(summary.slowest), "largest": str(summary.largest)}
                    lists = {name: [str(each) for each in getattr(summary, name)] for name in ("fell", "slow", "large")}
                    file.write(json.dumps({**counts, **worst, **lists, "seconds": summary.seconds}) + "\n")
            if time.monotonic() > ends:
                break
    Console(width=120).print(_table(found))
    return int(any(each.fell or each.slow or each.large for each in found.values()))


def _table(found: dict[str, Summary]) -> Table:
    table = Table(
        "kind",
        *(
            f"{name}"
            for name in (
                "inputs",
                "read",
                "refused",
                "fell",
                f"> {SECONDS:.0f} s",
                f"> {MEGABYTES} MB",
                "slowest",
                "largest",
                "s in all",
            )
        ),
    )
    for name, each in found.items():
        slowest, largest = each.slowest, each.largest
        table.add_row(
            name,
            *(
                f"{n:,}"
                for n in (each.inputs, each.read, each.refused, len(each.fell), len(each.slow), len(each.large))
            ),
            f"{slowest.seconds:.2f} s ({slowest.number})" if slowest else "",
            f"{largest.megabytes:,.0f} MB ({largest.number})" if largest else "",
            f"{each.seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
