"""Time and memory of one loss (forward and backward) for 1,000 to 10,000,000 classes, learned and fixed.

    python tests/benchmarks/loss.py --threads 2

Each point is measured in a process of its own. Memory is the peak resident memory of a step above what the process
holds after its imports and one tiny step, which loads the libraries of torch. A learned classifier is left out where
its weights, their gradient and the logits would not fit into the free memory. Writes loss.json and loss.png into
tests/benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
SIZES = {
    "learned": (1_000, 10_000, 100_000, 300_000, 1_000_000, 10_000_000),
    "fixed, plain": (1_000, 3_000, 10_000, 30_000, 100_000),
    "fixed, blocked": (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 10_000_000),
}


def status(name: str) -> int:
    """Read a line of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def free_memory() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def measure(kind: str, features: int, classes: int, batch: int, threads: int) -> dict[str, Any]:
    """Measure one point in this process."""
    import torch
    import torch.nn.functional as F

    from fixify.heads import FixedClassifier, HeadSpec

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def make(n: int, c: int) -> torch.nn.Module:
        return torch.nn.Linear(n, c) if kind == "learned" else FixedClassifier(HeadSpec("hadamard", n, c)).train()

    def step(head: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        head.zero_grad()
        loss = head.loss(x, y) if kind == "fixed, blocked" else F.cross_entropy(head(x), y)
        loss.backward()

    step(make(64, 128), torch.randn(64, 64, requires_grad=True), torch.arange(64))
    before = status("VmRSS")
    started = time.perf_counter()
    head = make(features, classes)
    built = {"build_seconds": time.perf_counter() - started, "build_bytes": status("VmHWM") - before}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    x, y = torch.randn(batch, features, requires_grad=True), torch.randint(classes, (batch,))
    seconds = []
    while len(seconds) < 2 or (len(seconds) < 8 and sum(seconds) < 3):
        started = time.perf_counter()
        step(head, x, y)
        seconds.append(time.perf_counter() - started)
    return {**built, "seconds": min(seconds), "bytes": status("VmHWM") - before, "steps": len(seconds)}


def measure_all(features: int, batch: int, threads: int) -> list[dict[str, Any]]:
    found = []
    for kind, sizes in SIZES.items():
        for classes in sizes:
            row: dict[str, Any] = {"kind": kind, "classes": classes}
            needed = 4 * classes * (2 * features + 4 * batch) if kind == "learned" else 0
            if needed > free_memory():
                found.append({**row, "does_not_fit": needed})
                continue
            command = [sys.executable, __file__, "--one", kind, str(classes), "--threads", str(threads)]
            command += ["--features", str(features), "--batch", str(batch)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append({**row, **json.loads(answer.stdout)})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, key, unit, factor in ((axes[0], "seconds", "ms per step", 1e3), (axes[1], "bytes", "MB", 1e-6)):
        for kind in SIZES:
            points = [
                (row["classes"], row[key] * factor) for row in results["points"] if row["kind"] == kind if key in row
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=kind)
        for row in results["points"]:
            if "does_not_fit" in row and key == "bytes":
                needed = row["does_not_fit"] * factor
                axis.plot(
                    row["classes"], needed, marker="x", color="C0", linestyle="none", label="learned: does not fit"
                )
        axis.set(xscale="log", yscale="log", xlabel="classes", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[0].set_title("time of forward and backward")
    axes[1].set_title("peak memory above the interpreter")
    axes[1].legend()
    figure.suptitle(
        f"Cross-entropy, N = {results['features']}, batch {results['batch']}, threads: {results['threads']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "CLASSES"), help="measure one point and print it as JSON")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(given.one[0], given.features, int(given.one[1]), given.batch, given.threads)))
        return
    import torch

    settings = {"features": given.features, "batch": given.batch, "threads": given.threads}
    points = measure_all(**settings)
    results = {**settings, "machine": platform.machine(), "torch": torch.__version__, "points": points}
    RESULTS.joinpath("loss.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, RESULTS / "loss.png")


if __name__ == "__main__":
    main()
