"""What a retrofit costs in accuracy: learned head continued, against fixed heads, on the same extra epochs.

    python tests/benchmarks/retrofit.py --data fashion-mnist --images 20000 --seeds 3

For each seed a small network (timm's test_efficientnet) is trained with a learned classifier. Then every row gets the
same extra epochs, images, augmentation and options: the control keeps its learned classifier, the others are what
`fixify convert` makes of the checkpoint, finetuned. Top-1 on the held-out split: mean over seeds (lowest to highest).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from fixify.checkpoint import load
from fixify.conversion import convert
from fixify.data import OpenedData, open_train_val
from fixify.data.opened import Subset
from fixify.training import FinetuneOptions, finetune

ARCHITECTURE = "test_efficientnet"
ROWS: dict[str, dict[str, Any]] = {
    "fixed, codes in order (paper)": {"match": False, "standardize": False},
    "fixed, standardised": {"match": False},
    "fixed, matched": {"standardize": False},
    "fixed, matched, standardised (default)": {},
}


def train_on(
    model: torch.nn.Module, train: OpenedData, val: OpenedData, options: FinetuneOptions, folder: Path
) -> tuple[float, float]:
    """Train; top-1 before and after the last epoch."""
    size = options.img_size or 32
    preprocessing = {"input_size": [1, size, size], "mean": [0.5], "std": [0.5], "interpolation": "bilinear"}
    done = finetune(
        model, train, val, {**preprocessing, "crop_pct": 1.0}, options, folder, save=lambda *_: None, force=True
    )
    return done.before.top1, done.history[-1].val_top1


def one_seed(seed: int, arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[float, float]]:
    """Every row: top-1 before and after its extra epochs."""
    train, val = open_train_val(arguments.data)
    if arguments.images:
        train = replace(train, images=Subset(train.images, list(range(arguments.images))))
    common = {
        "batch_size": arguments.batch_size,
        "lr": arguments.lr,
        "img_size": arguments.img_size,
        "crop_pct": 1.0,
        "scale": (0.7, 1.0),
        "hflip": 0.5 if arguments.flip else 0.0,
        "color_jitter": 0.0,
        "workers": 1,
        "device": arguments.device,
        "seed": seed,
    }
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, in_chans=1, num_classes=train.num_classes)
    train_on(model, train, val, FinetuneOptions.create(epochs=arguments.base_epochs, **common), folder / "base")
    checkpoint = folder / "learned.pth"
    torch.save({"arch": ARCHITECTURE, "state_dict": model.state_dict()}, checkpoint)

    extra = FinetuneOptions.create(epochs=arguments.epochs, **common)
    rows = {"learned, continued (control)": train_on(model, train, val, extra, folder / "control")}
    for name, options in ROWS.items():
        slim = convert(checkpoint, folder / "head.fixed.safetensors", force=True, **options).path
        rows[name] = train_on(load(slim), train, val, extra, folder / "run")
    for name, (before, after) in rows.items():
        print(f"seed {seed}: {name}: {before:.2f} -> {after:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="a folder with train/ and val/, or a name")
    parser.add_argument("--images", type=int, help="use only so many training images, the first")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--base-epochs", type=int, default=3, help="epochs with the learned head, before")
    parser.add_argument("--epochs", type=int, default=2, help="extra epochs of every row")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [one_seed(seed, arguments, Path(folder)) for seed in range(arguments.seeds)]
    print(f"\n{'':42} {'as converted':>22} {f'after {arguments.epochs} epochs':>22}")
    for name in seeds[0]:
        columns = []
        for column in (0, 1):
            values = [rows[name][column] for rows in seeds]
            columns.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"{name:42} {columns[0]:>22} {columns[1]:>22}")


if __name__ == "__main__":
    main()
