"""Time one forward pass of `nn.Linear`, of the fast product, and of one product with all codes.

    python tests/benchmarks/bench_heads.py [--threads 1]

Prints medians over repeated calls after a warm-up, with seeded inputs, float32 and no gradients. "path" is the product
that FixedClassifier chooses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from fixify.heads import FixedClassifier, HeadSpec, product

CASES = [
    # num_features, num_classes, batch
    (2048, 1000, 1),
    (2048, 1000, 256),
    (2048, 18_291, 1),
    (2048, 18_291, 64),
    (1280, 1000, 1),
    (1280, 1000, 256),
    (768, 1000, 1),
    (768, 1000, 256),
    (512, 100, 1),
    (512, 100, 256),
    (512, 200, 1),
    (512, 200, 256),
    (256, 2_965, 1),
    (256, 2_965, 256),
    (64, 10, 1),
    (64, 10, 256),
    (220, 1000, 1),
    (220, 1000, 256),
    (4920, 1000, 1),
    (4920, 1000, 256),
]


def median_seconds(call: Callable[[], object], seconds: float = 0.4) -> float:
    """Measure the median time of a call: 5 calls of warm-up, then at least 10 and as many as fit into `seconds`."""
    for _ in range(5):
        call()
    times: list[float] = []
    while len(times) < 10 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def head_seconds(num_features: int, num_classes: int, x: torch.Tensor, dense: bool) -> float:
    """Measure the product alone, on the chosen path."""
    with mock.patch.object(product, "prefers_dense", lambda *_: dense):
        head = FixedClassifier(HeadSpec("hadamard", num_features, num_classes))
    return median_seconds(lambda: head.product(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    generator = torch.Generator().manual_seed(0)
    print(f"{'N':>6}{'C':>8}{'batch':>7}{'linear us':>12}{'dense us':>11}{'fast us':>10}{'linear/fast':>13}  path")
    with torch.inference_mode():
        for n, c, batch in CASES:
            x = torch.randn(batch, n, generator=generator)
            linear = torch.nn.Linear(n, c, bias=False)
            ours = FixedClassifier(HeadSpec("hadamard", n, c))
            seconds = [median_seconds(lambda linear=linear, x=x: linear(x))]
            seconds += [head_seconds(n, c, x, dense) for dense in (True, False)]
            us = [1e6 * s for s in seconds]
            path = "dense" if ours.product.table is not None else "fast"
            print(
                f"{n:6}{c:8}{batch:7}{us[0]:12.1f}{us[1]:11.1f}{us[2]:10.1f}{us[0] / us[2]:13.1f}  {path}", flush=True
            )


if __name__ == "__main__":
    main()
