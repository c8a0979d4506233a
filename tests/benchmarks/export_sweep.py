"""Export one architecture of each family of timm and torchvision to ONNX, and say why the rest do not.

    python tests/benchmarks/export_sweep.py --log sweep.jsonl            # hours on one core; continues where it stopped
    python tests/benchmarks/export_sweep.py --log sweep.jsonl --table    # the table of what is in the log

A family is a module of the library. Of each the smallest of its first architectures is taken, with random weights and a
Hadamard head for 20 classes; the exported file has to agree with PyTorch within the check of `fixify.export`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torchvision

import fixify
from fixify.catalogue.shipped import load_index
from fixify.errors import FixifyError
from fixify.models import build, parse_architecture

MOST_CANDIDATES = 6
CLASSES = 20


def families() -> Iterator[tuple[str, list[str]]]:
    known = {entry.architecture.ref for entry in load_index().entries}  # all that have a classifier
    for module in timm.list_modules():
        names = [name for name in timm.list_models(module=module) if f"timm/{name}" in known]
        if names:
            yield f"timm/{module}", [f"timm/{name}" for name in names]
    modules: dict[str, list[str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        builder = torchvision.models.get_model_builder(name)
        modules.setdefault(builder.__module__.rpartition(".")[2], []).append(f"torchvision/{name}")
    yield from ((f"torchvision/{module}", names) for module, names in modules.items())


def smallest(names: list[str]) -> str:
    def likely(name: str) -> tuple[bool, str]:
        small = ("atto", "femto", "pico", "nano", "tiny", "small", "_xxs", "_xs", "_050", "18", "_b0", "_s", "_0")
        return (not any(part in name for part in small), name)

    found = []
    for name in [name for name in sorted(names, key=likely) if "/test_" not in name][:MOST_CANDIDATES] or names[:1]:
        model = build(parse_architecture(name), num_classes=CLASSES, meta=True)
        found.append((sum(parameter.numel() for parameter in model.parameters()), name))
    return min(found)[1]


def attempt(name: str, seconds: int, to: str) -> dict[str, object]:
    def too_long(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    started = time.process_time()
    row: dict[str, object] = {"architecture": name}
    try:
        with tempfile.TemporaryDirectory() as folder:
            architecture = parse_architecture(name)
            torch.manual_seed(0)
            model = build(architecture, num_classes=CLASSES).eval()
            fixify.fix_classifier_(model, "auto")
            slim = fixify.save(model, Path(folder) / "net.fixed.safetensors", arch=architecture)
            done = fixify.export(slim, Path(folder) / "net.out", to=to)
            row |= {"ok": True, "difference": done.checks[0].difference, "bytes": done.num_bytes}
    except FixifyError as error:
        row |= {"ok": False, "why": f"{type(error).__name__}: {error.message}"[:300]}
    except TimeoutError:
        row |= {"ok": False, "why": f"not done after {seconds} s of processor time"}
    except Exception as error:  # a sweep reports whatever happens
        row |= {"ok": False, "why": f"{type(error).__name__} (not explained): {str(error)[:200]}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {**row, "seconds": round(time.process_time() - started, 1)}


def table(rows: list[dict[str, object]]) -> None:
    good = [row for row in rows if row["ok"]]
    print(f"{len(good)} of {len(rows)} families export.\n")
    print("| family | architecture | result |\n|---|---|---|")
    for row in rows:
        result = f"largest difference {row['difference']:.1g} std" if row["ok"] else row["why"]
        print(f"| {row['family']} | {str(row['architecture']).partition('/')[2]} | {result} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=300, help="Limit of processor time for one architecture.")
    parser.add_argument("--to", default="onnx")
    parser.add_argument("--only", nargs="*", help="Families, for example timm/resnet.")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.log.read_text().splitlines()] if given.log.exists() else []
    if given.table:
        table(rows)
        return
    done = {row["family"] for row in rows}
    for family, names in families():
        if family in done or (given.only and family not in given.only):
            continue
        row = {"family": family, **attempt(smallest(names), given.seconds, given.to)}
        with given.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
