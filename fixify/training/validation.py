"""What a run says of images that cannot be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fixify.data import ImageLoader, OpenedData, UnreadableImages, make_loader
from fixify.metrics import Confusions, Metrics, Predictions, add_up, count_confusions
from fixify.training import distributed
from fixify.training.events import Evaluating, Listener, Phase, Warned
from fixify.training.interrupt import Stopped, StopRequest
from fixify.training.options import FinetuneOptions
from fixify.training.teacher import OtherModel, answered

UNREADABLE_FILE = "unreadable.txt"
_NAMED = 5
_INSTEAD = {"training": "the next one takes its place", "validation": "it is left out"}


def teller(split: str, on_event: Listener) -> Callable[[str, int], None]:
    """What to call with each new unreadable image of "training" or "validation": names the first ones."""

    def tell(message: str, count: int) -> None:
        if count <= _NAMED:
            on_event(Warned(f"{message.rstrip('.')}; {_INSTEAD[split]}."))
        elif count == _NAMED + 1:
            on_event(Warned(f"More {split} images cannot be read: metrics.jsonl counts, {UNREADABLE_FILE} lists them."))

    return tell


# The validation images of a run, and measuring models on them.


class Validation:
    """Measures models on one data set; raises `Stopped` between batches when asked to stop.

    Several processes measure a model together, each on its share of the images, and all get the metrics of the whole:
    what is added up are sums over images, and no image is in two shares.

    Args:
        data: The images.
        preprocessing: Of the model that is trained.
        options: Precision, memory format and batch size.
        device: Where the models are.
        stop: Looked at after every batch.
        on_event: Told how far it is.

    Attributes:
        unreadable: Images that are left out of every measurement.
    """

    def __init__(
        self,
        data: OpenedData,
        preprocessing: dict[str, Any],
        options: FinetuneOptions,
        device: torch.device,
        stop: StopRequest,
        on_event: Listener,
    ) -> None:
        self.data, self.preprocessing, self.options, self.device = data, preprocessing, options, device
        self.stop, self.on_event = stop, on_event
        self._loader: ImageLoader | None = None
        self._answers = Predictions()
        self.unreadable = UnreadableImages(len(data), options.max_unreadable, teller("validation", on_event))

    def label_with(self, teacher: OtherModel) -> None:
        """Make the teacher's answers the labels; to be called before anything is measured."""
        # None may be left out: the answers are the images' in order.
        with self._loader_for(teacher, UnreadableImages(len(self.data))) as loader:
            self.data = answered(
                self.data,
                teacher,
                loader,
                device=self.device,
                amp=self.options.amp,
                on_batch=lambda images: self._tell("teacher", images),
                on_end=lambda: self._keep_step(loader),
            )

    def measure(self, model: nn.Module, phase: Phase) -> Metrics:
        """Metrics of the model that is trained, or of its average."""
        if self._loader is None:
            self._loader = self._make_loader(self.preprocessing)
        self._answers = Predictions()
        return self._measure(model, phase, self._loader, self._answers)

    def confusions(self) -> Confusions:
        """What the model that was measured last answered to each class."""
        pairs = torch.cat(distributed.all_gather(self._answers.pairs()), dim=1)
        return count_confusions(pairs.numpy(), self.data.num_classes)

    def measure_other(self, other: OtherModel, phase: Phase) -> Metrics:
        """Metrics of another model, which is on the CPU afterwards."""
        model = other.model.to(self.device)
        with self._loader_for(other) as loader:
            metrics = self._measure(model, phase, loader)
        model.cpu()
        return metrics

    def close(self) -> None:
        """Stop the loader's processes."""
        if self._loader is not None:
            self._loader.close()

    def _measure(
        self, model: nn.Module, phase: Phase, loader: ImageLoader, answers: Predictions | None = None
    ) -> Metrics:
        started = time.perf_counter()
        sums = add_up(
            model,
            loader,
            device=self.device,
            amp=self.options.amp,
            channels_last=self.options.channels_last,
            on_batch=lambda images: self._tell(phase, images),
            predictions=answers,
        )
        self._keep_step(loader, model if self.options.shard else None)
        distributed.sum_(sums.totals)
        return sums.metrics(time.perf_counter() - started)

    def _keep_step(self, loader: ImageLoader, sharded: nn.Module | None = None) -> None:
        """Take part in what the processes do with each batch, when others have one more: of a sharded model each of
        them has a part.
        """
        for _ in range(len(loader) - loader.own_batches):
            if sharded is not None:
                nothing = torch.zeros(1, *self.preprocessing["input_size"]), torch.zeros(1, dtype=torch.int64)
                add_up(sharded, [nothing], device=self.device, amp=self.options.amp)
            self._look_at_stop()

    def _tell(self, phase: Phase, images: int) -> None:
        total = len(self.data)
        self.on_event(Evaluating(phase, min(images * distributed.world_size(), total), total))
        self._look_at_stop()

    def _look_at_stop(self) -> None:
        if self.stop.requested():
            raise Stopped

    def _make_loader(self, preprocessing: dict[str, Any], unreadable: UnreadableImages | None = None) -> ImageLoader:
        return make_loader(
            self.data,
            preprocessing,
            training=False,
            batch_size=self.options.batch_size,
            workers=self.options.resolved_workers(),
            device=self.device,
            unreadable=self.unreadable if unreadable is None else unreadable,
            shard=distributed.local_shard(),
        )

    @contextmanager
    def _loader_for(self, other: OtherModel, unreadable: UnreadableImages | None = None) -> Iterator[ImageLoader]:
        loader = self._make_loader(other.preprocessing, unreadable)
        try:
            yield loader
        finally:
            loader.close()
