"""Convert a classifier without a network that is larger than most networks: time, peak memory, size, and what is kept.

    python tests/benchmarks/bare_classifier.py
    python tests/benchmarks/bare_classifier.py --classes 100000 --dtype float32

The matrix stands for text embeddings: unit rows that share a large common direction, the rest of which lies in clusters
with a falling spectrum. Each step runs in a process of its own: `convert`, `load` (with the check of the digest), and
16 queries. A query is a class vector plus noise; counted is how often the class of the original's largest logit is the
slim head's too, and how often it is among its five largest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fixify._memory import peak_bytes

_QUERIES = 256
_NOISE = 0.7


def write_matrix(path: Path, c: int, n: int, dtype: str) -> None:
    """Write unit rows [C, N], a few thousand at a time."""
    rng = np.random.Generator(np.random.Philox(0))
    spectrum = np.arange(1, n + 1, dtype=np.float32) ** -0.3
    common = rng.standard_normal(n, dtype=np.float32)
    common *= 1.2 * np.linalg.norm(spectrum) / np.linalg.norm(common)
    centers = rng.standard_normal((2000, n), dtype=np.float32)
    made = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(c, n))
    for start in range(0, c, 8192):
        count = min(8192, c - start)
        noise = rng.standard_normal((count, n), dtype=np.float32)
        part = common + spectrum * (0.6 * centers[rng.integers(0, len(centers), count)] + 0.8 * noise)
        made[start : start + count] = part / np.linalg.norm(part, axis=1, keepdims=True)
    made.flush()


def step(name: str, folder: Path) -> dict[str, Any]:
    """Run one step in this process."""
    import torch

    import fixify

    torch.set_num_threads(1)
    before = peak_bytes()
    start, processor = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {}
    if name == "convert":
        done = fixify.convert(folder / "text.npy", folder / "head.fixed.safetensors", logit_scale=100.0, force=True)
        found["bytes"] = done.path.stat().st_size
    elif name == "load":
        fixify.load(folder / "head.fixed.safetensors", check=True)
    else:
        found |= queries(folder)
    seconds, used = found.pop("seconds", time.perf_counter() - start), time.process_time() - processor
    return {"seconds": seconds, "processor": used, "peak": peak_bytes(), "imports": before, **found}


def queries(folder: Path) -> dict[str, Any]:
    """Ask both classifiers, the original a few rows at a time."""
    import torch

    import fixify

    head = fixify.load(folder / "head.fixed.safetensors")
    stored = np.load(folder / "text.npy", mmap_mode="r")
    rng = np.random.Generator(np.random.Philox(1))
    x = np.array(stored[np.sort(rng.integers(0, len(stored), _QUERIES))], dtype=np.float32)
    x += _NOISE * rng.standard_normal(x.shape, dtype=np.float32) / x.shape[1] ** 0.5
    best, right = np.full(_QUERIES, -np.inf, dtype=np.float32), np.zeros(_QUERIES, dtype=np.int64)
    for start in range(0, len(stored), 8192):
        scores = x @ np.array(stored[start : start + 8192], dtype=np.float32).T
        place = scores.argmax(axis=1)
        value = scores[np.arange(_QUERIES), place]
        right = np.where(value > best, start + place, right)
        best = np.maximum(best, value)
    with torch.inference_mode():
        head(torch.from_numpy(x[:1]))
        start_time = time.perf_counter()
        head(torch.from_numpy(x[:1]))
        one = time.perf_counter() - start_time
        top = torch.cat([head.top_k(part, 5).classes for part in torch.from_numpy(x).split(16)]).numpy()
    return {
        "seconds": one,
        "top1": 100 * float((top[:, 0] == right).mean()),
        "top5": 100 * float((top == right[:, None]).any(axis=1).mean()),
    }


def main() -> None:
    """Run all steps, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=867_455)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step(options.step[0], Path(options.step[1]))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_matrix(folder / "text.npy", options.classes, options.features, options.dtype)
        size = (folder / "text.npy").stat().st_size
        print(f"{options.classes:,} x {options.features} in {options.dtype}: {size / 1e6:,.0f} MB")
        for each in ("convert", "load", "query"):
            command = [sys.executable, __file__, "--step", each, name]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if result.returncode:
                sys.exit(result.stderr)
            found = json.loads(result.stdout.splitlines()[-1])
            print(
                f"{each:8} {found['seconds']:8.3f} s, {found['processor']:6.1f} s of the processor, peak "
                f"{found['peak'] / 1e6:,.0f} MB ({found['imports'] / 1e6:,.0f} MB of it imports)"
                + (f"; {found['bytes'] / 1e6:.1f} MB on disk" if "bytes" in found else "")
                + (
                    f"; same class first {found['top1']:.1f} %, in five {found['top5']:.1f} %"
                    if "top1" in found
                    else ""
                )
            )


if __name__ == "__main__":
    main()
