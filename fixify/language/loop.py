"""Train and evaluate a language model: events, batches of a text, truncated backpropagation through time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fixify._values import Count, counted
from fixify.data.seeding import derive_seed, seeded_torch
from fixify.errors import TrainingError
from fixify.language.network import LanguageModel, Output, State, WordClassifier
from fixify.language.options import LanguageOptions
from fixify.metrics import eval_mode
from fixify.training.events import Warned
from fixify.training.interrupt import StopRequest
from fixify.training.run_records import from_plain

# The events that a run sends to its listener.


@dataclass(frozen=True)
class LanguageRunStarted:
    """The run starts or resumes; the first event except for warnings.

    Attributes:
        text: Description of the text, for a person.
        device: Where it runs.
        learned: Parameters that learn.
        epochs: Epochs of the whole run.
        steps: Updates per epoch; an estimate if sequence lengths vary.
        first_epoch: Epoch that it starts with; above 0 when it resumes.
        folder: Folder of the run.
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
    """One update was made.

    Attributes:
        epoch: Which epoch, from 0.
        step: Updates of it that are done.
        steps: Updates per epoch.
        loss: Mean loss of the epoch so far, nats per word.
        lr: Learning rate of the update.
        words_per_second: Training throughput.
        scale: The fixed head's scale alpha; None with learned words.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    words_per_second: float
    scale: float | None


@dataclass(frozen=True)
class LanguageRecord:
    """The record of one epoch and its validation; one line of metrics.jsonl. Epochs count from 0.

    Attributes:
        epoch: Which epoch.
        step: Updates since the start of the run.
        lr: Learning rate of the last update.
        train_loss: Mean training loss over the epoch, with dropout; nats per word.
        val_loss: Loss on the whole validation text, nats per word.
        averaged: Whether `val_loss` is that of the averaged weights ("asgd").
        scale: The fixed head's scale alpha; None with learned words.
        words_per_second: Training throughput.
        seconds: Training time of this epoch.
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
        """The exponential of the validation loss."""
        return math.exp(self.val_loss)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a line of metrics.jsonl holds it."""
        return {**asdict(self), "val_perplexity": self.val_perplexity}


@dataclass(frozen=True)
class LanguageEpochEnded:
    """The validation at the end of an epoch."""

    record: LanguageRecord
    is_best: bool


LanguageEvent = Warned | LanguageRunStarted | LanguageStep | LanguageEpochEnded
LanguageListener = Callable[[LanguageEvent], object]


# The batches of a text, and how well a model predicts it.

_SHORTEST = 5
_HALF_PROBABILITY = 0.05
_STD = 5.0
_MAX_LOGITS = 1 << 22
"""Largest number of logits per evaluation step; 16 MB as float32."""


@dataclass(frozen=True)
class Prediction:
    """How well a model predicts a text.

    Attributes:
        loss: Mean negative log likelihood, nats per word.
        words: Number of words; all of them are predicted.
    """

    loss: float
    words: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss.

        >>> Prediction(loss=0.0, words=3).perplexity
        1.0
        """
        return math.exp(self.loss)


def side_by_side(text: Tensor, batch_size: int) -> Tensor:
    """Cut a text [n] into `batch_size` parts of equal length, [n // batch_size, batch_size]; drop the rest.

    >>> side_by_side(torch.arange(7), 3).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    length = len(text) // batch_size
    return text[: length * batch_size].view(batch_size, length).t().contiguous()


def sequence_bounds(length: int, seq_len: int, *, vary: bool, seed: int) -> list[tuple[int, int]]:
    """List the first word and the number of words of each update of an epoch.

    Args:
        length: Words per part; all but the last one are inputs.
        seq_len: Words per update.
        vary: Draw the number of words as Merity et al. (2017, section 4.1) do: around `seq_len`, or with probability
            5 % around its half, with a std of 5.
        seed: Seed of what is drawn.

    >>> sequence_bounds(8, 3, vary=False, seed=0)
    [(0, 3), (3, 3), (6, 1)]
    """
    rng = np.random.Generator(np.random.Philox(seed))
    found, begin = [], 0
    while begin < length - 1:
        size = seq_len
        if vary:
            center = seq_len / 2 if rng.random() < _HALF_PROBABILITY else seq_len
            size = max(_SHORTEST, int(rng.normal(center, _STD)))
        size = min(size, length - 1 - begin)
        found.append((begin, size))
        begin += size
    return found


@torch.inference_mode()
def predict(model: LanguageModel, text: Tensor, first: int, device: torch.device) -> Prediction:
    """Predict every word of a text from all words before it.

    Args:
        model: The model, on the device.
        text: Word numbers [n], on the CPU.
        first: The word that is taken to stand before the text.
        device: Where the model is.
    """
    before = torch.cat([text.new_tensor([first]), text[:-1]])
    loss = 0.0
    state = model.start(1)
    with eval_mode(model):
        for words, following in _chunks(before, text, max(1, _MAX_LOGITS // model.num_words)):
            logits, state = model(words.to(device)[:, None], state)
            loss += float(F.cross_entropy(logits[:, 0].float(), following.to(device), reduction="sum"))
    return Prediction(loss / len(text), len(text))


def _chunks(before: Tensor, text: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(before.split(size), text.split(size), strict=True)


# Training.

_LENGTHS, _DROPOUT = 2, 3
"""Random streams; `fixify.language.model` has another one."""


@dataclass
class Position:
    """How far a run is.

    Attributes:
        epoch: Epoch being trained, from 0; the number of epochs at the end.
        step: Updates of it that are done.
        updates: Updates since the start of the run.
        loss_sum, words: Sums over this epoch so far.
        seconds: Training time in this epoch so far.
        lr: Learning rate of the last update.
        history: One record per epoch.
    """

    epoch: Count = 0
    step: Count = 0
    updates: Count = 0
    loss_sum: float = 0.0
    words: Count = 0
    seconds: float = 0.0
    lr: float = 0.0
    history: list[LanguageRecord] = field(default_factory=list)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Position:
        """Read what `dataclasses.asdict` made of a position.

        Raises:
            ValueError: a value has another type, is out of range, or is unknown; the message names it.
        """
        position = from_plain(cls, stored, "position")
        if len(position.history) != position.epoch:
            raise ValueError(f"position.history has {len(position.history)} records after {position.epoch} epochs")
        return position

    def best(self) -> LanguageRecord | None:
        """Return the epoch with the lowest validation loss; of equal ones the first."""
        return min(self.history, key=lambda record: record.val_loss, default=None)

    def next_epoch(self) -> None:
        """Go to the next epoch and reset the sums."""
        self.epoch += 1
        self.step = self.words = 0
        self.loss_sum = self.seconds = 0.0


class Trainer:
    """A language model in training, with everything that its state holds.

    Args:
        model: On the CPU; it is moved to the options' device.
        text: Training text, word numbers [n].
        options: Options of the run.
        on_event: Called with every update.

    Raises:
        TrainingError: the text is too short for `options.batch_size`.
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
                f"The training text has {counted(len(text), 'word')}, too few for "
                f"{counted(options.batch_size, 'part')} side by side.",
                hint="Give more text, or a smaller batch_size.",
            )
        self.optimiser = _make_optimiser(self.model, options)
        self.peak_rates = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.average: AveragedModel | None = None
        self.position = Position()
        self.hidden: State = []

    @property
    def evaluated(self) -> LanguageModel:
        """The model that is measured and saved: the average of the weights if there is one, else the trained model."""
        return self.model if self.average is None else cast(LanguageModel, self.average.module)

    def sequences(self) -> list[tuple[int, int]]:
        """Return the `sequence_bounds` of the current epoch."""
        options = self.options
        seed = derive_seed(options.seed, self.position.epoch, _LENGTHS)
        return sequence_bounds(len(self.text), options.seq_len, vary=options.vary_seq_len, seed=seed)

    def train_epoch(self, stop: StopRequest, after_update: Callable[[], object]) -> None:
        """Train to the end of the current epoch.

        Args:
            stop: Checked before every update.
            after_update: Called after every update.

        Raises:
            Stopped: a signal asked to stop.
            TrainingError: the loss is not finite.
        """
        position, sequences = self.position, self.sequences()
        if position.step == 0:
            self.hidden = self.model.start(self.options.batch_size)
        self.model.train()
        for begin, size in sequences[position.step :]:
            stop.check()
            started = time.monotonic()
            loss = self._update(begin, size, len(sequences))
            position.step += 1
            position.updates += 1
            position.loss_sum += loss * size
            position.words += size
            position.seconds += time.monotonic() - started
            self._tell(len(sequences))
            after_update()

    def start_averaging(self) -> None:
        """Average the weights from now on."""
        self.average = AveragedModel(self.model)

    def record(self, val_loss: float) -> LanguageRecord:
        """Make the record of the epoch that is done."""
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
        """Collect everything that an exact resume needs."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "hidden": [list(pair) for pair in self.hidden],
            "position": asdict(self.position),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            RuntimeError, ValueError, KeyError, TypeError: it does not fit.
        """
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if state["average"] is not None:
            self.start_averaging()
            self.average.load_state_dict(state["average"])  # type: ignore[union-attr]
        self.hidden = [(hidden, cell) for hidden, cell in state["hidden"]]
        self.position = Position.from_dict(state["position"])

    def _update(self, begin: int, size: int, num_sequences: int) -> float:
        options, position = self.options, self.position
        factor = self._rate_factor(position.epoch + position.step / num_sequences)
        if options.vary_seq_len:
            factor *= size / options.seq_len
        for group, peak in zip(self.optimiser.param_groups, self.peak_rates, strict=True):
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
                f"The loss is {value} in epoch {position.epoch + 1} after {position.step} updates.",
                hint=lower_rate_hint(options),
            )
        self.optimiser.step()
        self.hidden = [(hidden.detach(), cell.detach()) for hidden, cell in output.state]
        if self.average is not None:
            self.average.update_parameters(self.model)
        return value

    def _activation_loss(self, output: Output) -> Tensor | float:
        """Penalise large outputs and large changes from word to word (Merity et al., 2017, section 4.6)."""
        options = self.options
        loss: Tensor | float = 0.0
        if options.activation_decay:
            loss = loss + options.activation_decay * output.features.pow(2).mean()
        if options.activation_change and len(output.raw) > 1:
            loss = loss + options.activation_change * output.raw.diff(dim=0).pow(2).mean()
        return loss

    def _rate_factor(self, epochs: float) -> float:
        """Return the factor of the peak rate after this many epochs."""
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

    def _tell(self, num_sequences: int) -> None:
        at = self.position
        speed = at.words * self.options.batch_size / max(at.seconds, 1e-9)
        self.on_event(
            LanguageStep(at.epoch, at.step, num_sequences, at.loss_sum / at.words, at.lr, speed, self._scale())
        )


def lower_rate_hint(options: LanguageOptions) -> str:
    """Suggest a third of the learning rate."""
    return f"Try a lower rate: --set language.lr={options.lr / 3:.1g}"


def _make_optimiser(model: LanguageModel, options: LanguageOptions) -> torch.optim.Optimizer:
    """Create the optimiser; scale and bias of a fixed classifier have their own rate."""
    head = model.classifier
    fast = [head.scale, head.bias] if isinstance(head, WordClassifier) else []
    known = {id(parameter) for parameter in fast}
    groups: list[dict[str, Any]] = [
        {"params": [each for each in model.parameters() if each.requires_grad and id(each) not in known]},
        {"params": [each for each in fast if each.requires_grad], "lr": options.lr * options.head_lr_scale},
    ]
    groups = [group for group in groups if group["params"]]
    kinds = {"asgd": torch.optim.SGD, "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[options.opt](groups, lr=options.lr, weight_decay=options.weight_decay)
