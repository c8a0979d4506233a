"""Try what could close the gap of fixed classifiers with more classes than features.

    python tests/benchmarks/many_classes.py --seeds 0 1 2 --out many.jsonl --trials "64 signs"
    python tests/benchmarks/many_classes.py --table many.jsonl

Data, networks, steps, images and optimiser are those of retrofit.py (kanji, N = 256), so a trial can be put beside its
rows; the networks are made by `retrofit.py --data kanji --one-shot` with the same --cache. Trials "from scratch" get
the budget of both trainings in one. Top-1 is that of the last step, on every third held-out image (`tuned_on`, to
choose) and on the others (`top1`, to report). Each result is added to --out, and one that is there already is not
repeated. `--list` names the trials.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from retrofit import (
    BASE_RATE,
    MARKS,
    Old,
    Task,
    batches,
    distillation,
    matched,
    new_model,
    old_classifier,
    read,
    read_task,
    set_rates,
    to_input,
    top1,
)
from torch import Tensor, nn

from fixify.heads import FixedClassifier, HeadSpec, default_blocks, feature_statistics, replacement
from fixify.heads.fitting import level_moment
from fixify.heads.kinds import BINARY
from fixify.heads.learned_signs import signs_of
from fixify.heads.level_search import CenteredRows
from fixify.heads.projection_choice import projected_spec
from fixify.heads.projection_search import Principal
from fixify.training import FinetuneOptions
from fixify.training.optimisers import parameter_groups

WIDTH = 256
RATE = 0.02
"""AdamW's learning rate that was best for 64 signs in retrofit.py; from scratch it is BASE_RATE."""


@dataclass(frozen=True)
class Trial:
    """A head and how it is trained; the defaults are the row "binary 64" of retrofit.py without lengths and biases.

    Attributes:
        signs: Signs per class, d; 0 is a learned classifier, -1 are Hadamard codes, matched unless from scratch.
        gains: Whether each class has a length, one byte.
        bias: Whether each class has a bias, four bytes.
        learn: Share of the steps in which the signs are learned: they are those of latent weights, and the gradient of
            a sign is taken for that of its weight.
        latent_rate: Learning rate of the latent weights, relative to the network's. Their mean size begins at 1.
        begin: Sizes of the latent weights at the start: "old" as in the old classifier, "flat" all 1, or "random"; or
            "tree": other signs, all of size 1, that halve the old class vectors again and again.
        soft: Share of the steps before which the latent weights themselves are the codes.
        distill: The original's weight in the loss at the start.
        fade: Share of the steps after which that weight has fallen to 0; None: it stays.
        head_rate: Learning rate of scale and bias, relative to the network's.
        smoothing: Label smoothing.
        margin: Of CosFace.
        batch_statistics: Whether features are centered by the mean of the batch in training.
        ema: Decay of the average of the weights that is measured; 0: no average.
        alpha: Factor on the scale at the start.
        rematch: After these shares of the steps, codes are chosen again for the classes' mean features.
        budget: Factor on the steps.
        scratch: Whether the network starts at random weights.
        warmup: From scratch: share of the steps with a learned classifier, whose signs are then taken.
        restart: Whether schedule and optimiser begin anew after that, as in a second run.
        project: Whether the signs are those of a learned projection N -> d, 8 bits per entry, that begins at the
            principal directions of the old class vectors.
        stored: Whether the signs are digits of levels in a stored projection, as `convert` makes them; they are held.
        rank: Rank of a learned correction beside the codes, float16.
        layer_decay: Factor on each layer's rate.
        sgd: SGD with momentum instead of AdamW; the latent weights' gradient has one size.
    """

    signs: int = 64
    gains: bool = False
    bias: bool = False
    learn: float = 0.0
    latent_rate: float = 1.0
    begin: str = "old"
    soft: float = 0.0
    distill: float = 0.0
    fade: float | None = None
    head_rate: float = 10.0
    smoothing: float = 0.0
    margin: float = 0.0
    batch_statistics: bool = False
    ema: float = 0.0
    alpha: float = 1.0
    rematch: tuple[float, ...] = ()
    budget: float = 1.0
    scratch: bool = False
    warmup: float = 0.0
    restart: bool = False
    project: bool = False
    stored: bool = False
    rank: int = 0
    layer_decay: float | None = None
    sgd: bool = False

    @property
    def name(self) -> str:
        kind = {0: "learned classifier", -1: "Hadamard codes"}.get(self.signs, f"{self.signs} signs")
        parts = [("from scratch: " if self.scratch else "") + kind]
        texts = {
            "gains": "lengths",
            "bias": "biases",
            "learn": "learned" if self.learn == 1 else f"learned for {self.learn:.0%} of the steps",
            "latent_rate": f"sign rate {self.latent_rate:g}",
            "begin": f"{self.begin} start",
            "soft": f"soft for {self.soft:.0%}",
            "distill": f"teacher {self.distill:g}",
            "fade": f"fading over {self.fade or 0:.0%}",
            "head_rate": f"head rate {self.head_rate:g}",
            "smoothing": f"smoothing {self.smoothing:g}",
            "margin": f"margin {self.margin:g}",
            "batch_statistics": "batch statistics",
            "ema": f"EMA {self.ema:g}",
            "alpha": f"alpha x {self.alpha:g}",
            "rematch": f"re-matched {len(self.rematch)} times",
            "budget": f"{self.budget:g} x the steps",
            "warmup": f"learned classifier for {self.warmup:.0%}",
            "restart": "then a second run",
            "project": "learned projection",
            "stored": "as a stored projection",
            "rank": f"correction of rank {self.rank}",
            "layer_decay": f"layer decay {self.layer_decay or 1:g}",
            "sgd": "SGD",
        }
        return ", ".join(
            parts + [text for field, text in texts.items() if getattr(self, field) != getattr(PLAIN, field)]
        )

    def bytes_per_class(self, c: int, n: int) -> float:
        """Count all that is stored: codes, lengths, biases, statistics of the features, and what is learned beside."""
        if self.signs == 0:
            return 4.0 * (n + 1)
        codes = math.ceil(self.signs / 8) + self.gains
        if self.signs < 0:
            codes = 0 if self.scratch and not self.rematch else 4  # codes in order are not stored
        of_features = 4 * n / c * (2 if self.signs < 0 else 1)
        of_features += (n + 4) * self.signs / c if self.project else 0
        return codes + 4 * (self.bias or self.signs < 0) + of_features + 2 * self.rank * (c + n) / c


PLAIN = Trial()
LEARNED = Trial(learn=1.0, latent_rate=5, begin="flat", margin=0.1)
SCRATCH = Trial(scratch=True, warmup=0.2, learn=1.0, latent_rate=5)
ONE_RUN = replace(SCRATCH, begin="flat", latent_rate=10, margin=0.1)
"""What `fixify train` does with `head: binary`."""
TWO_RUNS = replace(ONE_RUN, restart=True)
EARLY = (0.1, 0.2, 0.3, 0.4)
TRIALS = {
    trial.name: trial
    for trial in (
        PLAIN,
        Trial(gains=True, bias=True),
        Trial(margin=0.1),
        Trial(learn=0.7),
        Trial(learn=1.0),
        Trial(learn=0.7, latent_rate=0.3),
        Trial(learn=0.7, latent_rate=3),
        Trial(learn=0.7, bias=True, gains=True),
        Trial(learn=0.7, distill=0.5, fade=0.5),
        Trial(learn=0.7, distill=0.9, fade=0.8),
        Trial(distill=0.9, fade=0.8),
        Trial(learn=0.7, ema=0.98),
        Trial(learn=0.7, batch_statistics=True),
        Trial(learn=0.7, head_rate=50),
        Trial(learn=0.7, smoothing=0.1),
        Trial(learn=0.7, alpha=2),
        Trial(learn=0.7, rank=2),
        Trial(learn=0.7, margin=0.1),
        Trial(learn=1.0, margin=0.1),
        Trial(learn=1.0, margin=0.25),
        Trial(learn=1.0, margin=0.1, begin="flat"),
        Trial(learn=1.0, margin=0.1, begin="random"),
        Trial(learn=1.0, margin=0.1, begin="flat", soft=0.2),
        Trial(learn=1.0, latent_rate=5, begin="flat"),
        LEARNED,
        replace(LEARNED, latent_rate=15),
        replace(LEARNED, gains=True, bias=True),
        replace(LEARNED, distill=0.5, fade=0.5),
        replace(LEARNED, layer_decay=0.7),
        replace(LEARNED, budget=3),
        replace(LEARNED, sgd=True),
        replace(LEARNED, signs=56),
        replace(LEARNED, signs=120),
        Trial(rematch=EARLY),
        Trial(stored=True, gains=True, bias=True),
        Trial(signs=128, stored=True, gains=True, bias=True),
        Trial(signs=32, project=True),
        replace(LEARNED, signs=32, project=True),
        replace(LEARNED, signs=40, project=True),
        Trial(begin="tree"),
        replace(LEARNED, begin="tree"),
        Trial(signs=-1, head_rate=30),
        Trial(signs=-1, head_rate=30, rematch=EARLY),
        Trial(signs=0, budget=3),
        Trial(scratch=True, signs=0),
        Trial(scratch=True, signs=-1),
        Trial(scratch=True, signs=-1, rematch=EARLY),
        Trial(scratch=True, rematch=EARLY),
        Trial(scratch=True, signs=256, warmup=0.1),
        Trial(scratch=True, learn=1.0),
        Trial(scratch=True, learn=1.0, margin=0.1),
        Trial(scratch=True, learn=1.0, soft=0.3),
        Trial(scratch=True, learn=1.0, soft=0.3, margin=0.1),
        Trial(scratch=True, learn=1.0, warmup=0.2),
        SCRATCH,
        ONE_RUN,
        replace(ONE_RUN, signs=56),
        replace(ONE_RUN, signs=120),
        replace(ONE_RUN, margin=0.0),
        replace(ONE_RUN, latent_rate=5, margin=0.0),
        replace(ONE_RUN, signs=56, gains=True),
        replace(ONE_RUN, begin="old"),
        replace(ONE_RUN, begin="old", latent_rate=5),
        replace(ONE_RUN, begin="old", latent_rate=5, signs=56, gains=True),
        replace(SCRATCH, begin="flat", restart=True),
        TWO_RUNS,
        replace(TWO_RUNS, signs=120),
        replace(SCRATCH, signs=24),
        replace(SCRATCH, signs=120),
    )
}


class SignHead(nn.Module):
    """A classifier of signs whose signs can be learned: `logits = alpha * gain * (B^T normalize(x - mean)) @ signs`."""

    def __init__(self, trial: Trial, old: Old) -> None:
        super().__init__()
        c, n = old.weight.shape
        spec = HeadSpec(
            "binary", n, c, bits_per_class=trial.signs, gains=trial.gains, bias=trial.bias, standardize="center"
        )
        self.fixed = replacement(spec, old.weight, old.bias, features=old.features).head
        with torch.no_grad():
            self.fixed.scale.mul_(trial.alpha)
        directions = torch.from_numpy(BINARY.rotation(self.fixed.spec).basis())
        self.register_buffer("directions", directions, persistent=False)
        codes = self.fixed.codebook() / (1.0 if self.fixed.row_scales is None else self.fixed.row_scales[:, None])
        signs = (codes @ directions).sign()
        latent = ((old.weight - old.weight.mean(dim=0)) @ directions).abs()
        latent = signs * latent / latent.mean(dim=1, keepdim=True)
        self.projection = None
        if trial.project:
            projection, wanted = principal_directions(old, trial.signs)
            self.projection, latent = nn.Parameter(projection), wanted / wanted.abs().mean(dim=1, keepdim=True)
        if trial.begin == "tree":
            latent = halving_signs(old.weight - old.weight.mean(dim=0), trial.signs)
        if trial.begin == "flat":
            latent = latent.sign()
        if trial.begin == "random":
            generator = torch.Generator().manual_seed(7)
            latent = latent.sign() * torch.randn(latent.shape, generator=generator).abs() / 0.8
        self.latent = nn.Parameter(latent, requires_grad=trial.learn > 0)
        self.batch_statistics = trial.batch_statistics
        self.up = nn.Parameter(torch.zeros(c, trial.rank)) if trial.rank else None
        self.down = nn.Parameter(torch.randn(trial.rank, n) / math.sqrt(n)) if trial.rank else None
        self.soft = False

    def codes(self) -> Tensor:
        if self.soft and self.training:
            return self.latent
        return signs_of(self.latent) if self.latent.requires_grad else torch.where(self.latent < 0, -1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        head = self.fixed
        if self.batch_statistics and self.training:
            head.scaled_features(x.detach())  # updates the running mean
            z = F.normalize(x - x.mean(dim=0), dim=-1) * head.scale
        else:
            z = head.scaled_features(x) / head.product.prescale
        directions = self.directions if self.projection is None else rounded_projection(self.projection)
        logits = (z @ directions) @ (self.codes().T / math.sqrt(self.directions.shape[1]))
        if head.gains is not None:
            logits = logits * head.row_scales
        if self.up is not None:
            logits = logits + (z @ self.down.T) @ self.up.T
        return logits if head.bias is None else logits + head.bias


@torch.no_grad()
def principal_directions(old: Old, d: int) -> tuple[Tensor, Tensor]:
    """Find d directions in which class vectors vary most under the features' moment, rotated so that all vary equally.

    Returns:
        The directions, [N, d], columns of norm 1, and the coordinates of the class vectors, [C, d].
    """
    rows = CenteredRows(old.weight, old.weight.mean(dim=0))
    moment = level_moment(feature_statistics(old.features, standardize="center").covariance, old.weight)
    found = Principal.of(rows, moment)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(8)).double())
    directions, axes = (part[:, :d] @ rotation for part in (found.directions, found.axes))
    return F.normalize(directions, dim=0).float(), (rows[:].double() @ axes).float()


def rounded_projection(projection: Tensor) -> Tensor:
    """Round to 8 bits per entry and one step per column; the gradient passes unchanged."""
    step = projection.detach().abs().amax(dim=0) / 127
    return projection + ((projection / step).round() * step - projection).detach()


def halving_signs(vectors: Tensor, count: int) -> Tensor:
    """Build signs that similar classes share: [C, count].

    Classes are halved along the principal direction of a random half of the coordinates, and the halves again, until
    all classes are told apart; then from the start along other coordinates.
    """
    generator = torch.Generator().manual_seed(9)
    signs = torch.ones(len(vectors), count)
    depth = math.ceil(math.log2(len(vectors)))
    for first in range(0, count, depth):
        some = vectors[:, torch.randperm(vectors.shape[1], generator=generator)[: vectors.shape[1] // 2]]
        groups = [torch.arange(len(vectors))]
        for bit in range(first, min(first + depth, count)):
            halves = []
            for group in groups:
                if len(group) < 2:
                    halves.append(group)
                    continue
                own = some[group] - some[group].mean(dim=0)
                _, _, direction = torch.svd_lowrank(own, q=1, niter=2)
                order = group[(own @ direction[:, 0]).argsort()]
                low, high = order.tensor_split(2)
                signs[low, bit] = -1.0
                halves += [low, high]
            groups = halves
    return signs


@torch.no_grad()
def class_means(model: nn.Module, task: Task, images: int, seed: int) -> Tensor:
    """Compute the mean features of the classes, [C, N], over some training images."""
    generator = torch.Generator().manual_seed(3000 + seed)
    picked = torch.randperm(len(task.train), generator=generator)[:images]
    model.eval()
    features = torch.cat(
        [
            model.forward_head(model.forward_features(to_input(task.train[part])), pre_logits=True)
            for part in picked.split(512)
        ]
    )
    labels = task.train_labels[picked]
    sums = torch.zeros(task.num_classes, features.shape[1]).index_add_(0, labels, features)
    counts = torch.bincount(labels, minlength=task.num_classes).clamp_min(1)[:, None]
    return sums / counts


def trained(model: nn.Module, task: Task, trial: Trial, seed: int, lr: float, teacher: nn.Module | None) -> list[float]:
    """Train, and return top-1 after each of MARKS of the steps."""
    steps = round((task.base_steps * trial.scratch + task.steps) * trial.budget)
    picks = batches(task, seed)
    marks = {max(1, round(mark * steps)) for mark in MARKS[1:]}
    seen: list[float] = []
    average = None
    optimiser: Any = None
    peaks: list[float] = []

    def prepare() -> None:
        nonlocal optimiser, peaks
        options = FinetuneOptions(weight_decay=0.05, head_lr_scale=trial.head_rate, layer_decay=trial.layer_decay)
        groups = parameter_groups(model, options)
        head = model.get_classifier()
        if isinstance(head, SignHead) and head.latent.requires_grad:
            for group in groups:
                group["params"] = [p for p in group["params"] if p is not head.latent]
            groups.append({"params": [head.latent], "weight_decay": 0.0, "lr_scale": trial.latent_rate})
        optimiser = torch.optim.AdamW(groups, lr=lr)
        if trial.sgd:
            optimiser = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
        peaks = [group.get("lr_scale", 1.0) * group["lr"] for group in optimiser.param_groups]

    prepare()
    for step in range(1, steps + 1):
        if trial.scratch and trial.warmup and step == round(trial.warmup * steps) + 1:
            before = optimiser.state
            model.classifier = new_head(trial, old_classifier(model.eval(), task, seed))
            prepare()
            for parameter in model.parameters():
                if parameter in before and not trial.restart:
                    optimiser.state[parameter] = before[parameter]
        head = model.get_classifier()
        if isinstance(head, SignHead) and step > trial.learn * steps and head.latent.requires_grad:
            head.latent.requires_grad_(False)
            head.latent.grad = None
        if isinstance(head, SignHead):
            head.soft = (step - 1) / steps < trial.soft
        if step - 1 in {round(share * steps) for share in trial.rematch}:
            rematch_(model, class_means(model, task, 8 * task.num_classes, seed))
        at, of = step, steps
        if trial.restart:
            first = round(trial.warmup * steps)
            at, of = (step, first) if step <= first else (step - first, steps - first)
        set_rates(optimiser, peaks, at, of)
        picked = next(picks)
        model.train()
        images, labels = to_input(task.train[picked]), task.train_labels[picked]
        logits = model(images)
        moved = logits
        if trial.margin and not isinstance(head, nn.Linear):
            alpha = (head.fixed if isinstance(head, SignHead) else head).scale
            if isinstance(head, SignHead) and head.fixed.gains is not None:
                alpha = alpha * head.fixed.row_scales[labels][:, None]
            moved = logits - alpha * trial.margin * F.one_hot(labels, task.num_classes)
        loss = F.cross_entropy(moved, labels, label_smoothing=trial.smoothing)
        weight = trial.distill
        if trial.fade is not None:
            weight *= max(0.0, 1 - (step - 1) / (trial.fade * steps))
        if teacher is not None and weight > 0:
            loss = (1 - weight) * loss + weight * distillation(logits, teacher, images)
        optimiser.zero_grad()
        loss.backward()
        if trial.sgd and isinstance(head, SignHead) and head.latent.requires_grad:
            gradient = head.latent.grad
            gradient.mul_(0.1 / gradient.square().mean().sqrt().clamp_min(1e-12))
        optimiser.step()
        if trial.ema:
            if average is None:
                average = deepcopy(model)
            decay = min(trial.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                    if mean.is_floating_point():
                        mean.lerp_(new, 1 - decay)
                    else:
                        mean.copy_(new)
        if step in marks:
            seen.append(top1(average or model, task.val, task.val_labels))
    if average is not None:
        model.load_state_dict(average.state_dict())
    return seen


@torch.no_grad()
def rematch_(model: nn.Module, means: Tensor) -> None:
    """Choose the codes again for the classes' mean features; scale and bias stay."""
    head = model.get_classifier()
    if isinstance(head, SignHead):
        centered = means - means.mean(dim=0)
        projected = centered @ head.directions
        head.latent.copy_(projected / projected.abs().mean(dim=1, keepdim=True))
        return
    c, n = means.shape
    spec = replace(head.spec, digest=None, matched=True, blocks=default_blocks(n, c))
    std = head.std if head.std is not None else torch.ones(means.shape[1])
    new = replacement(spec, means / std, None, scale=float(head.scale)).head
    new.scale, new.bias = head.scale, head.bias  # those that the optimiser knows
    for name in ("center", "spread", "num_batches_tracked"):
        getattr(new, name).copy_(getattr(head, name))
    model.classifier = new


def new_head(trial: Trial, old: Old) -> nn.Module:
    if trial.signs < 0:
        return matched(old, calibrated=True)
    if trial.stored:
        n, c = old.weight.shape[1], len(old.weight)
        options = BINARY.default_options(n, has_features=True, bits_per_class=trial.signs)
        spec = projected_spec(HeadSpec("binary", n, c, **options), old.weight, old.features)
        return replacement(spec, old.weight, old.bias, features=old.features).head
    return SignHead(trial, old)


def random_head(trial: Trial, c: int, seed: int) -> nn.Module:
    """Make the head of a network with random weights."""
    if trial.signs < 0:
        return FixedClassifier(HeadSpec("hadamard", WIDTH, c, standardize=True))
    generator = torch.Generator().manual_seed(4000 + seed)
    weight = torch.randn(c, WIDTH, generator=generator)
    head = SignHead(trial, Old(weight, torch.zeros(c), torch.randn(2048, WIDTH, generator=generator)))
    head.fixed.reset_parameters()
    return head


class Bench:
    """Runs trials, and adds each result to a file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.task = read_task(arguments.data, arguments.cache)
        self.known = read(arguments.out) if arguments.out.exists() else []

    def base(self, seed: int) -> nn.Module:
        """Return the network that fine-tuning starts from."""
        model = new_model(self.task, WIDTH, seed)
        path = self.arguments.cache / f"{self.arguments.data}-{WIDTH}-{seed}.pth"
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()

    def run(self, trial: Trial, seed: int, lr: float) -> None:
        data, task = self.arguments.data, self.task
        if any((e["data"], e["row"], e["seed"], e["lr"]) == (data, trial.name, seed, lr) for e in self.known):
            return
        model = new_model(task, WIDTH, seed) if trial.scratch else self.base(seed)
        if trial.scratch and not trial.warmup and trial.signs:
            model.classifier = random_head(trial, task.num_classes, seed)
        elif not trial.scratch and trial.signs:
            model.classifier = new_head(trial, old_classifier(model, task, seed))
        values = [] if trial.scratch else [top1(model, task.val, task.val_labels)]
        values += trained(model, task, trial, seed, lr, self.base(seed) if trial.distill else None)
        entry = {"data": data, "row": trial.name, "seed": seed, "lr": lr}
        entry |= {"bytes": trial.bytes_per_class(task.num_classes, WIDTH), "top1": values}
        entry |= {"tuned_on": top1(model, task.tune, task.tune_labels)}
        self.known.append(entry)
        with self.arguments.out.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)


def print_table(path: Path) -> None:
    """Print each trial at the rate that was best on the images to tune on: the mean over seeds, lowest and highest."""
    grouped: dict[tuple[str, str], list[dict]] = {}
    for entry in read(path):
        grouped.setdefault((entry["data"], entry["row"]), []).append(entry)
    print("| data | trial | bytes per class | top-1 | learning rate | seeds |\n" + "|---" * 6 + "|")
    for (data, row), entries in grouped.items():
        first = [each for each in entries if each["seed"] == entries[0]["seed"]]
        lr = max(first, key=lambda each: each["tuned_on"])["lr"]
        values = [each["top1"][-1] for each in entries if each["lr"] == lr]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        mean = f"{statistics.mean(values):.1f}{spread}"
        print(f"| {data} | {row} | {entries[0]['bytes']:.1f} | {mean} | {lr} | {len(values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="kanji", choices=("kanji", "kanji-512"), help="kanji-512 is from scratch")
    parser.add_argument("--trials", nargs="+", default=[PLAIN.name, LEARNED.name], choices=TRIALS, metavar="NAME")
    parser.add_argument("--lr", nargs="+", type=float, help=f"default: {RATE}, from scratch {BASE_RATE}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark"), help="folder of images and networks")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/many.jsonl"))
    parser.add_argument("--list", action="store_true", help="name the trials")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of these results")
    arguments = parser.parse_args()
    if arguments.list or arguments.table:
        print("\n".join(TRIALS)) if arguments.list else print_table(arguments.table)
        return
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    for trial in (TRIALS[name] for name in arguments.trials):
        for seed in arguments.seeds:
            for lr in arguments.lr or [BASE_RATE if trial.scratch else RATE]:
                bench.run(trial, seed, lr)


if __name__ == "__main__":
    main()
