"""What may come before training the whole network: calibrating its heads, and training only its last blocks.

Both look at some training images, as in validation. Neither stores anything on its way: a run that is stopped in one
begins it anew, and exactly so. Several processes read the images for the last blocks together; the rest each does,
and the first one's result is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from fixify.data import ImageLoader, OpenedData, Share, Subset, make_loader
from fixify.data.seeding import Stream, permutation
from fixify.errors import DataError
from fixify.training import distributed
from fixify.training.calibration import calibrate_heads_, uncalibrated_heads
from fixify.training.engine import Engine
from fixify.training.events import Calibrated, Evaluating, LastBlockEpoch, Listener
from fixify.training.last_block import compute, divide, joined, most_images, train_tail
from fixify.training.loop import training_loss
from fixify.training.replicas import make_alike


class Stages:
    """The stages before training.

    Args:
        engine: What is trained.
        data: The training images.
        preprocessing: Of the model.
        on_event: Told how far it is.
        look_at_stop: Called often; may raise to stop.
    """

    def __init__(
        self,
        engine: Engine,
        data: OpenedData,
        preprocessing: dict[str, Any],
        on_event: Listener,
        look_at_stop: Callable[[], None],
    ) -> None:
        self.engine, self.data, self.preprocessing = engine, data, preprocessing
        self.on_event, self.look_at_stop = on_event, look_at_stop

    def calibrate(self) -> bool:
        """Set the statistics of heads that have none yet; says whether there were such."""
        engine = self.engine
        if not uncalibrated_heads(engine.model):
            return False
        with self._some_images(Stream.CALIBRATION, engine.options.calibration_images) as loader:
            images = calibrate_heads_(engine.model, self._watched(loader), device=engine.device)
        make_alike(engine.model)
        self.on_event(Calibrated(images))
        return True

    def train_last_block(self) -> None:
        """Train the last blocks for `options.last_block_epochs`."""
        engine, options = self.engine, self.engine.options
        with self._some_images(Stream.LAST_BLOCK, 2) as loader:
            few = next((images for images, _ in loader), None)
        if few is None:
            raise DataError("The first images that were drawn cannot be read.", hint="See the warnings above.")
        few = few.to(engine.device)
        divided = divide(engine.model, few)
        count = min(len(self.data), most_images(divided, few))

        def tell(images: int) -> None:
            self.on_event(Evaluating("features", min(images * distributed.count(), count), count))
            self.look_at_stop()

        with self._some_images(Stream.LAST_BLOCK, count, distributed.share()) as loader:
            part = compute(divided, loader, engine.teacher, device=engine.device, amp=options.amp, on_batch=tell)
            for _ in range(len(loader) - loader.own_batches):
                self.look_at_stop()
        features = joined(part)
        train_tail(
            engine.model,
            divided,
            features,
            options,
            lambda logits, targets, taught: training_loss(logits, targets, taught, options),
            device=engine.device,
            frozen=engine.frozen,
            on_epoch=lambda epoch, loss: self.on_event(LastBlockEpoch(epoch, options.last_block_epochs, count, loss)),
            on_step=self.look_at_stop,
        )
        make_alike(engine.model)
        if engine.ema is not None:
            engine.ema.set(engine.model)

    def _watched(self, loader: ImageLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            self.look_at_stop()
            yield batch

    @contextmanager
    def _some_images(self, stream: int, count: int, share: Share | None = None) -> Iterator[ImageLoader]:
        options = self.engine.options
        order = permutation(options.seed, 0, stream, count=len(self.data))
        picked = replace(self.data, images=Subset(self.data.images, order[:count].tolist()))
        loader = make_loader(
            picked,
            self.preprocessing,
            training=False,
            batch_size=options.batch_size,
            workers=options.resolved_workers() if stream == Stream.LAST_BLOCK else 0,
            device=self.engine.device,
            unreadable=self.engine.loader.unreadable,
            share=share,
        )
        try:
            yield loader
        finally:
            loader.close()
