"""Measure whether `finetune` harms a head that starts near the original, for several learning rates.

    python tests/benchmarks/gentle.py --out gentle.jsonl --lr 0.001 0.005 0.05 --distill
    python tests/benchmarks/gentle.py --table gentle.jsonl

Each trial is one `fixify.training.train_model` with the defaults of `finetune`, except for what the command line names.
Letters are not mirrored and cropped less (`--hflip 0 --scale 0.8 1`). The data: the demo's glyphs with its network, and
kanji-200 and Fashion-MNIST with the networks of retrofit.py (6,000 training images of Fashion-MNIST). Heads: the learned
classifier itself (control); binary, one sign per weight; and matched Hadamard codes. The last two are calibrated on 1,024
training images without labels. Top-1 is that of the last epoch, on every third held-out image (`tuned_on`, to choose) and
on the others (`top1`, to report). Each trial is added to --out, and a trial that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from retrofit import Old, binary, new_model, read_task
from torch import nn

from fixify.checkpoints.open import open_model
from fixify.data import OpenedData, make_loader, open_train_val
from fixify.data.idx import ArrayImages
from fixify.demo.glyphs import write_dataset
from fixify.demo.run import SHIPPED
from fixify.heads import HeadSpec, replacement
from fixify.metrics import evaluate
from fixify.training import FinetuneOptions, OpenedInputs, ReferenceModel, RunOutput, train_model

CPU = torch.device("cpu")
CALIBRATION_IMAGES = 1024
FASHION_IMAGES = 6000
HEADS = ("learned", "binary", "hadamard")
LETTERS = {"hflip": 0.0, "scale": (0.8, 1.0)}


@dataclass(frozen=True)
class Task:
    """Images and the trained network of one data set."""

    name: str
    train: OpenedData
    tune: OpenedData
    val: OpenedData
    preprocessing: dict
    old: Old
    cache: Path
    seed: int

    def network(self) -> nn.Module:
        """Return the trained network with its learned classifier."""
        if self.name == "glyphs":
            return open_model(SHIPPED).model
        task = read_task(self.name, self.cache)
        model = new_model(task, 256, 0)
        model.load_state_dict(torch.load(self.cache / f"{self.name}-256-0.pth"))
        return model.eval()


def read(name: str, cache: Path) -> Task:
    """Read a data set and its network."""
    if name == "glyphs":
        write_dataset(cache / "glyphs")
        opened = open_model(SHIPPED)
        train, val = open_train_val(str(cache / "glyphs"))
        pixels, labels = zip(*(_arrays(data) for data in (train, val)), strict=True)
        train, *held_out = _split(name, train.class_names, pixels, labels)
        model, preprocessing = opened.model, opened.preprocessing
    else:
        task = read_task(name, cache)
        images = torch.cat([task.tune, task.val]).numpy(), torch.cat([task.tune_labels, task.val_labels]).numpy()
        count = FASHION_IMAGES if name == "fashion-mnist" else len(task.train)
        names = tuple(str(label) for label in range(task.num_classes))
        train = _opened(name, names, task.train[:count].numpy(), task.train_labels[:count].numpy(), "train")
        cut = len(task.tune)
        held_out = [
            _opened(name, names, images[0][part], images[1][part], "val") for part in (slice(0, cut), slice(cut, None))
        ]
        model = new_model(task, 256, 0)
        model.load_state_dict(torch.load(cache / f"{name}-256-0.pth"))
        preprocessing = {
            "input_size": (1, 32, 32),
            "mean": (0.5,),
            "std": (0.5,),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }
    return Task(name, train, *held_out, preprocessing, _old(model, train, preprocessing), cache, 0)


def _arrays(data: OpenedData) -> tuple[np.ndarray, np.ndarray]:
    loaded = [data.images.load(index) for index in range(len(data))]
    return np.stack([np.asarray(image) for image, _ in loaded]), np.array([label for _, label in loaded])


def _split(name: str, names: tuple[str, ...], pixels: tuple, labels: tuple) -> Iterator[OpenedData]:
    yield _opened(name, names, pixels[0], labels[0], "train")
    third = np.arange(len(labels[1])) % 3 == 0
    for part in (third, ~third):
        yield _opened(name, names, pixels[1][part], labels[1][part], "val")


def _opened(name: str, names: tuple[str, ...], pixels: np.ndarray, labels: np.ndarray, split: str) -> OpenedData:
    images = ArrayImages(np.ascontiguousarray(pixels), labels.astype(np.int64))
    return OpenedData(images, names, name, f"{len(labels)} images", name, split)


@torch.no_grad()
def _old(model: nn.Module, train: OpenedData, preprocessing: dict) -> Old:
    model.eval()
    layer = model.get_classifier()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(2000))[:CALIBRATION_IMAGES].numpy()
    some = replace(train, images=ArrayImages(train.images.pixels[order], train.images.labels[order]))
    loader = make_loader(some, preprocessing, training=False, batch_size=256, workers=0)
    features: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0].detach().clone()))
    for images, _ in loader:
        model(images)
    hook.remove()
    return Old(layer.weight.detach().float(), layer.bias.detach().float(), torch.cat(features))


def with_head(model: nn.Module, head: str, old: Old) -> nn.Module:
    """Put a head on the network."""
    if head == "binary":
        model.classifier = binary(old, old.weight.shape[1])
    elif head == "hadamard":
        classes, features = old.weight.shape
        spec = HeadSpec("hadamard", features, classes, standardize=True, matched=True, blocks=-(-classes // features))
        model.classifier = replacement(spec, old.weight, old.bias, features=old.features).head
    return model


def top1(model: nn.Module, data: OpenedData, preprocessing: dict) -> float:
    """Measure a model, percent."""
    return evaluate(model, make_loader(data, preprocessing, training=False, batch_size=250, workers=0), device=CPU).top1


def trial(task: Task, head: str, options: FinetuneOptions, distill: bool) -> dict:
    """Fine-tune one head and measure it before and after."""
    model = with_head(task.network(), head, task.old)
    found = {"tuned_before": top1(model, task.tune, task.preprocessing)}
    found["before"] = top1(model, task.val, task.preprocessing)
    teacher = ReferenceModel("original", "0" * 64, task.network(), task.preprocessing) if distill else None
    with tempfile.TemporaryDirectory() as folder:
        opened = OpenedInputs(task.train, task.tune, task.preprocessing, teacher=teacher)
        output = RunOutput(Path(folder), save=lambda _model, _path, _record: None, force=True)
        result = train_model(model, opened, options, output)
    found["tuned_on"] = result.history[-1].val_top1
    found["epochs_tuned_on"] = [record.val_top1 for record in result.history]
    found["top1"] = top1(model, task.val, task.preprocessing)
    return found


def run(arguments: argparse.Namespace) -> None:
    """Run the trials that are not in the file yet."""
    torch.set_num_threads(1)
    known = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {_key(entry) for entry in known}
    for name in arguments.data:
        task = read(name, arguments.cache)
        for epochs in arguments.epochs:
            for head in arguments.heads:
                for lr in arguments.lr:
                    for distill in (False, True) if arguments.distill else (False,):
                        for seed in arguments.seeds:
                            entry = {"data": name, "head": head, "epochs": epochs, "lr": lr, "distill": distill}
                            entry["seed"] = seed
                            if _key(entry) in done:
                                continue
                            options = FinetuneOptions.create(
                                epochs=epochs,
                                seed=seed,
                                workers=0,
                                device="cpu",
                                channels_last=True,
                                **({} if lr is None else {"lr": lr}),
                                **({} if name == "fashion-mnist" else LETTERS),
                            )
                            entry |= trial(task, head, options, distill)
                            with arguments.out.open("a") as file:
                                file.write(json.dumps(entry) + "\n")
                            print(json.dumps(entry), flush=True)


def _key(entry: dict) -> tuple:
    return tuple(entry[name] for name in ("data", "head", "epochs", "lr", "distill", "seed"))


def print_table(path: Path) -> None:
    """Print one row per trial."""
    print("| data | head | distilled | learning rate | epochs | seed | before | after | change |\n|" + "---|" * 9)
    for line in path.read_text().splitlines():
        e = json.loads(line)
        print(
            f"| {e['data']} | {e['head']} | {'yes' if e['distill'] else 'no'} | {e['lr'] or 'default'} | {e['epochs']} "
            f"| {e['seed']} | {e['before']:.2f} | {e['top1']:.2f} | {e['top1'] - e['before']:+.2f} |"
        )


def _rate(text: str) -> float | None:
    return None if text == "default" else float(text)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["glyphs", "kanji-200", "fashion-mnist"])
    parser.add_argument("--heads", nargs="+", default=["learned", "binary"], choices=HEADS)
    parser.add_argument("--lr", nargs="+", type=_rate, default=[None])
    parser.add_argument("--epochs", nargs="+", type=int, default=[5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--distill", action="store_true", help="also with the original as teacher")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark"), help="folder of images and networks")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/gentle.jsonl"))
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of these results")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(arguments.table)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
