"""Run the demo: draw the data, convert a checkpoint, fine-tune it, and measure it on held-out typefaces.

It does what a user would type, `fixify convert`, `fixify finetune` and `fixify eval`, through the same functions, and
plots the accuracy against the bytes per class.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fixify._files import atomic_path, write_atomic
from fixify.benchmarks.child import child
from fixify.checkpoints.open import OpenModel, open_model
from fixify.checkpoints.slim import load
from fixify.conversion import Conversion, convert
from fixify.data import OpenedData, make_loader, open_train_val
from fixify.demo.glyphs import FACES, Faces, GlyphData, letter_labels, write_dataset, write_letter_images
from fixify.demo.plot import Classifier, write_plot
from fixify.errors import OutputError, OutputExistsError
from fixify.heads import FixedClassifier, kind_of
from fixify.metrics import Metrics, evaluate
from fixify.savings import Savings
from fixify.training import (
    EpochRecord,
    Event,
    FinetuneOptions,
    FinetuneResult,
    OpenedInputs,
    RunOutput,
    Step,
    TrainingInterrupted,
    finetune,
    train_model,
)

SHIPPED = Path(__file__).with_name("glyphs500.pth")
DEFAULT_FOLDER = Path("fixify-demo")
LETTERS = "letters132"
"""Name of the checkpoint that reads letters and digits: C = 132 classes, N = 256 features."""
EPOCHS, RATE = 2, 0.01
"""Epochs and learning rate of fine-tuning, for Hadamard codes and for the learned classifier."""
MANY_EPOCHS = 20
"""Epochs with more classes than features; only the last blocks are trained there, on far fewer images."""
UNTRAINED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("64-signs", "64 signs per class", {"bits_per_class": 64}),
    ("128-signs", "128 signs per class", {"bits_per_class": 128}),
    ("signs", "1 bit per weight", {}),
)
"""Binary heads that are only calibrated: the end of the file's name, the name, and the options of `convert`."""
ONE_SHOT = "signs"
"""The one of them that has one bit per weight."""
RESULTS = "demo.json"
_CALIBRATION_IMAGES = 1024
_MARK = "fixify.demo"

Stage = Literal["draw", "convert", "original", "one-shot", "finetune", "reload", "beside"]


@dataclass(frozen=True)
class StageStarted:
    """A stage of the demo begins; `text` tells the user what it does."""

    stage: Stage
    text: str


@dataclass(frozen=True)
class Counted:
    """The number of images of a stage that are done, and of all its images."""

    done: int
    total: int


DemoEvent = StageStarted | Counted | Event
DemoListener = Callable[[DemoEvent], object]


@dataclass(frozen=True)
class ManyClasses:
    """What more classes than features cost: the whole network that comes with fixify, converted and fine-tuned.

    Attributes:
        num_classes: Number of classes, about twice the number of features.
        original_top1: Top-1 of the network with its learned classifier, percent.
        top1: Top-1 with matched Hadamard codes after fine-tuning of the last blocks, percent.
        epochs: Epochs of this fine-tuning.
    """

    num_classes: int
    original_top1: float
    top1: float
    epochs: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, all of it in this run.

    Everything but `many` is about the letters and digits, which are fewer classes than the network has features.

    Attributes:
        folder: The folder that holds all files below.
        original: The checkpoint with the learned classifier: the letters and digits of the one that comes with fixify.
        converted: The slim checkpoint right after conversion: a matched Hadamard head, calibrated without labels.
        one_shot: A slim checkpoint that is never trained: a binary head, calibrated without labels.
        finetuned: The slim checkpoint after fine-tuning, which is the one to use.
        data: The images.
        plot: The plot of accuracy against bytes per class.
        classifiers: What the plot shows: the original first, then the heads.
        savings: Parameters and bytes before and after.
        original_metrics: Metrics of the original on the held-out typefaces.
        converted_metrics: Metrics of the converted checkpoint before training.
        one_shot_metrics: Metrics of the file `one_shot`.
        finetuned_metrics: Metrics of the file `finetuned`, read back from disk.
        history: Fine-tuning, epoch by epoch.
        control_history: Fine-tuning of the original with its learned classifier, on the same images with the same
            options. Empty if the control was left out.
        scales: (step, alpha) after each step.
        many: The same with more classes than features; None if it was left out.
        seconds: Duration of the whole demo.
    """

    folder: Path
    original: Path
    converted: Path
    one_shot: Path
    finetuned: Path
    data: GlyphData
    plot: Path
    classifiers: tuple[Classifier, ...]
    savings: Savings
    original_metrics: Metrics
    converted_metrics: Metrics
    one_shot_metrics: Metrics
    finetuned_metrics: Metrics
    history: tuple[EpochRecord, ...]
    control_history: tuple[EpochRecord, ...]
    scales: tuple[tuple[int, float], ...]
    many: ManyClasses | None
    seconds: float

    @property
    def control(self) -> EpochRecord | None:
        """The best epoch of the control; None if the control was left out."""
        return max(self.control_history, key=lambda record: record.val_top1, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; paths are as they were given."""
        plain: dict[str, Any] = dict(vars(self))
        for name, value in plain.items():
            if isinstance(value, Path):
                plain[name] = str(value)
            elif isinstance(value, (Metrics, Savings)):
                plain[name] = value.to_dict()
        plain["many"] = None if self.many is None else asdict(self.many)
        plain["data"] = {**asdict(self.data), "folder": str(self.data.folder)}
        plain["classifiers"] = [asdict(each) for each in self.classifiers]
        for name in ("history", "control_history"):
            plain[name] = [record.to_dict() for record in plain[name]]
        return plain


def demo_options(epochs: int = EPOCHS, *, seed: int = 0) -> FinetuneOptions:
    """Return the options with which the demo fine-tunes.

    The images are distorted enough when they are drawn. The stem and the first two stages, which have 15 % of the
    weights and take more than half of the time, stay as they are.
    """
    return FinetuneOptions.create(
        epochs=epochs,
        seed=seed,
        batch_size=256,
        opt="adamw",
        lr=RATE,
        weight_decay=0.05,
        head_lr_scale=0.1,
        freeze=3,
        no_aug=True,
        workers=0,
        channels_last=True,
        device="cpu",
    )


def run_demo(
    folder: Path = DEFAULT_FOLDER,
    *,
    epochs: int = EPOCHS,
    control: bool = True,
    many: bool = True,
    faces: Faces = FACES,
    force: bool = False,
    on_event: DemoListener | None = None,
) -> DemoResult:
    """Run the demo in a folder, offline and on the CPU.

    Args:
        folder: Where all files go; it is made if it is missing. Images that an earlier demo drew there are used again.
        epochs: Epochs of fine-tuning, at least 1.
        control: Also fine-tune the original with its learned classifier, to show what training alone gains.
        many: Also show what more classes than features cost.
        faces: The typefaces of each split.
        force: Replace the results of an earlier demo in the folder.
        on_event: Called with each event; during training these are the events of `fixify.training.finetune`.

    Raises:
        OutputExistsError: the folder already has results, or holds something else.
        OutputError: the folder cannot be written.
        TrainingInterrupted: SIGINT or SIGTERM arrived.
    """
    with _one_thread():
        return _Demo(folder, epochs, faces, on_event).run(control=control, many=many, force=force)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread inside the block.

    A network this small gains nothing from a second thread, and if the machine has any other load, two threads spend
    their time waiting for each other (measured: 40 images/s instead of 600).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Demo:
    """The stages of the demo."""

    def __init__(self, folder: Path, epochs: int, faces: Faces, on_event: DemoListener | None) -> None:
        self.folder, self.epochs, self.faces = folder, epochs, faces
        self.tell: DemoListener = on_event if on_event is not None else lambda _event: None
        self.scales: list[tuple[int, float]] = []

    def run(self, *, control: bool, many: bool, force: bool) -> DemoResult:
        """Run the stages here, what they are compared with in processes beside this one, and write the result."""
        started = time.perf_counter()
        folder, tell = self.folder, self.tell
        _claim(folder, force=force)
        with ExitStack() as beside:

            def start(function: Callable[..., dict[str, Any]], **given: Any) -> Callable[[], dict[str, Any]]:
                return beside.enter_context(child(function, {"folder": str(folder), **given}, num_threads=1))

            costs = start(run_many, faces=dict(self.faces)) if many else None
            tell(StageStarted("draw", "Drawing letters and digits"))
            data = write_letter_images(
                folder / "letters", faces=self.faces, on_progress=lambda done, total: tell(Counted(done, total))
            )
            original = folder / f"{LETTERS}.pth"
            write_part(original, letter_labels())
            controlled = start(run_control, epochs=self.epochs) if control else None

            tell(StageStarted("convert", "Converting the checkpoint, calibrated on images without labels"))
            conversion = _convert(original, folder / f"{LETTERS}.fixed.safetensors", data.folder, normalize=False)
            untrained = {
                end: _convert(
                    original, folder / f"{LETTERS}-{end}.fixed.safetensors", data.folder, head="binary", **options
                ).path
                for end, _, options in UNTRAINED
            }

            tell(StageStarted("original", "Evaluating the original"))
            opened = open_model(original)
            _, val = open_train_val(str(data.folder))
            original_metrics = _evaluate(opened, val, tell)

            tell(StageStarted("one-shot", "Evaluating signs, without any training"))
            one_shot = {end: _evaluate(open_model(path), val, tell) for end, path in untrained.items()}

            also = "; beside it, the original with its learned classifier as a control" if control else ""
            tell(StageStarted("finetune", f"Fine-tuning the Hadamard codes{also}"))
            tuned = self._finetune(conversion.path, data)

            tell(StageStarted("reload", "Reading the slim checkpoint back and evaluating it"))
            reloaded = _evaluate(open_model(tuned.best_path), val, tell)

            if control or many:
                tell(StageStarted("beside", "Waiting for what runs beside it"))
            control_history = [] if controlled is None else controlled()["history"]
            many_classes = None if costs is None else ManyClasses(**costs())
        plot = folder / "plot.png"
        classifiers = [Classifier("original, float16", _bytes_per_class(opened.model), original_metrics.top1)]
        for end, name, _ in UNTRAINED:
            classifiers.append(Classifier(name, _bytes_per_class(load(untrained[end])), one_shot[end].top1))
        size = _bytes_per_class(load(tuned.best_path))
        classifiers.append(Classifier("Hadamard codes", size, reloaded.top1, trained=True))
        write_plot(classifiers, original_metrics.num_images, plot)
        result = DemoResult(
            folder=folder,
            original=original,
            converted=conversion.path,
            one_shot=untrained[ONE_SHOT],
            finetuned=tuned.best_path,
            data=data,
            plot=plot,
            classifiers=tuple(classifiers),
            savings=conversion.savings,
            original_metrics=original_metrics,
            converted_metrics=tuned.before,
            one_shot_metrics=one_shot[ONE_SHOT],
            finetuned_metrics=reloaded,
            history=tuned.history,
            control_history=tuple(EpochRecord(**each) for each in control_history),
            scales=tuple(self.scales),
            many=many_classes,
            seconds=time.perf_counter() - started,
        )
        write_atomic(folder / RESULTS, json.dumps({_MARK: 1, **result.to_dict()}, indent=2) + "\n")
        return result

    def _finetune(self, slim: Path, data: GlyphData) -> FinetuneResult:
        def listen(event: Event) -> None:
            if isinstance(event, Step) and event.scale is not None:
                self.scales.append((event.step, event.scale))
            self.tell(event)

        out, options = self.folder / "finetuned", demo_options(self.epochs)
        try:
            return finetune(slim, str(data.folder), out, options, distill=False, force=True, on_event=listen)
        except TrainingInterrupted as stopped:
            stopped.hint = "Run the same command again: the demo starts anew, with the images that are drawn."
            raise


# What runs in processes beside the demo's own.


def run_control(folder: str, epochs: int) -> dict[str, Any]:
    """Fine-tune the learned classifier as the demo fine-tunes the codes; it is only measured, so nothing is saved."""
    root = Path(folder)
    opened = open_model(root / f"{LETTERS}.pth")
    train, val = open_train_val(str(root / "letters"))
    history = train_model(
        opened.model,
        OpenedInputs(train, val, opened.preprocessing),
        demo_options(epochs),
        RunOutput(root / "control", save=lambda _model, _path, _record: None, force=True),
    ).history
    return {"history": [record.to_dict() for record in history]}


def run_many(folder: str, faces: Faces) -> dict[str, Any]:
    """Convert and fine-tune the whole network, which has about twice as many classes as features."""
    root = Path(folder)
    data = write_dataset(root / "glyphs", faces=faces)
    original = root / SHIPPED.name
    with atomic_path(original) as temporary:
        shutil.copyfile(SHIPPED, temporary)
    conversion = _convert(original, root / f"{SHIPPED.stem}.fixed.safetensors", data.folder / "train")
    metrics = _evaluate(open_model(original), open_train_val(str(data.folder))[1])
    options = FinetuneOptions.create(
        epochs=0,
        last_block_epochs=MANY_EPOCHS,
        lr=0.1,
        warmup_epochs=0.25,
        distill_weight=0.9,
        channels_last=True,
        device="cpu",
    )
    tuned = finetune(conversion.path, str(data.folder), root / "many", options, distill=original, force=True)
    return asdict(ManyClasses(data.num_classes, metrics.top1, tuned.after.val_top1, MANY_EPOCHS))


def _convert(source: Path, out: Path, images: Path, **options: Any) -> Conversion:
    return convert(
        source, out, calibrate=images, calibrate_images=_CALIBRATION_IMAGES, device="cpu", force=True, **options
    )


def _bytes_per_class(model: torch.nn.Module) -> float:
    """Count what a classifier stores for each class, without its bias; learned weights are in half precision."""
    for module in model.modules():
        if isinstance(module, FixedClassifier):
            return kind_of(module.spec).bytes_per_class(module.spec)
    learned = model.get_submodule("classifier")
    if not isinstance(learned, torch.nn.Linear):
        raise TypeError(f"The demo's network has a {type(learned).__name__} as its classifier.")
    return 2.0 * learned.in_features


def write_part(path: Path, labels: Sequence[int]) -> None:
    """Write the shipped network with some of its classes only, as a checkpoint of its own.

    Raises:
        OutputError: it cannot be written.
    """
    content = torch.load(SHIPPED, weights_only=True)
    kept, weights = list(labels), content["state_dict"]
    chosen = {name: weights[name][kept].clone() for name in ("classifier.weight", "classifier.bias")}
    args = {**content["args"], "num_classes": len(kept)}
    with atomic_path(path) as temporary:
        torch.save({"arch": content["arch"], "state_dict": {**weights, **chosen}, "args": args}, temporary)


def _evaluate(opened: OpenModel, val: OpenedData, tell: DemoListener = lambda _event: None) -> Metrics:
    loader = make_loader(val, opened.preprocessing, training=False, batch_size=250, workers=0)
    return evaluate(
        opened.model.to(memory_format=torch.channels_last),
        loader,
        device=torch.device("cpu"),
        channels_last=True,
        on_batch=lambda done: tell(Counted(done, len(val))),
    )


def _claim(folder: Path, *, force: bool) -> None:
    """Make the folder and mark it as the demo's. A folder that holds something else is refused."""
    try:
        folder.mkdir(exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"Cannot use the folder {folder}: {error.strerror}.") from error
    if occupied:
        found = _read_results(folder)
        if _MARK not in found:
            raise OutputExistsError(
                f"{folder} holds files that are not the demo's.", hint="Name another folder: fixify demo FOLDER"
            )
        if "history" in found and not force:
            raise OutputExistsError(
                f"{folder} holds the results of an earlier demo.",
                hint="Replace them with --force (the drawn images are used again), or name another folder.",
            )
    write_atomic(folder / RESULTS, json.dumps({_MARK: 1}) + "\n")


def _read_results(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
