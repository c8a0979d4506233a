"""Measure the demo's fine-tuning over seeds, on drawings of the held-out typefaces that the demo does not use.

    python tests/benchmarks/demo_seeds.py --out demo-seeds.jsonl

Each trial fine-tunes the demo's letters and digits as `fixify demo` does, with another seed, and measures the result on
the demo's 3,168 validation images and on 6,336 other drawings of the same typefaces. Rows: `hadamard`, and `control`,
the learned classifier. A trial that is in --out already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import fixify
from fixify.checkpoints.open import open_model
from fixify.data import OpenedData, make_loader, open_train_val
from fixify.data.idx import ArrayImages
from fixify.demo.glyphs import VAL_FACES, distort, draw, generator, glyph_classes, letter_labels, write_letter_images
from fixify.demo.run import RATE, demo_options, write_part
from fixify.metrics import evaluate
from fixify.training import OpenedInputs, RunOutput, train_model

CPU = torch.device("cpu")
VARIANTS = range(100, 116)
ROWS = ("hadamard", "control")


def other_drawings(val: OpenedData) -> OpenedData:
    """Draw each letter with every held-out typeface, sixteen times."""
    kept, pixels = list(letter_labels()), []
    for face in VAL_FACES:
        drawn = draw(face, [entry.code_point for entry in glyph_classes()])
        pixels += [distort(drawn, generator(1, *f"fresh/{face}/{variant}".encode()))[kept] for variant in VARIANTS]
    labels = np.tile(np.arange(len(kept), dtype=np.int64), len(pixels))
    images = ArrayImages(np.concatenate(pixels), labels)
    return OpenedData(images, val.class_names, "drawings", f"{len(labels)} drawings", "drawings", "val")


def trial(folder: Path, row: str, seed: int, lr: float) -> dict:
    """Train one row with one seed, and measure it."""
    data = write_letter_images(folder / "letters").folder
    original = folder / "letters132.pth"
    write_part(original, letter_labels())
    source = original
    if row == "hadamard":
        source = folder / "letters132.fixed.safetensors"
        options = {"calibrate": data, "calibrate_images": 1024, "normalize": False, "device": "cpu", "force": True}
        fixify.convert(original, source, **options)
    opened = open_model(source)
    train, val = open_train_val(str(data))
    inputs = OpenedInputs(train, val, opened.preprocessing)
    with tempfile.TemporaryDirectory() as out:
        output = RunOutput(Path(out), save=lambda *_saved: None, force=True)
        train_model(opened.model, inputs, demo_options(seed=seed).replace(lr=lr), output)
    found = {"row": row, "seed": seed, "lr": lr}
    for name, images in (("demo", val), ("others", other_drawings(val))):
        loader = make_loader(images, opened.preprocessing, training=False, batch_size=250, workers=0)
        found[name] = evaluate(opened.model, loader, device=CPU).top1
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--lr", type=float, default=RATE, help="learning rate; default: the demo's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/demo-seeds.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for row in arguments.rows:
                if any((each["row"], each["seed"], each["lr"]) == (row, seed, arguments.lr) for each in done):
                    continue
                line = json.dumps(trial(Path(folder), row, seed, arguments.lr))
                with arguments.out.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    main()
