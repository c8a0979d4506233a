"""Measure whether `finetune` harms a head that starts near the original, and whether the original as teacher helps.

    python tests/benchmarks/gentle.py --out gentle.jsonl --teachers start original --epochs 1 5 20
    python tests/benchmarks/gentle.py --table gentle.jsonl

Each trial is one `fixify.training.train_model` with the defaults of `finetune`, except for what the command line names.
Letters are not mirrored, and cropped less (`--hflip 0 --scale 0.8 1`). The data: the demo's 500 glyphs and its 224
letters with their network; kanji-200 and Fashion-MNIST with the networks of retrofit.py, made by
`retrofit.py --data NAME --seeds 0 --one-shot` with the same --cache. At most 4,500 training images. Heads: the learned
classifier itself (control); binary, one sign per weight; and matched Hadamard codes. The last two are calibrated on
1,024 training images without labels.

Top-1 is that of the last epoch, on every third held-out image (`tuned_on`, to choose) and on the others (`top1`, to
report). `best` is the top-1 of the best checkpoint on the others, and `highest` that of the checkpoint which would be
best if the highest top-1 won, however small the gain; --best prints both. Each trial is added to --out, and a trial
that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from retrofit import Old, binary, new_model, read_task
from torch import Tensor, nn

from fixify.checkpoints.open import open_model
from fixify.data import OpenedData, make_loader, open_train_val
from fixify.data.idx import ArrayImages
from fixify.demo.glyphs import glyph_classes, write_dataset
from fixify.demo.run import SHIPPED, write_part
from fixify.heads import HeadSpec, replacement
from fixify.metrics import evaluate
from fixify.training import FinetuneOptions, OpenedInputs, ReferenceModel, RunOutput, train_model
from fixify.training.events import best_of
from fixify.training.options import USUAL_TEACHING

TEACHERS = ("none", "original", "start")
SCRIPTS = ("armenian", "cyrillic", "digit", "georgian", "greek", "latin")
LABELS = tuple(label for label, entry in enumerate(glyph_classes()) if entry.name.partition("_")[0] in SCRIPTS)
DATA = ("glyphs", "letters", "kanji-200", "fashion-mnist", "kanji")
HEADS = ("learned", "binary", "hadamard")
CPU = torch.device("cpu")
CALIBRATION_IMAGES, TRAIN_IMAGES = 1024, 4500
LETTERS = {"hflip": 0.0, "scale": (0.8, 1.0)}
KEYS = ("data", "head", "epochs", "lr", "teacher", "distill", "seed", "set")
PLAIN = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}


@dataclass(frozen=True)
class Task:
    """Images of one data set, and what its network's classifier and features are; `network` is made anew each time."""

    name: str
    train: OpenedData
    tune: OpenedData
    val: OpenedData
    preprocessing: dict
    cache: Path

    def network(self) -> nn.Module:
        """Return the trained network with its learned classifier."""
        if self.name == "glyphs":
            return open_model(SHIPPED).model
        if self.name == "letters":
            path = self.cache / "letters224.pth"
            write_part(path, LABELS)
            return open_model(path).model
        model = new_model(read_task(self.name, self.cache), 256, 0)
        model.load_state_dict(torch.load(self.cache / f"{self.name}-256-0.pth"))
        return model.eval()

    @torch.no_grad()
    def old(self) -> Old:
        """Return the classifier that is replaced, and features of training images."""
        model = self.network()
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(2000))[:CALIBRATION_IMAGES]
        images = self.train.images
        some = replace(self.train, images=ArrayImages(images.pixels[order.numpy()], images.labels[order.numpy()]))
        found: list[Tensor] = []
        layer = model.get_classifier()
        hook = layer.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].clone()))
        for batch, _ in make_loader(some, self.preprocessing, training=False, batch_size=256, workers=0):
            model(batch)
        hook.remove()
        return Old(layer.weight.detach().float(), layer.bias.detach().float(), torch.cat(found))


def read(name: str, cache: Path) -> Task:
    """Read a data set."""
    preprocessing = PLAIN
    if name in ("glyphs", "letters"):
        write_dataset(cache / "glyphs")
        preprocessing = dict(open_model(SHIPPED).preprocessing)
        splits = open_train_val(str(cache / "glyphs"))
        chosen = np.arange(splits[0].num_classes) if name == "glyphs" else np.array(LABELS)
        names = tuple(splits[0].class_names[label] for label in chosen)
        (train, train_labels), (held_out, val_labels) = (_arrays(split, chosen) for split in splits)
        kept = np.arange(0, len(train), -(-len(train) // TRAIN_IMAGES))
    else:
        task = read_task(name, cache)
        names = tuple(str(label) for label in range(task.num_classes))
        train, train_labels = task.train.numpy(), task.train_labels.numpy()
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        kept = order[:TRAIN_IMAGES].numpy()
        held_out, val_labels = None, None
    opened = [_opened(name, names, train[kept], train_labels[kept], "train")]
    if held_out is None:
        parts = [(task.tune.numpy(), task.tune_labels.numpy()), (task.val.numpy(), task.val_labels.numpy())]
    else:
        third = np.arange(len(held_out)) % 3 == 0
        parts = [(held_out[part], val_labels[part]) for part in (third, ~third)]
    opened += [_opened(name, names, *part, "val") for part in parts]
    return Task(name, *opened, preprocessing, cache)


def _arrays(data: OpenedData, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the images of some classes; their labels count from 0."""
    loaded = [data.images.load(index) for index in range(len(data))]
    pixels, labels = np.stack([np.asarray(image) for image, _ in loaded]), np.array([label for _, label in loaded])
    kept = np.isin(labels, chosen)
    return pixels[kept], np.searchsorted(chosen, labels[kept])


def _opened(name: str, names: tuple[str, ...], pixels: np.ndarray, labels: np.ndarray, split: str) -> OpenedData:
    images = ArrayImages(np.ascontiguousarray(pixels), labels.astype(np.int64))
    return OpenedData(images, names, name, f"{len(labels)} images", name, split)


def with_head(model: nn.Module, head: str, old: Old) -> nn.Module:
    """Put a head on the network."""
    classes, features = old.weight.shape
    if head == "binary":
        model.classifier = binary(old, features)
    elif head == "hadamard":
        spec = HeadSpec("hadamard", features, classes, standardize=True, matched=True, blocks=-(-classes // features))
        model.classifier = replacement(spec, old.weight, old.bias, features=old.features).head
    return model


def top1(model: nn.Module, data: OpenedData, preprocessing: dict) -> float:
    """Measure a model, percent."""
    loader = make_loader(data, preprocessing, training=False, batch_size=250, workers=0)
    return evaluate(model, loader, device=CPU).top1


def trial(task: Task, old: Old, head: str, options: FinetuneOptions, taught_by: str) -> dict:
    """Fine-tune one head, and measure it before and after."""
    model = with_head(task.network(), head, old)
    before = [top1(model, data, task.preprocessing) for data in (task.tune, task.val)]
    teacher = None
    if taught_by != "none":
        taught = task.network() if taught_by == "original" else copy.deepcopy(model)
        teacher = ReferenceModel(taught_by, "0" * 64, taught, task.preprocessing)
    if taught_by == "start" and options.distill_weight is None:
        options = options.replace(distill_weight=USUAL_TEACHING)  # as `finetune` does
    with tempfile.TemporaryDirectory() as folder:
        opened = OpenedInputs(task.train, task.tune, task.preprocessing, teacher=teacher)
        weights: list[dict[str, Tensor]] = []  # of the start, and of each validation

        def save(saved: nn.Module, path: Path, _record: object) -> None:
            if path == output.last_path or not weights:
                weights.append(copy.deepcopy(saved.state_dict()))

        output = RunOutput(Path(folder), save=save, force=True)
        result = train_model(model, opened, options, output)
    history, found = result.history, []
    for state in weights:
        model.load_state_dict(state)
        found.append(top1(model, task.val, task.preprocessing))
    reported = dict(zip((result.start, *history), found, strict=True))
    uncompared = {replace(record, gained=None, lost=None): record for record in history}
    highest = best_of(result.start, list(uncompared))
    return {
        "tuned_before": before[0],
        "before": before[1],
        "tuned_on": history[-1].val_top1,
        "epochs_tuned_on": [record.val_top1 for record in history],
        "epochs_changed": [(record.gained, record.lost) for record in history],
        "epochs_top1": [reported[record] for record in history],
        "top1": reported[history[-1]],
        "best": reported[result.after],
        "highest": reported[uncompared.get(highest, highest)],
    }


def run(arguments: argparse.Namespace) -> None:
    """Run the trials that are not in the file yet."""
    torch.set_num_threads(1)
    done = [{key: entry[key] for key in KEYS} for entry in entries(arguments.out)]
    others = {name: json.loads(value) for name, value in (each.split("=") for each in arguments.set)}
    for name in arguments.data:
        task = read(name, arguments.cache)
        old = task.old()
        for values in itertools.product(
            [name],
            arguments.heads,
            arguments.epochs,
            arguments.lr,
            arguments.teachers,
            arguments.distill,
            arguments.seeds,
            [others],
        ):
            entry = dict(zip(KEYS, values, strict=True))
            if entry["teacher"] == "none":
                entry["distill"] = None
            if entry in done:
                continue
            given = {} if name == "fashion-mnist" else LETTERS
            options = FinetuneOptions.create(
                epochs=entry["epochs"],
                seed=entry["seed"],
                lr=entry["lr"],
                distill_weight=entry["distill"],
                workers=0,
                device="cpu",
                channels_last=True,
                **given,
                **others,
            )
            entry |= trial(task, old, entry["head"], options, entry["teacher"])
            with arguments.out.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(json.dumps(entry), flush=True)


def entries(path: Path) -> list[dict]:
    """Read the trials of a file; none if it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rate(text: str) -> float | str | None:
    """Read a learning rate: a number, auto, or default."""
    return {"default": None, "auto": "auto"}[text] if text in ("default", "auto") else float(text)


def print_table(path: Path) -> None:
    """Print one row per trial."""
    columns = (
        "data",
        "head",
        "epochs",
        "learning rate",
        "teacher",
        "its weight",
        "others",
        "before",
        "after",
        "change",
    )
    print(f"| {' | '.join(columns)} | change on the other third |\n|" + "---|" * (len(columns) + 1))
    for e in sorted(entries(path), key=lambda e: [DATA.index(e["data"]), HEADS.index(e["head"]), e["epochs"]]):
        others = ", ".join(f"{name} {value}" for name, value in e["set"].items())
        weight = "default" if e["distill"] is None else f"{e['distill']:g}"
        taught = f"{e['teacher']} | {'' if e['teacher'] == 'none' else weight}"
        what = f"{e['data']} | {e['head']} | {e['epochs']} | {e['lr'] or 'default'} | {taught} | {others}"
        changes = f"{e['top1'] - e['before']:+.2f} | {e['tuned_on'] - e['tuned_before']:+.2f}"
        print(f"| {what} | {e['before']:.2f} | {e['top1']:.2f} | {changes} |")


def print_best(path: Path) -> None:
    """Print one row per data set, head, teacher and number of epochs: the best checkpoint minus the start, per seed."""
    groups: dict[tuple, list[dict]] = {}
    for entry in sorted(entries(path), key=lambda each: each["seed"]):
        if "highest" in entry:
            groups.setdefault(tuple(entry[key] for key in ("data", "head", "teacher", "epochs")), []).append(entry)
    print("| data | head | teacher | epochs | the highest top-1 wins | above chance | seeds that keep the start |")
    print("|---|---|---|---|---|---|---|")
    for group, found in sorted(groups.items(), key=lambda each: (DATA.index(each[0][0]), each[0][1:])):
        cells = [*map(str, group)]
        for rule in ("highest", "best"):
            gaps = [entry[rule] - entry["before"] for entry in found]
            cells.append(f"{sum(gaps) / len(gaps):+.2f} ({' '.join(f'{gap:+.2f}' for gap in gaps)})")
        changed = [entry["epochs_changed"] for entry in found]
        kept = sum(all(gained - lost <= 2 * (gained + lost) ** 0.5 for gained, lost in each) for each in changed)
        print(f"| {' | '.join(cells)} | {kept} of {len(found)} |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=DATA[:4], choices=DATA)
    parser.add_argument("--heads", nargs="+", default=HEADS[:2], choices=HEADS)
    parser.add_argument("--lr", nargs="+", type=rate, default=[None])
    parser.add_argument("--epochs", nargs="+", type=int, default=[5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--teachers", nargs="+", default=["none"], choices=TEACHERS, help="start: the head itself")
    parser.add_argument("--distill", nargs="+", type=float, default=[None], help="weights of the teacher")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="other options of finetune")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark"), help="folder of images and networks")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/gentle.jsonl"))
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of these results")
    parser.add_argument("--best", type=Path, metavar="RESULTS", help="print the best checkpoints of these results")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(arguments.table)
    elif arguments.best:
        print_best(arguments.best)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
