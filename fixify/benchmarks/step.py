"""Where the time of a fine-tuning step goes, with a learned and with a fixed classifier.

A step is forward pass, cross-entropy, backward pass and update, as `fixify finetune` does it, on random images. Hooks
at the classifier tell its share of both passes from the backbone's. With several processes (gloo, on this machine) each
step is also done without averaging the gradients; the difference is what the all-reduce adds to the step, beyond what
the backward pass hides.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.benchmarks.child import Failure, run_in_children
from fixify.benchmarks.machine import Machine, cores, this_machine
from fixify.errors import ResourceError, UsageError
from fixify.heads import KINDS, FixedClassifier
from fixify.models import Architecture, build, find_classifiers, parse_architecture
from fixify.models.classifiers import is_auxiliary
from fixify.surgery import fix_classifier_
from fixify.training import FinetuneOptions
from fixify.training.optimisers import make_optimiser
from fixify.training.parallel import ReplicatedModel

MODEL = "mobilenetv3_small_050"
NUM_CLASSES = 11_221
BATCH = 32
IMAGE_SIZE = 64
REPEATS = 15
_WARM_UP = 2
_TIMEOUT = 600.0


@dataclass(frozen=True)
class Phases:
    """Seconds of the parts of one step; each is the median over the steps.

    Attributes:
        head_forward: The classifier's forward pass and the loss.
        head_backward: The backward pass down to the gradient of the classifier's input.
        optimiser: The update, and clearing the gradients.
        all_reduce: What averaging gradients and statistics over the processes adds.
        rest: Everything else: the backbone.
    """

    head_forward: float
    head_backward: float
    optimiser: float
    all_reduce: float
    rest: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class StepRow:
    """The phases of a step in a number of processes.

    Attributes:
        processes: Number of processes; each has a batch of its own.
        learned: With a learned classifier.
        fixed: With a fixed one.
    """

    processes: int
    learned: Phases
    fixed: Phases

    def to_dict(self) -> dict[str, Any]:
        """Return the ratio of the whole step, then the seconds."""
        return {
            "processes": self.processes,
            "ratio": self.learned.total / self.fixed.total,
            "learned": asdict(self.learned) | {"total": self.learned.total},
            "fixed": asdict(self.fixed) | {"total": self.fixed.total},
        }


@dataclass(frozen=True)
class StepBenchmark:
    """The result of `benchmark_step`.

    Attributes:
        machine: What it ran on.
        model: Name of the network.
        head: Kind of the fixed head.
        num_classes: C.
        batch: Images per batch and process.
        image_size: Height and width of the images.
        threads: Threads of torch in all processes together.
        rows: One per number of processes.
    """

    machine: Machine
    model: str
    head: str
    num_classes: int
    batch: int
    image_size: int
    threads: int
    rows: tuple[StepRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify bench step --json` prints."""
        return {
            "benchmark": "step",
            "machine": self.machine.to_dict(),
            "model": self.model,
            "head": self.head,
            "num_classes": self.num_classes,
            "batch": self.batch,
            "image_size": self.image_size,
            "threads": self.threads,
            "rows": [row.to_dict() for row in self.rows],
        }


def benchmark_step(
    model: str = MODEL,
    *,
    head: str = "hadamard",
    num_classes: int = NUM_CLASSES,
    batch: int = BATCH,
    image_size: int = IMAGE_SIZE,
    processes: Sequence[int] = (1, 2),
    repeats: int = REPEATS,
    on_row: Callable[[StepRow], object] | None = None,
) -> StepBenchmark:
    """Time the parts of a fine-tuning step, in turns with a learned and a fixed classifier, on the CPU.

    Args:
        model: A network of timm, torchvision or the paper.
        head: Kind of the fixed head, with codes in class order; signs are those of the network's random classifier.
        num_classes: C.
        batch: Images per batch and process.
        image_size: Height and width of the images.
        processes: Numbers of processes; the cores are divided among them.
        repeats: Steps of each kind.
        on_row: Called with each row.

    Raises:
        UsageError: a number is not positive, or the network does not take images of this size.
        ArchitectureError, NoClassifierError: there is no such network, or it has no classifier.
        HeadSpecError: there is no such head for it.
        ResourceError: a process ended, or took longer than ten minutes.
    """
    if min(num_classes - 1, batch - 1, image_size, repeats, *processes) < 1:
        raise UsageError("Classes and batch must be at least 2, image size, repeats and processes at least 1.")
    architecture = parse_architecture(model)
    _check(architecture, head, num_classes, image_size)
    rows = []
    for count in processes:
        with tempfile.TemporaryDirectory(prefix="fixify-") as folder:
            arguments = {
                "model": architecture.spelled,
                "head": head,
                "num_classes": num_classes,
                "batch": batch,
                "image_size": image_size,
                "repeats": repeats,
                "world_size": count,
                "meeting_point": str(Path(folder) / "store"),
            }
            found = run_in_children(
                measure_steps,
                [arguments | {"rank": rank} for rank in range(count)],
                num_threads=max(1, cores() // count),
                timeout=_TIMEOUT,
            )
        failed = next((each for each in found if isinstance(each, Failure)), None)
        if failed is not None or isinstance(found[0], Failure):
            raise ResourceError(f"The steps could not be measured: {failed.reason if failed else ''}.")
        row = StepRow(count, Phases(**found[0]["learned"]), Phases(**found[0]["fixed"]))
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return StepBenchmark(this_machine(), architecture.ref, head, num_classes, batch, image_size, cores(), tuple(rows))


def _check(architecture: Architecture, head: str, num_classes: int, image_size: int) -> None:
    """Check without memory that the network takes such images and that there is such a head."""
    model = _fixed(build(architecture, num_classes=num_classes, meta=True), head).eval()
    channels = architecture.kwargs.get("in_chans", 3)
    try:
        with torch.inference_mode():
            model(torch.empty(2, channels, image_size, image_size, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:  # what the libraries raise for such images
        raise UsageError(
            f"{architecture.ref} does not take images of {image_size} x {image_size}: {error}",
            hint="Choose another --img-size; many transformers need 224.",
        ) from error


def _fixed(model: nn.Module, head: str) -> nn.Module:
    # Matching to random weights would take long and change nothing; signs have no other source.
    takes_signs = head in KINDS and KINDS[head].needs_classifier
    return fix_classifier_(model, head) if takes_signs else fix_classifier_(model, head, match=False)


def measure_steps(
    model: str,
    head: str,
    num_classes: int,
    batch: int,
    image_size: int,
    repeats: int,
    rank: int,
    world_size: int,
    meeting_point: str,
) -> Mapping[str, Any]:
    """Time the steps in this process; all processes of a group call it.

    Returns:
        The phases with a learned and with a fixed classifier, in seconds; see `Phases`.
    """
    torch.manual_seed(rank)
    architecture = parse_architecture(model)
    learned = build(architecture, num_classes=num_classes)
    fixed = _fixed(build(architecture, num_classes=num_classes), head)
    with _group(rank, world_size, meeting_point):
        runs = {"learned": _Run(learned, world_size), "fixed": _Run(fixed, world_size)}
        channels = architecture.kwargs.get("in_chans", 3)
        images = torch.randn(batch, channels, image_size, image_size)
        labels = torch.randint(num_classes, (batch,))
        for turn in range(_WARM_UP + repeats):
            for run in runs.values():
                for averaged in (False, True) if world_size > 1 else (True,):
                    run.step(images, labels, averaged=averaged, counts=turn >= _WARM_UP)
        return {name: asdict(run.phases()) for name, run in runs.items()}


@contextlib.contextmanager
def _group(rank: int, world_size: int, meeting_point: str) -> Iterator[None]:
    if world_size == 1:
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world_size)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


class _Run:
    """A model in training, and the times of its steps."""

    def __init__(self, model: nn.Module, world_size: int) -> None:
        options = FinetuneOptions.create(device="cpu")
        self.model = model.train()
        self.optimiser = make_optimiser(model, options)
        self.parallel = ReplicatedModel(model, options, torch.device("cpu")) if world_size > 1 else None
        self.times: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        self.marks: dict[str, float] = {}
        head = model.get_submodule(next(path for path in _head_paths(model) if not is_auxiliary(path)))
        head.register_forward_pre_hook(self._enter)
        head.register_forward_hook(self._leave)

    def _mark(self, name: str) -> None:
        self.marks[name] = time.perf_counter()

    def _enter(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].register_hook(lambda _gradient: self._mark("head passed"))
        self._mark("head begins")

    def _leave(self, *_: Any) -> None:
        self._mark("head ends")

    def step(self, images: Tensor, labels: Tensor, *, averaged: bool, counts: bool) -> None:
        """Do one step; with `counts`, keep its times."""
        forward = self.model if self.parallel is None else self.parallel
        context = contextlib.nullcontext() if self.parallel is None else self.parallel.accumulating(last=averaged)
        if dist.is_initialized():
            dist.barrier()
        self._mark("start")
        with context:
            outputs = forward(images)
            logits = outputs if isinstance(outputs, Tensor) else outputs[0]
            self._mark("logits")
            loss = F.cross_entropy(logits, labels)
            self._mark("loss")
            loss.backward()
        self._mark("gradients")
        if averaged and self.parallel is not None:
            self.parallel.after_update()
        self._mark("averaged")
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._mark("updated")
        at = self.marks
        times = {
            "head_forward": at["head ends"] - at["head begins"] + at["loss"] - at["logits"],
            "head_backward": at["head passed"] - at["loss"],
            "optimiser": at["updated"] - at["averaged"],
            "total": at["updated"] - at["start"],
        }
        if counts:
            self.times[averaged].append(times)

    def phases(self) -> Phases:
        """Return the medians."""
        alone = self.times[False] or self.times[True]
        median = {name: statistics.median(times[name] for times in alone) for name in alone[0]}
        all_reduce = 0.0
        if self.times[False]:
            all_reduce = statistics.median(times["total"] for times in self.times[True]) - median["total"]
        own = median["head_forward"] + median["head_backward"] + median["optimiser"]
        return Phases(
            head_forward=median["head_forward"],
            head_backward=median["head_backward"],
            optimiser=median["optimiser"],
            all_reduce=max(all_reduce, 0.0),
            rest=max(median["total"] - own, 0.0),
        )


def _head_paths(model: nn.Module) -> list[str]:
    """List the paths of the classifier layers of a model, learned or fixed."""
    fixed = [path for path, module in model.named_modules() if isinstance(module, FixedClassifier)]
    return fixed or [site.path for site in find_classifiers(model)]
