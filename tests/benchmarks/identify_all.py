"""Identify the state dict of every architecture, with few and many classes, by names and by shapes alone.

    python tests/benchmarks/identify_all.py --log identify.jsonl

For each entry of the shipped index, `identify` gets the shapes of the state dict (from the meta device) twice: with the
real key names, and with names that say nothing. Each question adds one line to the log at once; with the same log, an
interrupted run continues. The exit code is 1 if any answer was wrong or failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fixify.catalogue.matches import Candidate
from fixify.catalogue.shipped import load_index
from fixify.catalogue.signature import is_counter
from fixify.errors import FixifyError
from fixify.models import Architecture, build, default_num_classes, parse_architecture
from fixify.models.built import shapes_of
from fixify.models.identify import identify

Shapes = dict[str, tuple[int, ...]]


def foreign(shapes: Shapes) -> Shapes:
    """Return the same shapes in the same order with names that say nothing."""
    return {
        f"{index:05}" + (".num_batches_tracked" if is_counter(key) else ""): shape
        for index, (key, shape) in enumerate(shapes.items())
    }


@cache
def built(spelled: str, num_classes: int) -> Shapes:
    """Return names and shapes of an architecture's state dict."""
    return shapes_of(build(parse_architecture(spelled), num_classes=num_classes, meta=True))


def question(arch: Architecture, shapes: Shapes, num_classes: int, by: str) -> dict[str, Any]:
    """Ask what a state dict is, and judge the answer.

    "unique": only the right architecture is named. "tie": it is one of several that are named. "wrong": it is not
    named, or with other arguments or another number of classes, or an architecture with other shapes is named.
    "failed": none is named.
    """
    start = time.process_time()
    try:
        found = identify(shapes)
    except FixifyError as error:
        return {"outcome": "failed", "message": error.message, "seconds": round(time.process_time() - start, 2)}
    seconds = round(time.process_time() - start, 2)
    mine = [c for c in found.candidates if arch.ref in (c.architecture.ref, *c.aliases)]
    right = (
        found.by == by
        and dict(arch.kwargs) in [dict(c.architecture.kwargs) for c in mine]
        and all(_fits(c, shapes, num_classes) for c in found.candidates)
    )
    outcome = "wrong" if not right else "unique" if len(found.candidates) == 1 else "tie"
    said = [c.architecture.spelled for c in found.candidates]
    return {"outcome": outcome, "candidates": said, "seconds": seconds}


def _fits(candidate: Candidate, shapes: Shapes, num_classes: int) -> bool:
    names = candidate.key_map or {key: key for key in shapes}
    fitting = {names[key]: shape for key, shape in shapes.items()} == built(candidate.architecture.spelled, num_classes)
    return fitting and candidate.num_classes == num_classes


def ask_all(num_classes: int, only: list[str], done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for entry in load_index().entries:
        arch = entry.architecture
        keys = {by: (arch.spelled, num_classes, by) for by in ("keys", "shapes")}
        if (only and arch.ref not in only) or set(keys.values()) <= done:
            continue
        shapes = built(arch.spelled, num_classes)
        for by, given in (("keys", shapes), ("shapes", foreign(shapes))):
            if keys[by] not in done:
                row = question(arch, given, num_classes, by)
                encoder = not default_num_classes(arch)  # has a classifier only if built with a number of classes
                yield {"arch": arch.spelled, "num_classes": num_classes, "by": by, "encoder": encoder, **row}


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Write one line per number of classes and kind of names, and one for the slowest question."""
    lines = []
    for num_classes, by in sorted({(row["num_classes"], row["by"]) for row in rows}):
        of = [row for row in rows if (row["num_classes"], row["by"]) == (num_classes, by)]
        for what, some in (("models", [row for row in of if not row["encoder"]]), ("with encoders", of)):
            count = Counter(row["outcome"] for row in some)
            told = ", ".join(f"{outcome} {count[outcome]}" for outcome in ("unique", "tie", "wrong", "failed"))
            names = len({row["arch"].partition(",")[0] for row in some})
            lines.append(f"{num_classes} classes, by {by}, {what}: {told}; {len(some)} questions of {names} names")
    slowest = max(rows, key=lambda row: row["seconds"])
    lines.append(f"slowest: {slowest['seconds']} s of processor time, {slowest['arch']} by {slowest['by']}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="where the answers go, one JSON object per line")
    parser.add_argument("--classes", type=int, nargs="+", default=[37, 5000])
    parser.add_argument("--only", nargs="*", default=[], help="only these architectures (library/name)")
    arguments = parser.parse_args()
    lines = arguments.log.read_text().splitlines() if arguments.log.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["arch"], row["num_classes"], row["by"]) for row in rows}
    with open(arguments.log, "a") as log:
        for num_classes in arguments.classes:
            for row in ask_all(num_classes, arguments.only, done):
                rows.append(row)
                log.write(json.dumps(row) + "\n")
                log.flush()
    print("\n".join(summary(rows)))
    return int(any(row["outcome"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
