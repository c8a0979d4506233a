"""What the training of a language model tells its listener."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fixify.data.seeding import derive_seed, seeded_torch
from fixify.errors import TrainingError
from fixify.language.network import LanguageModel, Output, State, WordClassifier
from fixify.language.options import LanguageOptions
from fixify.metrics import eval_mode
from fixify.training.interrupt import Stopped, StopRequest


@dataclass(frozen=True)
class LanguageRunStarted:
    """Before anything else.

    Attributes:
        text: What the text is, for a person.
        device: Where it runs.
        learned: Parameters that learn.
        epochs, steps: Of the whole run, and of one epoch (an estimate where lengths vary).
        first_epoch: Where it begins: above 0 when a run is resumed.
        folder: Of the run.
    """

    text: str
    device: str
    learned: int
    epochs: int
    steps: int
    first_epoch: int
    folder: Path


@dataclass(frozen=True)
class LanguageStep:
    """After an update. The loss is the mean of the epoch so far, nats a word."""

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    words_per_second: float
    scale: float | None


@dataclass(frozen=True)
class LanguageRecord:
    """One validation, after an epoch, as it goes into metrics.jsonl. Epochs count from 0.

    Attributes:
        epoch: Which epoch.
        step: Updates since the start of the run.
        lr: Learning rate of the last update.
        train_loss: Mean over the epoch, with dropout, while the weights moved; nats a word.
        val_loss: Over the whole validation text.
        averaged: Whether `val_loss` is that of the mean of the weights ("asgd").
        scale: The fixed head's alpha; None with learned words.
        words_per_second: Training throughput.
        seconds: Training of this epoch.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    val_loss: float
    averaged: bool
    scale: float | None
    words_per_second: float
    seconds: float

    @property
    def val_perplexity(self) -> float:
        """e to the validation loss."""
        return math.exp(self.val_loss)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "val_perplexity": self.val_perplexity}


@dataclass(frozen=True)
class LanguageEpochEnded:
    record: LanguageRecord
    is_best: bool


LanguageEvent = LanguageRunStarted | LanguageStep | LanguageEpochEnded
LanguageListener = Callable[[LanguageEvent], object]


# A text as batches, and how well a model predicts it.


_SHORTEST = 5
_HALF = 0.05
_DEVIATION = 5.0
_EVALUATED_AT_ONCE = 1 << 22
"""Logits of a step of evaluation; 16 MB as float32."""


@dataclass(frozen=True)
class Prediction:
    """How well a text is predicted.

    Attributes:
        loss: Mean negative log likelihood of a word, nats.
        words: Words that were predicted: all of them.
    """

    loss: float
    words: int

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)


def side_by_side(text: Tensor, batch_size: int) -> Tensor:
    """A text [n] as `batch_size` parts of equal length, [n // batch_size, batch_size]; the rest is left out."""
    length = len(text) // batch_size
    return text[: length * batch_size].view(batch_size, length).t().contiguous()


def steps_of(length: int, seq_len: int, *, vary: bool, seed: int) -> list[tuple[int, int]]:
    """Where each update of an epoch begins, and of how many words: of parts of `length` words, all but the last word.

    Args:
        length: Words of each part.
        seq_len: Words of an update.
        vary: Draw them, as Merity et al. (2017, section 4.1) do: around `seq_len`, or with 5 % around its half, with a
            deviation of 5.
        seed: Of what is drawn.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    found, begin = [], 0
    while begin < length - 1:
        size = seq_len
        if vary:
            around = seq_len / 2 if rng.random() < _HALF else seq_len
            size = max(_SHORTEST, int(rng.normal(around, _DEVIATION)))
        size = min(size, length - 1 - begin)
        found.append((begin, size))
        begin += size
    return found


@torch.inference_mode()
def predict(model: LanguageModel, text: Tensor, first: int, device: torch.device) -> Prediction:
    """How well a model predicts a text: every word of it, each from all words before it.

    Args:
        model: On the device.
        text: Word numbers [n], on the CPU.
        first: The word that is taken to stand before the text.
        device: Where the model is.
    """
    before = torch.cat([text.new_tensor([first]), text[:-1]])
    loss = 0.0
    state = model.start(1)
    with eval_mode(model):
        for words, following in _parts(before, text, max(1, _EVALUATED_AT_ONCE // model.num_words)):
            logits, state = model(words.to(device)[:, None], state)
            loss += float(F.cross_entropy(logits[:, 0].float(), following.to(device), reduction="sum"))
    return Prediction(loss / len(text), len(text))


def _parts(before: Tensor, text: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(before.split(size), text.split(size), strict=True)


# Training a language model: truncated backpropagation through time, and the state from which it goes on exactly.


_LENGTHS, _DROPOUT = 2, 3
"""Random streams beside that of `fixify.language.model`."""


@dataclass
class Position:
    """How far a run is.

    Attributes:
        epoch: Epoch being trained, from 0; equal to the number of epochs at the end.
        step: Updates of it that are done.
        updates: Updates since the start.
        loss_sum, words: Sums over this epoch so far.
        seconds: Training time in this epoch so far.
        lr: Learning rate of the last update.
        history: One record an epoch.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    words: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    history: list[LanguageRecord] = field(default_factory=list)

    def best(self) -> LanguageRecord | None:
        """The epoch with the lowest validation loss, of equal ones the first."""
        return min(self.history, key=lambda record: record.val_loss, default=None)

    def next_epoch(self) -> None:
        """Close the epoch."""
        self.epoch += 1
        self.step = self.words = 0
        self.loss_sum = self.seconds = 0.0


class Trainer:
    """One model in training.

    Args:
        model: On the CPU; moved to the options' device.
        text: Training text, word numbers [n].
        options: How.
        on_event: Told of every update.
    """

    def __init__(
        self, model: LanguageModel, text: Tensor, options: LanguageOptions, on_event: LanguageListener
    ) -> None:
        self.device = options.resolved_device()
        self.model = model.to(self.device)
        self.options, self.on_event = options, on_event
        self.text = side_by_side(text, options.batch_size).to(self.device)
        if len(self.text) < 2:
            raise TrainingError(
                f"{len(text):,} words of training text are too few for {options.batch_size} parts side by side.",
                hint="Give more text, or a smaller batch_size.",
            )
        self.optimiser = _optimiser(self.model, options)
        self.peaks = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.average: AveragedModel | None = None
        self.position = Position()
        self.hidden: State = []

    @property
    def evaluated(self) -> LanguageModel:
        """What is measured and saved: the mean of the weights if there is one, else the model."""
        return self.model if self.average is None else cast(LanguageModel, self.average.module)

    def steps(self) -> list[tuple[int, int]]:
        """Of the current epoch; see `fixify.language.loop.steps_of`."""
        options = self.options
        seed = derive_seed(options.seed, self.position.epoch, _LENGTHS)
        return steps_of(len(self.text), options.seq_len, vary=options.vary_seq_len, seed=seed)

    def epoch(self, stop: StopRequest, save: Any) -> None:
        """Train to the end of the current epoch.

        Args:
            stop: Asked before every update.
            save: Called after every update, to store the state if it is time to.

        Raises:
            Stopped: somebody asked.
            TrainingError: the loss is not finite.
        """
        position, steps = self.position, self.steps()
        if position.step == 0:
            self.hidden = self.model.start(self.options.batch_size)
        self.model.train()
        for begin, size in steps[position.step :]:
            if stop.requested():
                raise Stopped
            started = time.monotonic()
            loss = self._update(begin, size, len(steps))
            position.step += 1
            position.updates += 1
            position.loss_sum += loss * size
            position.words += size
            position.seconds += time.monotonic() - started
            self._tell(len(steps))
            save()

    def start_averaging(self) -> None:
        """Average the weights from here on."""
        self.average = AveragedModel(self.model)

    def record(self, val_loss: float) -> LanguageRecord:
        """Of the epoch that is done."""
        at = self.position
        return LanguageRecord(
            epoch=at.epoch,
            step=at.updates,
            lr=at.lr,
            train_loss=at.loss_sum / at.words,
            val_loss=val_loss,
            averaged=self.average is not None,
            scale=self._scale(),
            words_per_second=at.words * self.options.batch_size / max(at.seconds, 1e-9),
            seconds=at.seconds,
        )

    def state(self) -> dict[str, Any]:
        """Everything from which the run goes on exactly."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "hidden": [list(pair) for pair in self.hidden],
            "position": asdict(self.position),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave; raises RuntimeError, ValueError, KeyError or TypeError if it does not fit."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if state["average"] is not None:
            self.start_averaging()
            self.average.load_state_dict(state["average"])  # type: ignore[union-attr]
        self.hidden = [(hidden, cell) for hidden, cell in state["hidden"]]
        self.position = Position(**state["position"])
        self.position.history = [LanguageRecord(**record) for record in state["position"]["history"]]

    def _update(self, begin: int, size: int, steps: int) -> float:
        options, position = self.options, self.position
        factor = self._rate(position.epoch + position.step / steps)
        if options.vary_seq_len:
            factor *= size / options.seq_len
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        position.lr = options.lr * factor
        words, following = self.text[begin : begin + size], self.text[begin + 1 : begin + 1 + size]
        with seeded_torch(derive_seed(options.seed, position.updates, _DROPOUT), self.device):
            output = self.model.features(words, self.hidden)
            logits = self.model.classifier(output.features)
            loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
            total = loss + self._activation_loss(output)
        self.optimiser.zero_grad()
        total.backward()
        if options.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_grad)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss is {value} in epoch {position.epoch + 1} after {position.step} updates of it.",
                hint=f"Try a lower rate: --set language.lr={options.lr / 3:.1g}",
            )
        self.optimiser.step()
        self.hidden = [(hidden.detach(), cell.detach()) for hidden, cell in output.state]
        if self.average is not None:
            self.average.update_parameters(self.model)
        return value

    def _activation_loss(self, output: Output) -> Tensor | float:
        """Merity et al. (2017), section 4.6: the output is to be small, and to change little."""
        options = self.options
        loss: Tensor | float = 0.0
        if options.activation_decay:
            loss = loss + options.activation_decay * output.features.pow(2).mean()
        if options.activation_change and len(output.raw) > 1:
            loss = loss + options.activation_change * output.raw.diff(dim=0).pow(2).mean()
        return loss

    def _rate(self, epochs: float) -> float:
        """Factor of the peak rate, so many epochs after the start."""
        options = self.options
        if epochs < options.warmup_epochs:
            return max(epochs, 1e-3 * options.warmup_epochs) / options.warmup_epochs
        if options.sched == "constant":
            return 1.0
        done = (epochs - options.warmup_epochs) / (options.epochs - options.warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _scale(self) -> float | None:
        classifier = self.model.classifier
        return float(classifier.scale.detach()) if isinstance(classifier, WordClassifier) else None

    def _tell(self, steps: int) -> None:
        at = self.position
        speed = at.words * self.options.batch_size / max(at.seconds, 1e-9)
        self.on_event(LanguageStep(at.epoch, at.step, steps, at.loss_sum / at.words, at.lr, speed, self._scale()))


def _optimiser(model: LanguageModel, options: LanguageOptions) -> torch.optim.Optimizer:
    head = model.classifier
    quick = [head.scale, head.bias] if isinstance(head, WordClassifier) else []
    known = {id(parameter) for parameter in quick}
    groups: list[dict[str, Any]] = [
        {"params": [each for each in model.parameters() if each.requires_grad and id(each) not in known]},
        {"params": [each for each in quick if each.requires_grad], "lr": options.lr * options.head_lr_scale},
    ]
    groups = [group for group in groups if group["params"]]
    kinds = {"asgd": torch.optim.SGD, "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[options.opt](groups, lr=options.lr, weight_decay=options.weight_decay)
