"""Measure what a retrofit costs in accuracy: many classifiers on one trained network, each with the same budget.

    python tests/benchmarks/retrofit.py --data kanji --seeds 0 1 2 --out kanji.jsonl
    python tests/benchmarks/retrofit.py --data kanji --table kanji.jsonl

For each seed, a small timm network is trained with a learned classifier. It is test_efficientnet; if N is not its 256,
its last convolution has N channels. Each row starts from that network: statistics and codes come from 2,048 training
images without their labels, the classifier is replaced, and accuracy is measured. Rows that are not one-shot are then
trained, all with the same steps, images and optimiser, and measured after 10 %, 25 % and 100 % of the steps. Rows "from
scratch" get the budget of both trainings in one. Accuracy is top-1 on held-out typefaces (Fashion-MNIST: test images).

Each trained row has its own learning rate, found by the same search: with the first seed, 0.002 and 0.006 are tried,
then further factors of 3 in the direction of the better one until one is worse. The search compares the final accuracy
on every third held-out image (`tuned_on`); these images are neither trained on nor reported. Each trial is added to
--out, and a trial that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import kanji
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from fixify.data import open_train_val
from fixify.heads import FixedClassifier, HeadSpec, replacement, wide_blocks
from fixify.heads.kinds import BINARY
from fixify.training import FinetuneOptions
from fixify.training.optimisers import parameter_groups

ARCHITECTURE = "test_efficientnet"
CALIBRATION_IMAGES = 2048
BATCH = 256
TEMPERATURE = 4.0
FIRST_RATES, RATE_FACTOR = (2e-3, 6e-3), 3.0
BASE_RATE = 1e-2
"""AdamW's learning rate for the networks that all rows start from, and for rows from scratch."""
TRAINED_BITS, TRAINED_RANKS = (24, 64, 88, 256), (2, 6, 16)
"""The compressed classifiers that are also trained: about 4, 9 to 12 and 33 bytes per class."""
MARKS = (0.1, 0.25, 1.0)
SCRATCH: dict[str, tuple[str, bool] | None] = {
    "from scratch, learned": None,
    "from scratch, fixed + centered": ("hadamard", True),
    "from scratch, fixed (paper)": ("hadamard", False),
    "from scratch, identity + centered": ("identity", True),
    "from scratch, identity": ("identity", False),
}
"""Kind of the fixed head and whether it standardises; None stands for the learned classifier. Identity needs C <= N."""


@dataclass(frozen=True)
class Task:
    """Images uint8 [n, H, W] with labels, and how many steps to train."""

    train: Tensor
    train_labels: Tensor
    tune: Tensor
    tune_labels: Tensor
    val: Tensor
    val_labels: Tensor
    num_classes: int
    base_steps: int
    steps: int


@dataclass(frozen=True)
class Old:
    """The classifier that is replaced, [C, N] and [C], and the features of the calibration images, [S, N]."""

    weight: Tensor
    bias: Tensor
    features: Tensor


def read_task(name: str, cache: Path) -> Task:
    """Read `kanji` (2,965 classes), `kanji-512` or `kanji-200` (the first of them), or `fashion-mnist`."""
    if name == "fashion-mnist":
        train, val = (opened.images for opened in open_train_val(name))
        images = [F.pad(torch.from_numpy(split.pixels.copy()), (2, 2, 2, 2)) for split in (train, val)]
        labels = [torch.from_numpy(split.labels) for split in (train, val)]
        return _task(images[0], labels[0], images[1], labels[1], 10, 700, 234)
    train, train_labels, val, val_labels = (torch.from_numpy(array) for array in kanji.load(cache))
    sizes = {"kanji": (2965, 972, 324), "kanji-512": (512, 350, 175), "kanji-200": (200, 350, 175)}
    classes, base_steps, steps = sizes[name]
    kept, held_out = train_labels < classes, val_labels < classes
    return _task(train[kept], train_labels[kept], val[held_out], val_labels[held_out], classes, base_steps, steps)


def _task(train: Tensor, train_labels: Tensor, held_out: Tensor, labels: Tensor, *sizes: int) -> Task:
    tune = torch.arange(len(held_out)) % 3 == 0
    return Task(train, train_labels, held_out[tune], labels[tune], held_out[~tune], labels[~tune], *sizes)


def to_input(images: Tensor) -> Tensor:
    return ((images.float() / 255 - 0.5) / 0.5).unsqueeze(1).contiguous(memory_format=torch.channels_last)


def new_model(task: Task, num_features: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, num_classes=task.num_classes, in_chans=1)
    if num_features != model.num_features:
        model.conv_head = nn.Conv2d(model.conv_head.in_channels, num_features, 1, bias=False)
        model.bn2 = BatchNormAct2d(num_features, act_layer="silu")
        model.num_features = model.head_hidden_size = num_features
        model.reset_classifier(task.num_classes)
    return model.to(memory_format=torch.channels_last)


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    parts = zip(images.split(512), labels.split(512), strict=True)
    right = sum(int((model(to_input(part)).argmax(dim=1) == wanted).sum()) for part, wanted in parts)
    return 100 * right / len(images)


def batches(task: Task, seed: int) -> Iterator[Tensor]:
    """Yield the training images of each step, by number."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        order = torch.randperm(len(task.train), generator=generator)
        yield from order[: len(order) // BATCH * BATCH].split(BATCH)


def set_rates(optimiser: torch.optim.Optimizer, peaks: Sequence[float], step: int, steps: int) -> None:
    """Warm up for a tenth of the steps, and fall as a cosine."""
    rate = min(1.0, step / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    for group, peak in zip(optimiser.param_groups, peaks, strict=True):
        group["lr"] = rate * peak


def distillation(logits: Tensor, teacher: nn.Module, images: Tensor) -> Tensor:
    """Compute the distillation loss of `finetune --distill`."""
    with torch.no_grad():
        wanted = (teacher(images) / TEMPERATURE).softmax(dim=1)
    return TEMPERATURE**2 * F.kl_div((logits / TEMPERATURE).log_softmax(dim=1), wanted, reduction="batchmean")


def train(
    model: nn.Module,
    task: Task,
    steps: int,
    seed: int,
    *,
    lr: float,
    head_lr_scale: float = 10.0,
    teacher: nn.Module | None = None,
) -> list[float]:
    """Train, and return top-1 after each of MARKS of the steps.

    With a teacher, half of the loss is the distillation loss of `finetune --distill`.
    """
    options = FinetuneOptions(weight_decay=0.05, head_lr_scale=head_lr_scale)
    optimiser = torch.optim.AdamW(parameter_groups(model, options), lr=lr)
    peaks = [group.get("lr_scale", 1.0) * group["lr"] for group in optimiser.param_groups]
    picks = batches(task, seed)
    marks = {max(1, round(mark * steps)) for mark in MARKS}
    seen = []
    for step in range(1, steps + 1):
        set_rates(optimiser, peaks, step, steps)
        picked = next(picks)
        model.train()
        images = to_input(task.train[picked])
        logits = model(images)
        loss = F.cross_entropy(logits, task.train_labels[picked])
        if teacher is not None:
            loss = 0.5 * loss + 0.5 * distillation(logits, teacher, images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in marks:
            seen.append(top1(model, task.val, task.val_labels))
    return seen


@torch.no_grad()
def old_classifier(model: nn.Module, task: Task, seed: int) -> Old:
    generator = torch.Generator().manual_seed(2000 + seed)
    images = task.train[torch.randperm(len(task.train), generator=generator)[:CALIBRATION_IMAGES]]
    parts = [model.forward_head(model.forward_features(to_input(part)), pre_logits=True) for part in images.split(512)]
    layer = model.get_classifier()
    return Old(layer.weight.detach().clone(), layer.bias.detach().clone(), torch.cat(parts))


def in_order(old: Old, *, kind: str = "hadamard", calibrated: bool = False) -> nn.Module:
    """Make a fixed head with codes in class order, as in the paper, from nothing of the old classifier."""
    head = FixedClassifier(HeadSpec(kind, old.weight.shape[1], old.weight.shape[0], standardize=calibrated))
    if calibrated:
        head.calibrate_([old.features])
    return head


def matched(old: Old, *, calibrated: bool) -> nn.Module:
    c, n = old.weight.shape
    spec = HeadSpec("hadamard", n, c, standardize=calibrated, matched=True, blocks=wide_blocks(n, c))
    return replacement(spec, old.weight, old.bias, features=old.features if calibrated else None).head


def binary(old: Old, bits: int) -> nn.Module:
    c, n = old.weight.shape
    spec = HeadSpec("binary", n, c, **BINARY.default_options(n, has_features=True, bits_per_class=bits))
    return replacement(spec, old.weight, old.bias, features=old.features).head


def frozen(old: Old, weight: Tensor) -> nn.Module:
    """Make an ordinary classifier with a compressed weight that is not trained, and a bias that is."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias.data.copy_(old.bias)
    return layer


def rounded(old: Old, bits: int) -> nn.Module:
    """Round the weight to symmetric integers with one float16 step size per class."""
    step = (old.weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
    return frozen(old, (old.weight / step).round() * step)


def low_rank(old: Old, rank: int) -> nn.Module:
    """Truncate the weight's SVD and store it in float16."""
    left, values, right = torch.linalg.svd(old.weight, full_matrices=False)
    return frozen(old, (left[:, :rank] * values[:rank]).half().float() @ right[:rank].half().float())


@dataclass(frozen=True)
class Row:
    """How a classifier is made and trained.

    Attributes:
        make: Makes the classifier; None keeps the learned one.
        bytes_per_class: What it stores.
        head_lr_scale: Learning rate of the head, relative to the rest; None means no training.
        rate_of: The row whose learning rate it takes; None searches for its own.
        distilled: Whether the original also teaches.
    """

    make: Callable[[Old], nn.Module] | None
    bytes_per_class: float
    head_lr_scale: float | None = None
    rate_of: str | None = None
    distilled: bool = False


def rows(task: Task, num_features: int) -> dict[str, Row]:
    c, n = task.num_classes, num_features
    index = 4.0 if c > n else 2.0
    made = {
        "learned, continued (control)": Row(None, 4.0 * n, 10.0),
        "fixed, in order (paper)": Row(in_order, 0.0, 30.0),
        "fixed, matched": Row(partial(matched, calibrated=False), index, 30.0),
        "fixed, matched + centered": Row(partial(matched, calibrated=True), index, 30.0),
        "fixed, in order + centered": Row(partial(in_order, calibrated=True), 0.0, 30.0),
        f"binary {n}": Row(partial(binary, bits=n), n / 8 + 1, 10.0),
    }
    if c <= n:  # class c reads feature c: the classifier deleted
        made["identity"] = Row(partial(in_order, kind="identity"), 0.0, 30.0)
        made["identity + centered"] = Row(partial(in_order, kind="identity", calibrated=True), 0.0, 30.0)
    for bits in (16, 24, 32, 48, 64, 88, 128, 192, 256):
        if bits < n and 2**bits >= c:
            make, size = partial(binary, bits=bits), bits / 8 + 1
            made[f"binary {bits}"] = Row(make, size, 10.0 if bits in TRAINED_BITS else None)
            if bits == 88:
                made["binary 88, distilled"] = Row(make, size, 10.0, rate_of="binary 88", distilled=True)
    for bits in (8, 4, 3, 2):
        rate_of = "learned, continued (control)" if bits == 8 else None
        trained = 10.0 if bits in (8, 4) else None
        made[f"int{bits}"] = Row(partial(rounded, bits=bits), n * bits / 8 + 2, trained, rate_of)
    for rank in (2, 4, 6, 8, 12, 16, 32, 64):
        if rank < min(n, c):
            size = 2.0 * rank * (c + n) / c
            made[f"SVD {rank}"] = Row(partial(low_rank, rank=rank), size, 10.0 if rank in TRAINED_RANKS else None)
    return made


class Bench:
    """Runs the trials of one data set and width, and adds each result to a file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.task = read_task(arguments.data, arguments.cache)
        self.num_features = arguments.num_features
        self.known = read(arguments.out) if arguments.out.exists() else []

    def find(self, row: str, seed: int, lr: float | None) -> dict | None:
        return next((e for e in self.known if (e["row"], e["seed"], e["lr"]) == (row, seed, lr)), None)

    def record(self, row: str, seed: int, lr: float | None, size: float, top1: list[float], tuned_on: float) -> dict:
        entry = {"data": self.arguments.data, "num_features": self.num_features, "seed": seed, "row": row}
        entry |= {"bytes": size, "lr": lr, "top1": top1, "tuned_on": tuned_on}
        self.known.append(entry)
        with self.arguments.out.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)
        return entry

    def base(self, seed: int) -> nn.Module:
        """Return the network that every row starts from; it is trained once."""
        path = self.arguments.cache / f"{self.arguments.data}-{self.num_features}-{seed}.pth"
        model = new_model(self.task, self.num_features, seed)
        if not path.exists():
            train(model, self.task, self.task.base_steps, seed, lr=BASE_RATE, head_lr_scale=1.0)
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path))
        return model.eval()

    def trial(self, name: str, row: Row, seed: int, lr: float | None, old: Old) -> dict:
        known = self.find(name, seed, lr)
        if known is not None:
            return known
        task, model = self.task, self.base(seed)
        if row.make is not None:
            model.classifier = row.make(old)
        values = [top1(model, task.val, task.val_labels)]
        if lr is not None and row.head_lr_scale is not None:
            teacher = self.base(seed) if row.distilled else None
            values += train(model, task, task.steps, seed, lr=lr, head_lr_scale=row.head_lr_scale, teacher=teacher)
        return self.record(name, seed, lr, row.bytes_per_class, values, top1(model, task.tune, task.tune_labels))

    def search(self, name: str, row: Row, seed: int, old: Old) -> float:
        """Find the learning rate whose two neighbours are worse."""

        def tuned_on(lr: float) -> float:
            return self.trial(name, row, seed, lr, old)["tuned_on"]

        low, high = FIRST_RATES
        factor = RATE_FACTOR if tuned_on(high) > tuned_on(low) else 1 / RATE_FACTOR
        best = high if factor > 1 else low
        while tuned_on(beyond := float(f"{best * factor:.1g}")) > tuned_on(best):
            best = beyond
        return best

    def scratch(self, name: str, seed: int, head: tuple[str, bool] | None) -> None:
        task = self.task
        impossible = head is not None and head[0] == "identity" and task.num_classes > self.num_features
        if impossible or self.find(name, seed, BASE_RATE) is not None:
            return
        model = new_model(task, self.num_features, seed)
        if head is not None:
            kind, standardize = head
            model.classifier = FixedClassifier(
                HeadSpec(kind, self.num_features, task.num_classes, standardize=standardize)
            )
        values = train(model, task, task.base_steps + task.steps, seed, lr=BASE_RATE, head_lr_scale=1.0)
        size = 4.0 * self.num_features if head is None else 0.0
        self.record(name, seed, BASE_RATE, size, [values[-1]], top1(model, task.tune, task.tune_labels))

    def run(self) -> None:
        arguments = self.arguments
        arguments.cache.mkdir(parents=True, exist_ok=True)
        rates: dict[str, float] = {}
        for seed in arguments.seeds:
            old = old_classifier(self.base(seed), self.task, seed)
            every = rows(self.task, self.num_features)
            for name, row in every.items():
                if arguments.rows and name not in arguments.rows:
                    continue
                if row.head_lr_scale is None or arguments.one_shot:
                    self.trial(name, row, seed, None, old)
                    continue
                source = row.rate_of or name
                if source not in rates:
                    rates[source] = self.search(source, every[source], seed, old)
                self.trial(name, row, seed, rates[source], old)
            for name, head in SCRATCH.items():
                if not arguments.one_shot and (not arguments.rows or name in arguments.rows):
                    self.scratch(name, seed, head)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chosen(entries: list[dict]) -> dict[str, list[dict]]:
    """By row: its entries at the rate that was best on the images to tune on."""
    grouped: dict[str, list[dict]] = {}
    for entry in entries:
        grouped.setdefault(entry["row"], []).append(entry)
    for row, trials in grouped.items():
        first = [trial for trial in trials if trial["seed"] == trials[0]["seed"]]
        lr = max(first, key=lambda trial: trial["tuned_on"])["lr"]
        grouped[row] = [trial for trial in trials if trial["lr"] == lr]
    return grouped


def print_table(path: Path) -> None:
    """Print means over seeds (lowest to highest), each row at the learning rate that its search chose."""
    grouped = chosen(read(path))
    columns = ("no training", "10 %", "25 %", "100 % of the budget")
    print(f"| classifier | bytes per class | {' | '.join(columns)} | rate | seeds |\n|{'---|' * 8}")
    for row, entries in grouped.items():
        scratch = row.startswith("from scratch")
        cells = []
        for column in range(4):
            at = 0 if scratch and column == 3 else -1 if scratch else column
            values = [entry["top1"][at] for entry in entries if 0 <= at < len(entry["top1"])]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        print(
            f"| {row} | {entries[0]['bytes']:.1f} | {' | '.join(cells)} | {entries[0]['lr'] or ''} | {len(entries)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="kanji", choices=("kanji", "kanji-200", "fashion-mnist"))
    parser.add_argument("--num-features", type=int, default=256, choices=(256, 1024))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--one-shot", action="store_true", help="only what needs no training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark"), help="folder of images and networks")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/results.jsonl"))
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of these results")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(arguments.table)
        return
    torch.set_num_threads(arguments.threads)
    Bench(arguments).run()


if __name__ == "__main__":
    main()
