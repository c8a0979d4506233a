"""Find the learning rate by a short test on the user's images (`lr="auto"`).

Each of a few rates trains a copy of the model for a few steps, all on the same batches. The rate whose copy has the
lowest loss on images that no copy was trained on is taken. The model itself, its optimiser and all random numbers of
the run stay as they are, so a run with this rate given is the same run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from fixify.data import ImageLoader, OpenedData, Subset, make_loader
from fixify.data.seeding import Stream, derive_seed, permutation, seeded_globals
from fixify.errors import DataError, UsageError
from fixify.metrics import autocast, eval_mode
from fixify.training import distributed
from fixify.training.engine import Engine, make_engine
from fixify.training.events import Listener, RateChosen
from fixify.training.facts import OpenedInputs
from fixify.training.last_block import calibrate_heads_
from fixify.training.loop import split_outputs
from fixify.training.losses import training_loss
from fixify.training.optimisers import clip_gradients
from fixify.training.options import FinetuneOptions
from fixify.training.teacher import Teacher

FACTORS = (0.1, 0.3, 1.0, 3.0)
"""The rates that are tried, as factors of the default."""
STEPS, WARMUP_STEPS = 20, 5
"""Steps of each trial, and how many of them the rate rises linearly."""
HELD_OUT_BATCHES = 4
"""Batches of training images that are held out, at most a fifth of all images."""


def find_rate(model: nn.Module, opened: OpenedInputs, options: FinetuneOptions, on_event: Listener) -> float:
    """Choose the learning rate among a few around the default; tell which losses decided.

    Args:
        model: What will be trained; it stays as it is.
        opened: The images, and the teacher.
        options: Options of the run; their `lr` is the default.
        on_event: Called with the choice.

    Returns:
        The rate with the lowest loss; the lowest rate if all of them are worse than no training.

    Raises:
        UsageError: several processes train, or there are so many classes that the loss is computed without logits.
        DataError: there are too few images, or too many cannot be read.
    """
    if distributed.world_size() > 1:
        raise UsageError(
            "lr auto is for one process; several would have to agree on a rate.",
            hint="Find it with one process first, then give the number: --lr RATE",
        )
    count = len(opened.train)
    held_out = min(HELD_OUT_BATCHES * options.batch_size, count // 5)
    if held_out == 0:
        raise DataError(
            f"lr auto needs at least 5 training images; there are {count}.", hint="Give the rate: --lr RATE"
        )
    order = permutation(options.seed, 0, Stream.RATE_SEARCH, count=count).tolist()
    parts = _part(opened.train, order[held_out:]), _part(opened.train, order[:held_out])
    base = options.peak_rate
    rates = [float(f"{factor * base:.3g}") for factor in FACTORS]
    before = math.nan
    losses = []
    for rate in rates:
        with _trial(model, opened, options.replace(lr=rate), parts) as trial:
            before = trial.loss() if math.isnan(before) else before
            trial.train(rate)
            losses.append(trial.loss())
    best = min(range(len(rates)), key=lambda place: (not math.isfinite(losses[place]), losses[place]))
    chosen = rates[best] if losses[best] < before else rates[0]
    on_event(RateChosen(chosen, before, tuple(zip(rates, losses, strict=True))))
    return chosen


def _part(data: OpenedData, indices: list[int]) -> OpenedData:
    return replace(data, images=Subset(data.images, indices))


@contextmanager
def _trial(
    model: nn.Module, opened: OpenedInputs, options: FinetuneOptions, parts: tuple[OpenedData, OpenedData]
) -> Iterator[_Trial]:
    """Set up one trial with a copy of the model; close its loaders and restore random numbers after it."""
    options = options.replace(workers=0, ema_decay=None, grad_checkpointing=False, compile=False, grad_accum=1)
    device = options.resolved_device()
    with seeded_globals(derive_seed(options.seed, 0, Stream.RATE_SEARCH), device):
        engine = make_engine(copy.deepcopy(model), replace(opened, train=parts[0]), options)
        held_out = make_loader(
            parts[1], opened.preprocessing, training=False, batch_size=options.batch_size, device=device,
            unreadable=engine.loader.unreadable,
        )  # fmt: skip
        try:
            yield _Trial(engine, opened, held_out)
        finally:
            engine.loader.close()
            held_out.close()


class _Trial:
    """A copy of the model that is trained for a few steps."""

    def __init__(self, engine: Engine, opened: OpenedInputs, held_out: ImageLoader) -> None:
        if engine.loss_plan.blocked:
            raise UsageError(
                "lr auto needs the logits of a batch; with so many classes the loss is computed without them.",
                hint="Give the rate: --lr RATE",
            )
        self.engine, self.held_out, options = engine, held_out, engine.options
        if opened.teacher is not None:
            engine.teacher = Teacher(
                opened.teacher, opened.preprocessing, device=engine.device, amp=options.amp,
                channels_last=options.channels_last,
            )  # fmt: skip
        calibrate_heads_(engine.model, held_out, device=engine.device)

    def train(self, rate: float) -> None:
        """Train for `STEPS` steps, or an epoch if that is less."""
        engine, options = self.engine, self.engine.options
        engine.frozen.train(engine.model)
        engine.loader.set_epoch(0)
        for step, (images, targets) in enumerate(engine.loader):
            if step == STEPS:
                break
            for group in engine.optimiser.param_groups:
                group["lr"] = rate * group["lr_scale"] * min(1.0, (step + 1) / WARMUP_STEPS)
            engine.optimiser.zero_grad(set_to_none=True)
            engine.scaler.scale(self._loss(images, targets)).backward()
            if options.clip_grad is not None:
                engine.scaler.unscale_(engine.optimiser)
                clip_gradients(engine.model, options)
            engine.scaler.step(engine.optimiser)
            engine.scaler.update()

    def loss(self) -> float:
        """Compute the mean training loss on the images that are held out."""
        total, count = 0.0, 0
        with eval_mode(self.engine.model), torch.no_grad():
            for images, targets in self.held_out:
                total += float(self._loss(images, targets)) * len(images)
                count += len(images)
        if count == 0:
            raise DataError("None of the images that lr auto looks at can be read.", hint="Give the rate: --lr RATE")
        return total / count

    def _loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        engine, options = self.engine, self.engine.options
        images, targets = images.to(engine.device), targets.to(engine.device)
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        teacher_logits = None if engine.teacher is None else engine.teacher(images)
        if teacher_logits is not None and options.unlabelled:
            targets = teacher_logits.argmax(dim=-1)
        with autocast(engine.device, options.amp):
            logits, _ = split_outputs(engine.model(images))
            return training_loss(logits, targets, teacher_logits, options, engine.margin)
