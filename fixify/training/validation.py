"""Measure models on the validation images of a run, and report images that cannot be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fixify.data import ImageLoader, OpenedData, UnreadableImages, make_loader
from fixify.heads import FixedClassifier
from fixify.many_classes import only_head
from fixify.metrics import Metrics, Predictions, add_up
from fixify.models.architectures import Preprocessing
from fixify.training import distributed
from fixify.training.answers import Answers
from fixify.training.events import Evaluating, Listener, Phase, Warned
from fixify.training.facts import OpenedInputs
from fixify.training.interrupt import StopRequest
from fixify.training.options import FinetuneOptions
from fixify.training.run_folder import UNREADABLE_FILE
from fixify.training.teacher import ReferenceModel, label_by_model, numbered

_NUM_NAMED = 5
_CONSEQUENCE = {"training": "the next one takes its place", "validation": "it is left out"}


def warn_of_unreadable(split: str, on_event: Listener) -> Callable[[str, int], None]:
    """Make the callback for unreadable images of "training" or "validation": it names the first 5."""

    def warn(message: str, count: int) -> None:
        if count <= _NUM_NAMED:
            on_event(Warned(f"{message.rstrip('.')}; {_CONSEQUENCE[split]}."))
        elif count == _NUM_NAMED + 1:
            on_event(
                Warned(f"More {split} images cannot be read. metrics.jsonl counts them, {UNREADABLE_FILE} lists them.")
            )

    return warn


class Validation:
    """Measures models on the validation images; between batches it stops on request.

    Several processes measure a model together. Each takes its shard of the images, the sums over images are added up,
    and all get the metrics of the whole.

    Args:
        opened: The images, and the preprocessing of the model that is trained.
        options: Precision, memory format and batch size.
        device: Where the models are.
        stop: Checked after every batch.
        on_event: Called after every batch.

    Attributes:
        data: The images; labelled by the teacher after `label_with`.
        unreadable: Images that every measurement leaves out.
        without_logits: Whether `measure` ranks the classes block by block (`fixify.many_classes`).
    """

    def __init__(
        self,
        opened: OpenedInputs,
        options: FinetuneOptions,
        device: torch.device,
        stop: StopRequest,
        on_event: Listener,
    ) -> None:
        self.data, self.preprocessing, self.options, self.device = opened.val, opened.preprocessing, options, device
        self.stop, self.on_event = stop, on_event
        self.unreadable = UnreadableImages(
            len(self.data),
            options.max_unreadable,
            warn_of_unreadable("validation", on_event),
            lambda text: on_event(Warned(text)),
        )
        self._loader: ImageLoader | None = None
        self._predictions = Predictions()
        self.without_logits = False

    def label_with(self, teacher: ReferenceModel) -> None:
        """Label the images with the teacher's predictions, and drop those that cannot be read.

        Call this before measuring anything.
        """
        with self._loader_for(teacher, numbered(self.data)) as loader:
            self.data = label_by_model(
                self.data,
                teacher,
                loader,
                device=self.device,
                amp=self.options.amp,
                on_batch=lambda images: self._after_batch("teacher", images),
                on_end=lambda: self._join_missing_batches(loader),
            )

    def measure(self, model: nn.Module, phase: Phase) -> Metrics:
        """Measure the model that is trained, or its average."""
        if self._loader is None:
            self._loader = self._make_loader(self.preprocessing)
        self._predictions = Predictions()
        deferred = only_head(model) if self.without_logits else None
        return self._measure(model, phase, self._loader, self._predictions, deferred)

    def answers(self) -> Answers:
        """Return the answers of the model that was measured last; every process must call this."""
        return Answers.of(distributed.all_gather(self._predictions.pairs()), len(self.data), self.data.num_classes)

    def measure_reference(self, reference: ReferenceModel, phase: Phase) -> Metrics:
        """Measure another model, and move it to the CPU afterwards."""
        model = reference.model.to(self.device)
        with self._loader_for(reference) as loader:
            metrics = self._measure(model, phase, loader)
        model.cpu()
        return metrics

    def close(self) -> None:
        """Stop the loader's processes."""
        if self._loader is not None:
            self._loader.close()

    def _measure(
        self,
        model: nn.Module,
        phase: Phase,
        loader: ImageLoader,
        predictions: Predictions | None = None,
        deferred: FixedClassifier | None = None,
    ) -> Metrics:
        started = time.perf_counter()
        sums = add_up(
            model,
            loader,
            device=self.device,
            amp=self.options.amp,
            channels_last=self.options.channels_last,
            on_batch=lambda images: self._after_batch(phase, images),
            predictions=predictions,
            deferred=deferred,
        )
        self._join_missing_batches(loader, model if self.options.shard else None)
        distributed.sum_(sums.totals)
        return sums.metrics(time.perf_counter() - started)

    def _join_missing_batches(self, loader: ImageLoader, sharded: nn.Module | None = None) -> None:
        """Take part in the collective calls of a batch that other processes have and this one has not.

        A sharded model needs all of them in every forward pass.
        """
        for _ in range(len(loader) - loader.own_batches):
            if sharded is not None:
                nothing = torch.zeros(1, *self.preprocessing["input_size"]), torch.zeros(1, dtype=torch.int64)
                add_up(sharded, [nothing], device=self.device, amp=self.options.amp)
            self.stop.check()

    def _after_batch(self, phase: Phase, images: int) -> None:
        total = len(self.data)
        self.on_event(Evaluating(phase, min(images * distributed.world_size(), total), total))
        self.stop.check()

    def _make_loader(self, preprocessing: Preprocessing, data: OpenedData | None = None) -> ImageLoader:
        return make_loader(
            self.data if data is None else data,
            preprocessing,
            training=False,
            batch_size=self.options.batch_size,
            workers=self.options.resolved_workers(),
            device=self.device,
            unreadable=self.unreadable,
            shard=distributed.local_shard(),
        )

    @contextmanager
    def _loader_for(self, reference: ReferenceModel, data: OpenedData | None = None) -> Iterator[ImageLoader]:
        loader = self._make_loader(reference.preprocessing, data)
        try:
            yield loader
        finally:
            loader.close()
