"""Time heads beside `nn.Linear`: one line per size and head, ratios of `nn.Linear`'s time to ours.

    python tests/benchmarks/bench_heads.py [--threads 1] [--batch 1 64] [--train] [--size 1280x1000] [--head binary]

Above 1, the head is faster. Times are the smallest of 15 turns, in which the two alternate; float32, seeded inputs.
"""

from __future__ import annotations

import argparse

import torch

from fixify.heads.timing import CASES, VARIANTS, default_variants, time_head


def size(text: str) -> tuple[int, int]:
    n, c = text.split("x")
    return int(n), int(c)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--size", type=size, nargs="+", default=CASES)
    parser.add_argument("--head", choices=VARIANTS, nargs="+", default=VARIANTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, threads: {options.threads}")
    print(f"{'N x C':>14}  {'head':10}" + "".join(f"{'batch ' + str(batch):>30}" for batch in options.batch))
    for n, c in options.size:
        for variant in default_variants(n, c):
            if variant not in options.head:
                continue
            found = time_head(variant, n, c, options.batch, training=options.train)
            cells = [f"{t.linear_seconds * 1e6:.0f} / {t.seconds * 1e6:.0f} us = {t.ratio:.2f}" for t in found]
            print(f"{f'{n} x {c}':>14}  {variant:10}" + "".join(f"{cell:>30}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
