"""Train one epoch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fixify.data.seeding import Stream, derive_seed, seeded_torch
from fixify.errors import TrainingError, UsageError
from fixify.many_classes import deferring, only_head
from fixify.metrics import autocast
from fixify.training import distributed
from fixify.training.checkpointing import NOT_FINITE_HINT, Progress
from fixify.training.engine import Engine, head_scale
from fixify.training.events import Listener, Step, Warned
from fixify.training.interrupt import Stopped, StopRequest
from fixify.training.losses import blocked_loss, training_loss
from fixify.training.optimisers import base_rate, clip_gradients, schedule_signs
from fixify.training.parallel import local_part
from fixify.training.run_folder import is_logged

# Reading a loss makes an accelerator wait, so there losses are read in groups of this size. One that is not finite is
# noticed later, but the message names its own step.
_READ_EVERY = 20
_AUXILIARY_WEIGHT = 0.3  # Szegedy et al., "Going deeper with convolutions", section 5


class StateWriter(Protocol):
    """Writes the state of the run when it is due."""

    def state_is_due(self) -> bool:
        """Check whether the last state is old enough."""
        ...

    def write_state(self) -> None:
        """Write the state."""
        ...


def train_epoch(
    engine: Engine,
    progress: Progress,
    stop: StopRequest,
    on_event: Listener,
    validate: Callable[[], bool],
    state_writer: StateWriter,
    *,
    pause_at: int | None = None,
) -> bool:
    """Train the rest of the epoch that `progress` is in, and keep `progress` up to date.

    Args:
        engine: What is trained, on which images.
        progress: Where to start.
        stop: Checked after every update.
        on_event: Called with each step.
        validate: Called within the epoch every `options.val_every` updates, but not at its end. It adds a record to
            `progress.history` and returns whether the accuracy is high enough to stop.
        state_writer: Asked after every update whether to write the state.
        pause_at: Return after so many updates since the start of the run, unless they end the epoch.

    Returns:
        Whether the accuracy is high enough; if not, the epoch is complete, or training paused.

    Raises:
        TrainingError: a loss is not finite, and `options.nan_skip` steps were skipped before.
        UsageError: the network has batch norms that cannot be trained with batches of one image.
        Stopped: a signal asked to stop; `progress` and the weights belong together.
        DataError: too many images cannot be read.
        OutputError: the state cannot be written.
    """
    return _Epoch(engine, progress, on_event).train(stop, validate, state_writer, pause_at)


@contextlib.contextmanager
def _explaining_single_images(num_images: int) -> Iterator[None]:
    """Explain why torch refuses to train a batch norm in a forward pass: a batch of one image has no spread.

    Raises:
        UsageError: that is the case.
    """
    try:
        yield
    except ValueError as error:
        if num_images > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            "A batch norm of this network has one value per channel in a batch of one image, and cannot be trained.",
            hint="Take larger batches: --batch-size 8 (finetune), --set train.batch_size=8 (train).",
        ) from error


class _Epoch:
    def __init__(self, engine: Engine, progress: Progress, on_event: Listener) -> None:
        self.engine, self.options = engine, engine.options
        self.progress, self.on_event = progress, on_event
        self.batches = len(engine.loader)
        self.deferred = only_head(engine.model) if engine.loss_plan.blocked else None

    def train(
        self, stop: StopRequest, validate: Callable[[], bool], state_writer: StateWriter, pause_at: int | None
    ) -> bool:
        engine, progress, batches = self.engine, self.progress, self.batches
        accum = self.options.grad_accum
        engine.frozen.train(engine.model)
        engine.loader.set_epoch(progress.epoch, progress.batch)
        self._zero_gradients()
        if self._validation_is_due() and validate():  # a signal stopped the run before this validation
            return True
        pending = _PendingLosses(engine, progress, self.on_event)
        finite = 0  # batches of the current group that were not skipped
        for images, targets in engine.loader:
            # The last group of an epoch may be smaller; its mean is over its own batches.
            group_start = progress.batch - progress.batch % accum
            group_size = min(accum, batches - group_start)
            last_of_group = progress.batch == group_start + group_size - 1
            with self._accumulating(last=last_of_group):
                result = self._forward_backward(images, targets, group_size)
            progress.batch += 1
            if result is not None:
                pending.add(*result, len(images))
                finite += 1
            if last_of_group:
                # Several processes skip a group as a whole: gradients are only averaged in its last backward pass.
                self._update(apply=finite > 0 if engine.parallel is None else finite == group_size)
                finite = 0
            to_stop = last_of_group and stop.requested()
            to_log = last_of_group and is_logged(progress.updates)
            if progress.batch == batches or pending.due or to_log or to_stop:
                pending.read()
            if to_log and progress.window_images:
                progress.log_step(progress.epoch + progress.batch / batches, head_scale(engine.model))
            if to_stop:
                raise Stopped
            if last_of_group and state_writer.state_is_due():
                pending.read()  # a state must not hold weights whose loss is not finite
                state_writer.write_state()
            if last_of_group and progress.updates == pause_at and progress.batch < batches:
                pending.read()
                return False
            if last_of_group and self._validation_is_due():
                pending.read()
                if validate():
                    return True
                pending = _PendingLosses(engine, progress, self.on_event)
        return False

    def _validation_is_due(self) -> bool:
        every, progress = self.options.val_every, self.progress
        return (
            every is not None
            and progress.batch < self.batches
            and progress.updates > 0
            and progress.updates % every == 0
            and (not progress.history or progress.history[-1].step < progress.updates)
        )

    def _accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        parallel = self.engine.parallel
        return contextlib.nullcontext() if parallel is None else parallel.accumulating(last=last)

    def _forward_backward(self, images: Tensor, targets: Tensor, group_size: int) -> tuple[Tensor, Tensor] | None:
        """Return the loss and the number of right predictions, on the device; None for a skipped batch."""
        engine, options, progress = self.engine, self.options, self.progress
        images = images.to(engine.device, non_blocking=True)
        targets = targets.to(engine.device, non_blocking=True)
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        teacher_logits = None if engine.teacher is None else engine.teacher(images)
        if teacher_logits is not None and options.unlabelled:
            targets = teacher_logits.argmax(dim=-1)
        # Reading the loss before the update makes an accelerator wait, so it is done only if steps may be skipped.
        buffers = SavedBuffers(engine.model) if options.nan_skip else None
        # The seed includes the rank, so that each process draws its own dropout masks.
        seed = derive_seed(options.seed, progress.epoch, Stream.DROPOUT, progress.batch, distributed.rank())
        forward = engine.model if engine.parallel is None else engine.parallel
        with seeded_torch(seed, engine.device):
            with autocast(engine.device, options.amp), _explaining_single_images(len(images)):
                if self.deferred is not None:
                    with deferring(self.deferred):
                        features = forward(images)
                    loss, right = blocked_loss(
                        self.deferred, features, targets, options, engine.margin, shared=engine.loss_plan.shared
                    )
                else:
                    logits, auxiliary = split_outputs(forward(images))
                    loss = training_loss(logits, targets, teacher_logits, options, engine.margin)
                    for other in auxiliary:
                        loss = loss + _AUXILIARY_WEIGHT * training_loss(other, targets, teacher_logits, options)
                    labels = targets if targets.ndim == 1 else targets.argmax(dim=-1)
                    right = logits.detach().argmax(dim=-1) == labels
            if buffers is not None:
                mean = float(distributed.sum_(loss.detach().clone())) / distributed.world_size()
                if not math.isfinite(mean):
                    buffers.restore_()
                    self._skip(f"The loss is {mean}", progress.batch)
                    return None
            engine.scaler.scale(loss / group_size).backward()
        return loss.detach(), right.sum()

    def _update(self, *, apply: bool) -> None:
        """Update the weights; if not `apply`, only go on in the schedule."""
        engine, options, progress = self.engine, self.options, self.progress
        if apply and engine.parallel is not None:
            engine.parallel.before_update()
        if apply and options.clip_grad is not None:
            engine.scaler.unscale_(engine.optimiser)
            clip_gradients(engine.model, options)
        # With fp16 the gradient scaler checks the gradients itself and skips the update; that is normal operation.
        if apply and options.nan_skip and not engine.scaler.is_enabled() and not gradients_are_finite(engine.model):
            self._skip("A gradient is not finite", progress.batch - 1)
            apply = False
        progress.lr = base_rate(engine.optimiser)
        if apply:
            engine.scaler.step(engine.optimiser)
            if engine.signs is not None and options.learn_signs is not None:
                schedule_signs(engine.signs, options.learn_signs * progress.lr / options.peak_rate)
                engine.scaler.step(engine.signs)
            engine.scaler.update()
        self._zero_gradients()
        progress.updates += 1
        engine.schedule.step_update(progress.updates)
        if engine.parallel is not None:
            engine.parallel.after_update()
        if apply and engine.ema is not None:
            engine.ema.update(engine.model, step=progress.updates)

    def _zero_gradients(self) -> None:
        self.engine.optimiser.zero_grad(set_to_none=True)
        if self.engine.signs is not None:
            self.engine.signs.zero_grad(set_to_none=True)

    def _skip(self, problem: str, batch: int) -> None:
        """Warn that a step is skipped, or stop if too many were."""
        progress, allowed = self.progress, self.options.nan_skip
        if progress.skipped >= allowed:
            raise _not_finite(
                self.engine, progress, problem, batch, f"; {allowed} steps were skipped before (--nan-skip)"
            )
        progress.skipped += 1
        count = f"skipped {progress.skipped} of at most {allowed}"
        self.on_event(Warned(f"{problem} in {_place(self.engine, progress, batch)}: {count}."))


def _not_finite(engine: Engine, progress: Progress, problem: str, batch: int, more: str = "") -> TrainingError:
    return TrainingError(
        f"{problem} in {_place(engine, progress, batch)} (learning rate {progress.lr:.3g}){more}.",
        hint=f"The last saved state is kept. {NOT_FINITE_HINT} Or skip such steps: --resume --nan-skip "
        f"{max(5, 2 * engine.options.nan_skip)}",
    )


def _place(engine: Engine, progress: Progress, batch: int) -> str:
    return f"epoch {progress.epoch + 1}, batch {batch + 1} of {len(engine.loader)}"


def split_outputs(outputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Split off the logits of auxiliary classifiers, which torchvision's GoogLeNet and Inception have in training."""
    if isinstance(outputs, Tensor):
        return outputs, []
    if isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor):
        auxiliary = [output for output in outputs[1:] if output is not None]
        if all(isinstance(output, Tensor) and output.shape == outputs[0].shape for output in auxiliary):
            return outputs[0], auxiliary
    raise TrainingError(
        f"In training this model returns {type(outputs).__name__}, not logits; fixify cannot train it.",
    )


class SavedBuffers:
    """A copy of the buffers of a model that a forward pass changes: the running statistics.

    Args:
        model: The model. Buffers that are not in its state dict (tables that can be rebuilt) are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        stored = model.state_dict(keep_vars=True)
        self._kept = [(own, own.clone()) for name, own in model.named_buffers() if stored.get(name) is own]

    @torch.no_grad()
    def restore_(self) -> None:
        """Copy the saved values back into the model."""
        for own, kept in self._kept:
            own.copy_(kept)


def gradients_are_finite(model: nn.Module) -> bool:
    """Check whether all gradients are finite in all processes."""
    gradients = [local_part(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    bad = bool(gradients) and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
    return distributed.all_max(int(bad)) == (0,)


class _PendingLosses:
    """Losses that are still on the device."""

    def __init__(self, engine: Engine, progress: Progress, on_event: Listener) -> None:
        self.engine, self.progress, self.on_event = engine, progress, on_event
        self.seconds_before, self.images_before = progress.seconds, progress.images
        self.started = time.perf_counter()
        self.every = 1 if engine.device.type == "cpu" else _READ_EVERY
        self.entries: list[tuple[Tensor, Tensor, int, int]] = []

    @property
    def due(self) -> bool:
        """Whether there are enough of them to read."""
        return len(self.entries) >= self.every

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        """Add the loss of the last batch."""
        self.entries.append((loss, right, images, self.progress.batch - 1))

    def read(self) -> None:
        """Add the losses to the progress, and send a `Step` event.

        Raises:
            TrainingError: one is not finite.
        """
        if not self.entries:
            return
        progress = self.progress
        rows = torch.stack([torch.stack([loss.float(), right.float()]) for loss, right, *_ in self.entries])
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # MPS has no float64
        sizes = rows.new_tensor([[images] for *_, images, _ in self.entries])
        sums = distributed.sum_(torch.cat([rows[:, :1] * sizes, rows[:, 1:], sizes], dim=1))
        loss_before, images_before = progress.loss_sum, progress.images
        for (*_, batch), (loss, right, images) in zip(self.entries, sums.tolist(), strict=True):
            if not math.isfinite(loss):
                raise _not_finite(self.engine, progress, f"The loss is {loss / images}", batch)
            progress.loss_sum += loss
            progress.right += int(right)
            progress.images += int(images)
            progress.window_loss += loss
            progress.window_images += int(images)
        self.entries.clear()
        recent_images = progress.images - images_before
        elapsed = time.perf_counter() - self.started
        progress.seconds = self.seconds_before + elapsed
        self.on_event(
            Step(
                epoch=progress.epoch,
                batch=progress.batch,
                batches=len(self.engine.loader),
                loss=progress.loss_sum / progress.images,
                top1=100 * progress.right / progress.images,
                lr=progress.lr,
                images_per_second=(progress.images - self.images_before) / max(elapsed, 1e-9),
                scale=head_scale(self.engine.model),
                step=progress.updates,
                recent_loss=(progress.loss_sum - loss_before) / max(recent_images, 1),
                recent_images=recent_images,
            )
        )
