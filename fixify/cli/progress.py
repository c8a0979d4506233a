"""Show training runs on stderr: a live view in a terminal, plain lines elsewhere, and trackers beside them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fixify.cli.output import Output

if TYPE_CHECKING:
    from typing_extensions import Self

    from fixify.language.loop import LanguageEpochEnded, LanguageEvent, LanguageRunStarted, LanguageStep
    from fixify.training import EpochEnded, EpochRecord, Evaluating, Event, Listener, RunStarted, Step, Validated


_GAP = "   "
_SECONDS_PER_LINE = 30


class Pace:
    """Estimate the time left from what was measured since the epoch began or the run was resumed.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epochs = self._batches = 0
        self._mark: tuple[int, int, float] | None = None  # epoch, batch, seconds
        self._per_batch: float | None = None
        self._validating_since: float | None = None
        self._validation = 0.0  # of one epoch
        self._this_epoch = 0.0

    def start(self, epochs: int, batches: int) -> None:
        """Begin a run of that many epochs and batches per epoch."""
        self._epochs, self._batches = epochs, batches
        self._mark = self._per_batch = self._validating_since = None
        self._validation = self._this_epoch = 0.0

    def step(self, epoch: int, batch: int) -> None:
        """Note that `batch` batches of an epoch, counted from 0, are done."""
        now = self._clock()
        if self._mark is None:
            self._this_epoch = 0.0  # a validation before training belongs to no epoch
        if self._mark is None or self._mark[0] != epoch:
            # The first batch waits for the loader processes to start, and may compile the model.
            self._mark = (epoch, batch, now)
        elif batch > self._mark[1]:
            self._per_batch = (now - self._mark[2]) / (batch - self._mark[1])

    def evaluating(self, images: int, total: int) -> None:
        """Note that `images` of `total` validation images are done."""
        now = self._clock()
        if self._validating_since is None:
            self._validating_since = now
        if images >= total:
            took, self._validating_since = now - self._validating_since, None
            self._this_epoch += took
            self._validation = max(self._validation, self._this_epoch)
            if self._mark is not None:  # training stood still
                self._mark = (*self._mark[:2], self._mark[2] + took)

    def epoch_ended(self) -> None:
        """Note that an epoch and its validation are done."""
        self._validation, self._this_epoch = self._this_epoch, 0.0

    def left(self, epoch: int, batch: int) -> tuple[float, float] | None:
        """Return the seconds left in this epoch, and in the whole run with its validations; None at the start."""
        if self._per_batch is None:
            return None
        epochs_after = self._epochs - epoch - 1
        here = (self._batches - batch) * self._per_batch
        each = self._batches * self._per_batch + self._validation
        return here, here + self._validation + epochs_after * each


def as_time(seconds: float | None) -> str:
    """Write seconds as time; `--:--` if they are unknown.

    >>> as_time(3723), as_time(62), as_time(None)
    ('1:02:03', '01:02', '--:--')
    """
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class LiveView(Progress):
    """Show bars and numbers at the bottom of a terminal; show nothing elsewhere.

    It fits any width: the bars take the rest of the line, and the numbers take as many lines as they need.

    Args:
        console: The console of stderr.
    """

    def __init__(self, console: Console) -> None:
        self.is_live = console.is_terminal and not console.is_dumb_terminal
        self._numbers: Sequence[tuple[str, str]] = ()
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", justify="right", markup=False),
            console=console,
            transient=True,
            expand=True,
            disable=not self.is_live,
        )
        self.epoch = self.add_hidden("epoch")
        self.whole = self.add_hidden("total")
        self.evaluating = self.add_hidden("validating")

    def add_hidden(self, description: str) -> TaskID:
        """Add a bar that is not shown yet."""
        return self.add_task(description, total=None, visible=False, note="")

    def show_bar(self, task: TaskID, done: int, total: int, *, description: str | None = None, note: str = "") -> None:
        """Show a bar in its present state."""
        self.update(task, description=description, completed=done, total=total, note=note, visible=True)

    def show_training(self, description: str, epoch: tuple[int, int], whole: tuple[int, int]) -> None:
        """Show (done, total) batches of the epoch and of the run."""
        self.show_bar(self.epoch, *epoch, description=description)
        self.show_bar(self.whole, *whole)

    def show_left(self, left: tuple[float, float] | None) -> None:
        """Show the seconds left in the epoch and in the run."""
        for task, seconds in zip((self.epoch, self.whole), left or (None, None), strict=True):
            self.update(task, note=f"{as_time(seconds)} left")

    def show_numbers(self, numbers: Sequence[tuple[str, str]]) -> None:
        """Show names and values below the bars."""
        self._numbers = numbers

    def hide(self, *tasks: TaskID) -> None:
        """Hide bars; together with the bar of the run, hide the numbers too."""
        for task in tasks:
            self.update(task, visible=False)
        if self.whole in tasks:
            self._numbers = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what rich draws."""
        yield self.make_tasks_table(self.tasks)
        if self._numbers:
            yield _Numbers(self._numbers)


class _Numbers:
    """Names and values, as many per line as fit; a name and its value stay together."""

    def __init__(self, numbers: Sequence[tuple[str, str]]) -> None:
        self.numbers = numbers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(no_wrap=True, overflow="ellipsis")
        for name, value in self.numbers:
            part = Text.assemble((f"{name} " if name else "", "dim"), value)
            if line and len(line) + len(_GAP) + len(part) > options.max_width:
                yield line
                line = Text(no_wrap=True, overflow="ellipsis")
            line = Text.assemble(line, _GAP if line else "", part, no_wrap=True, overflow="ellipsis")
        yield line


class RunDisplay:
    """Show runs: one line per epoch; in a terminal a live view below, elsewhere a line every half minute.

    It is a context manager around one run, or around several that follow each other.

    Args:
        output: Output of the command.
        clock: Returns the time in seconds.
    """

    def __init__(self, output: Output, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.output = output
        self.view = LiveView(output.err)
        self.pace = Pace(clock)
        self._clock = clock
        self._epochs = 0
        self._last_line = clock()

    def __enter__(self) -> Self:
        if self.view.is_live:  # older versions of rich end a hidden bar with an empty line
            self.view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.view.is_live:
            self.view.stop()

    def begin(self, epochs: int, steps: int) -> None:
        """Begin a run of that many epochs and steps per epoch."""
        self._epochs = epochs
        self.pace.start(epochs, steps)

    def say(self, line: str) -> None:
        """Print a line that stays; the next line of progress follows after half a minute."""
        self._last_line = self._clock()
        self.output.say(line)

    def where(self, epoch: int) -> str:
        """Write an epoch that is counted from 0 as `epoch 3/30`."""
        return f"epoch {epoch + 1}/{self._epochs}"

    def show_progress(
        self, epoch: int, step: int, steps: int, unit: str, numbers: list[tuple[str, str]], best: tuple[str, str] | None
    ) -> None:
        """Show that `step` of `steps` steps of an epoch are done.

        Args:
            epoch: The epoch, from 0.
            step: Steps that are done.
            steps: Steps of the epoch.
            unit: What a step is called.
            numbers: Names and values.
            best: Name and value of the best validation; only in the live view, because lines of epochs show it.
        """
        self.pace.step(epoch, step)
        left = self.pace.left(epoch, step)
        if self.view.is_live:
            whole = (epoch * steps + step, self._epochs * steps)
            self.view.show_training(self.where(epoch), (step, steps), whole)
            self.view.show_left(left)
            self.view.show_numbers([*numbers, best] if best else numbers)
        elif self._clock() - self._last_line >= _SECONDS_PER_LINE:
            said = ", ".join(f"{name} {value}".strip() for name, value in numbers)
            rest = "" if left is None else f", {as_time(left[1])} left"
            self.say(f"{self.where(epoch)}, {unit} {step:,}/{steps:,}: {said}{rest}")


class TrainingDisplay(RunDisplay):
    """Listen to `fixify.training`."""

    def __init__(self, output: Output, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(output, clock=clock)
        self._best: EpochRecord | None = None

    def __call__(self, event: Event) -> None:
        """Show an event of the run."""
        from fixify import training

        if isinstance(event, training.Warned):
            self.output.warn(event.text)
        elif isinstance(event, training.RunStarted):
            self._start(event)
        elif isinstance(event, training.RateChosen):
            tried = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in event.losses)
            why = (
                "the lowest loss after a few steps"
                if min(event.losses, key=_loss)[0] == event.lr
                else ("the lowest rate, because none improved")
            )
            self.output.say(f"learning rate {event.lr:g}, {why}: {event.before:.4f} before, {tried}")
        elif isinstance(event, training.Evaluating):
            self._evaluating(event)
        elif isinstance(event, training.OriginalEvaluated):
            self.output.say(f"original: {event.name}, top-1 {event.metrics.top1:.2f} %, loss {event.metrics.loss:.4f}")
        elif isinstance(event, training.Evaluated):
            when = "after calibration" if event.calibrated else "before training"
            self.output.say(f"{when}: top-1 {event.metrics.top1:.2f} %, loss {event.metrics.loss:.4f}")
        elif isinstance(event, training.Calibrated):
            self.output.say(f"feature statistics taken from {_images(event.images, 'training image')}")
        elif isinstance(event, training.ClassifierConverted):
            self.say(
                f"step {event.step:,}: the learned classifier became a {event.head} head of {event.bytes_per_class} "
                f"bytes per class, fitted on {_images(event.images, 'training image')}"
            )
            if event.loss_note is not None:
                self.output.say(event.loss_note)
        elif isinstance(event, training.LastBlockEpoch):
            where = f"last blocks, epoch {event.epoch + 1}/{event.epochs}"
            self.output.say(f"{where}: loss {event.loss:.4f} on the features of {_images(event.images)}")
        elif isinstance(event, training.Step):
            self._step(event)
        elif isinstance(event, training.Validated):
            self._validation(event)
        elif isinstance(event, training.EpochEnded):
            self._epoch(event)

    def _start(self, event: RunStarted) -> None:
        self.begin(event.epochs, event.batches)
        self._best = None
        self.output.say(f"training data: {event.train}")
        self.output.say(f"validation data: {event.val}")
        if event.loss_note is not None:
            self.output.say(event.loss_note)
        if event.teacher_note is not None:
            self.output.say(event.teacher_note)
        if event.convert_at is not None and event.first_step < event.convert_at:
            self.output.say(f"the classifier is learned for {event.convert_at:,} steps, then converted")
        if event.frozen:
            self.output.say(
                f"training {event.trainable:,} of {event.parameters:,} parameters; frozen: {'; '.join(event.frozen)}"
            )
        if event.first_epoch:
            self.output.say(f"resuming in epoch {event.first_epoch + 1} of {event.epochs}")

    def _evaluating(self, event: Evaluating) -> None:
        if event.images >= event.total:
            self.view.hide(self.view.evaluating)
        else:
            what = {"features": "features", "teacher": "asking the teacher"}.get(event.phase, "validating")
            self.view.show_bar(self.view.evaluating, event.images, event.total, description=what, note="images")
        if event.phase in ("before", "validation"):
            self.pace.evaluating(event.images, event.total)

    def _step(self, event: Step) -> None:
        numbers = [("loss", f"{event.loss:.4f}"), ("top-1", f"{event.top1:.1f} %")]
        if event.scale is not None:
            numbers.append(("alpha", f"{event.scale:.2f}"))
        numbers += [("lr", f"{event.lr:.3g}"), ("", f"{event.images_per_second:,.0f} images/s")]
        best = None if self._best is None else ("best validation", f"{self._best.val_top1:.2f} %")
        self.show_progress(event.epoch, event.batch, event.batches, "batch", numbers, best)

    def _validation(self, event: Validated) -> None:
        record = self._validated(event)
        where = f"step {record.step:,}" if record.step else "before training the whole network"
        loss = "" if record.train_loss is None else f"loss {record.train_loss:.4f}, "
        self.say(
            f"{where}: {loss}validation top-1 {record.val_top1:.2f} %, loss {record.val_loss:.4f}"
            + _left_out(record)
            + (" (best)" if event.is_best else "")
        )

    def _epoch(self, event: EpochEnded) -> None:
        self.pace.epoch_ended()
        record = self._validated(event)
        loss = "" if record.train_loss is None else f"loss {record.train_loss:.4f}, "
        self.say(
            f"{self.where(record.epoch)}: {loss}validation top-1 {record.val_top1:.2f} %, "
            f"loss {record.val_loss:.4f}, {record.images_per_second:.0f} images/s"
            + _left_out(record)
            + (" (best)" if event.is_best else "")
        )

    def _validated(self, event: Validated | EpochEnded) -> EpochRecord:
        if event.is_best:
            self._best = event.record
        return event.record


def _loss(tried: tuple[float, float]) -> float:
    return tried[1]


def _left_out(record: EpochRecord) -> str:
    return f" ({record.val_unreadable:,} unreadable left out)" if record.val_unreadable else ""


class LanguageDisplay(RunDisplay):
    """Listen to `fixify.language`."""

    def __init__(self, output: Output, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(output, clock=clock)
        self._best: float | None = None

    def __call__(self, event: LanguageEvent) -> None:
        """Show an event of the run."""
        from fixify.language import loop as events

        if isinstance(event, events.Warned):
            self.output.warn(event.text)
        elif isinstance(event, events.LanguageRunStarted):
            self._start(event)
        elif isinstance(event, events.LanguageStep):
            self._step(event)
        else:
            self._epoch(event)

    def _start(self, event: LanguageRunStarted) -> None:
        self.begin(event.epochs, event.steps)
        self._best = None
        self.output.say(f"text: {event.text}")
        self.output.say(f"training {event.learned:,} parameters on {event.device}")
        if event.first_epoch:
            self.output.say(f"resuming in epoch {event.first_epoch + 1} of {event.epochs}")

    def _step(self, event: LanguageStep) -> None:
        numbers = [("loss", f"{event.loss:.4f}"), ("lr", f"{event.lr:.3g}")]
        if event.scale is not None:
            numbers.append(("alpha", f"{event.scale:.2f}"))
        numbers.append(("", f"{event.words_per_second:,.0f} words/s"))
        best = None if self._best is None else ("best perplexity", f"{self._best:.2f}")
        self.show_progress(event.epoch, event.step, event.steps, "update", numbers, best)

    def _epoch(self, event: LanguageEpochEnded) -> None:
        self.pace.epoch_ended()
        record = event.record
        if event.is_best:
            self._best = record.val_perplexity
        self.say(
            f"{self.where(record.epoch)}: loss {record.train_loss:.4f}, validation perplexity "
            f"{record.val_perplexity:.2f}, {record.words_per_second:,.0f} words/s"
            + (" (mean of the weights)" if record.averaged else "")
            + (" (best)" if event.is_best else "")
        )


@contextlib.contextmanager
def watching(output: Output, trackers: Sequence[str]) -> Iterator[Listener]:
    """Create the listener of one run, or of several that follow each other: the terminal, and trackers.

    Raises:
        UsageError: there is no such tracker, or its package is not installed.
    """
    with contextlib.ExitStack() as stack:
        listeners: list[Listener] = [stack.enter_context(TrainingDisplay(output))]
        if trackers:
            from fixify.tracking import Tracking, open_trackers

            listeners.append(stack.enter_context(Tracking(open_trackers(trackers))))

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        yield tell


def _images(number: int, noun: str = "image") -> str:
    from fixify._values import counted  # which imports pydantic

    return counted(number, noun)
