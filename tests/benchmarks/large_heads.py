"""Convert large classifiers whose class vectors are strongly correlated: time, peak memory, and what is kept.

    python tests/benchmarks/large_heads.py binary:20000x1280 matched:20000x1280 binary:1000000x512
    python tests/benchmarks/large_heads.py matched:4000x256 --seeds 3 --samples 384 --against OTHER_CHECKOUT

Random weights hide what is slow on a real classifier. Here class vectors lie in a few clusters, and the spectrum of the
vectors and of the features falls as a power of the rank; features are those of a class plus noise. Each case runs in a
process of its own. With `--against` each case runs with the fixify of another folder too, in turns.

Columns: seconds of `fixify.heads.replacement` (wall clock, and of the processor), peak resident memory above that
before the class vectors were made, in units of the classifier's bytes, mean cosine of matched codes with the old class
vectors, and how often the new head and the classifier agree on 1,000 new samples.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_HELD_OUT = 1000


def classifier(
    c: int, n: int, samples: int, seed: int, clusters: int, scatter: float, decay: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make class vectors float32 [C, N], and features [samples, N] and [1000, N], standard deviation of logits 5."""
    rng = np.random.Generator(np.random.Philox(seed))
    spectrum = np.arange(1, n + 1, dtype=np.float32) ** (-decay / 2)
    basis = np.linalg.qr(rng.standard_normal((n, n), dtype=np.float32))[0] * spectrum
    centers = rng.standard_normal((clusters, n), dtype=np.float32)
    vectors = np.empty((c, n), dtype=np.float32)
    for start in range(0, c, 4096):
        part = vectors[start : start + 4096]
        of = rng.integers(0, clusters, len(part))
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        part[:] = (centers[of] + scatter * noise) @ basis.T + 2 * basis[:, 0]
    noise = rng.standard_normal((samples + _HELD_OUT, n), dtype=np.float32)
    features = vectors[rng.integers(0, c, len(noise))] + scatter * (noise @ basis.T)
    some = vectors[:: max(1, c // 2000)]
    logits = (features[:100] - features.mean(axis=0)) @ (some - some.mean(axis=0)).T
    vectors *= 5 / logits.std()
    return vectors, features[:samples], features[samples:]


def peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Convert one classifier in this process."""
    import scipy.optimize  # noqa: F401
    import torch
    import torch._dynamo  # these two come with timm and would count as memory of the conversion

    from fixify.heads import HeadSpec, replacement

    torch.set_num_threads(case["threads"])
    c, n, samples = case["c"], case["n"], case["samples"]
    before = peak()
    keys = ("clusters", "scatter", "decay")
    made = classifier(c, n, max(samples, 1), case["seed"], *(case[key] for key in keys))
    weight, features, held_out = (torch.from_numpy(array) for array in made)
    bias = torch.zeros(c)
    if case["kind"] == "binary":
        standardize = "center" if samples else False
        spec = HeadSpec("binary", n, c, bits_per_class=n, gains=True, normalize=False, standardize=standardize)
    else:
        spec = HeadSpec("hadamard", n, c, standardize=True, seed=case["seed"])
    wall, processor = time.perf_counter(), time.process_time()
    done = replacement(spec, weight, bias, features=features if samples else None)
    found = {
        "seconds": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "peak": peak() - before,
        "process": peak(),
        "note": done.note,
    }
    head, same = done.head.eval(), 0
    with torch.inference_mode():
        for x in held_out.split(100):
            same += int((head(x).argmax(dim=1) == (x @ weight.T).argmax(dim=1)).sum())
    return found | {"agreement": 100 * same / len(held_out)}


def run(case: dict[str, Any], package: Path) -> dict[str, Any]:
    """Convert one classifier in a process of its own, with the fixify in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": str(case["threads"])}
    command = [sys.executable, __file__, "--child", json.dumps(case)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=case["timeout"], check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {case['timeout']} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="binary:CxN or matched:CxN")
    parser.add_argument("--samples", type=int, default=384, help="features to calibrate with; 0: without")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--scatter", type=float, default=0.5, help="of classes around the center of their cluster")
    parser.add_argument("--decay", type=float, default=1.0, help="variances fall as rank ** -decay")
    parser.add_argument("--timeout", type=int, default=1200)
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(measure(given.child)))
        return
    packages = {"this": Path(__file__).parents[2]} | ({"other": given.against.resolve()} if given.against else {})
    fixed = {key: getattr(given, key) for key in ("samples", "threads", "clusters", "scatter", "decay", "timeout")}
    numbers = ("s", "cpu s", "peak MB", "x weight", "agree %")
    print(f"{'case':<24}{'seed':>5}  {'fixify':<7}{''.join(f'{name:>9}' for name in numbers)}  note", flush=True)
    for text in given.cases:
        kind, c, n = re.fullmatch(r"(binary|matched):(\d+)x(\d+)", text).groups()  # type: ignore[union-attr]
        for seed in range(given.seeds):
            case = {**fixed, "kind": kind, "c": int(c), "n": int(n), "seed": seed}
            for name, package in packages.items():
                found = run(case, package)
                if "failed" in found:
                    print(f"{text:<24}{seed:>5}  {name:<7}  {found['failed']}", flush=True)
                    continue
                weights = found["peak"] / (4 * int(c) * int(n))
                print(
                    f"{text:<24}{seed:>5}  {name:<7}{found['seconds']:>9.1f}{found['processor']:>9.1f}"
                    f"{found['peak'] / 1e6:>9.0f}{weights:>9.2f}{found['agreement']:>9.1f}  {found['note']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
