"""One epoch of training."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fixify.data.seeding import Stream, derive_seed, seeded_torch
from fixify.errors import TrainingError
from fixify.metrics import autocast
from fixify.training import distributed
from fixify.training.checkpointing import HINT, Progress
from fixify.training.engine import Engine, head_scale
from fixify.training.events import Listener, Step, Warned
from fixify.training.interrupt import Stopped, StopRequest
from fixify.training.losses import training_loss
from fixify.training.optimisers import base_rate, clip_gradients
from fixify.training.parallel import own_part
from fixify.training.run_folder import is_logged


class Buffers:
    """The buffers of a model as they are now: running statistics, which a forward pass changes.

    Args:
        model: The model. Tables that can be rebuilt (buffers that are not stored) are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        stored = model.state_dict(keep_vars=True)
        self._kept = [(own, own.clone()) for name, own in model.named_buffers() if stored.get(name) is own]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for own, kept in self._kept:
            own.copy_(kept)


def gradients_are_finite(model: nn.Module) -> bool:
    """Whether all gradients are, in all processes."""
    gradients = [own_part(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    bad = bool(gradients) and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
    return distributed.largest(int(bad)) == (0,)


# Reading a loss makes an accelerator wait, so there it is done this often; a loss that is not finite is then
# noticed a little later, but named with its own step.
_READ_EVERY = 20
_AUXILIARY_WEIGHT = 0.3  # Szegedy et al., "Going deeper with convolutions", section 5


class Keeping(Protocol):
    """Writes the state of the run now and then."""

    def state_is_due(self) -> bool: ...

    def write_state(self) -> None: ...


def train_epoch(
    engine: Engine,
    progress: Progress,
    stop: StopRequest,
    on_event: Listener,
    validate: Callable[[], bool],
    keeper: Keeping,
) -> bool:
    """Train the rest of the epoch that `progress` is in, and keep `progress` up to date.

    Args:
        engine: What is trained, on what.
        progress: Where to begin.
        stop: Looked at after every update.
        on_event: Told each step.
        validate: Called within the epoch every `options.val_every` updates, not at its end; adds a record to
            `progress.history` and says whether that is good enough to stop.
        keeper: Asked after every update whether the state is to be written.

    Returns:
        Whether it is good enough; else the epoch is complete.

    Raises:
        TrainingError: a loss is not finite, after `options.nan_skip` others.
        Stopped: a stop was requested; `progress` and the weights belong together.
        DataError: an image cannot be read.
        OutputError: the state cannot be written.
    """
    options, batches = engine.options, len(engine.loader)
    engine.frozen.train(engine.model)
    engine.loader.set_epoch(progress.epoch, progress.batch)
    engine.optimiser.zero_grad(set_to_none=True)
    if _validation_is_due(engine, progress) and validate():  # a stop request had come in its way
        return True
    pending = _Pending(engine, progress, on_event, already=progress.seconds)
    counted = 0  # batches of the group that were not skipped
    for images, targets in engine.loader:
        # The last group of an epoch may be smaller; its mean is over its own batches.
        group_start = progress.batch - progress.batch % options.grad_accum
        group_size = min(options.grad_accum, batches - group_start)
        last_of_group = progress.batch == group_start + group_size - 1
        with _together(engine, last=last_of_group):
            found = _forward_backward(engine, progress, images, targets, group_size, on_event)
        progress.batch += 1
        if found is not None:
            pending.add(*found, len(images))
            counted += 1
        if last_of_group:
            # Several processes leave out a whole group: gradients are only summed in its last backward pass.
            apply = counted > 0 if engine.parallel is None else counted == group_size
            _update(engine, progress, on_event, apply=apply)
            counted = 0
        to_stop = last_of_group and stop.requested()
        to_log = last_of_group and is_logged(progress.updates)
        if progress.batch == batches or pending.due or to_log or to_stop:
            pending.read()
        if to_log and progress.window_images:
            progress.log_step(progress.epoch + progress.batch / batches, head_scale(engine.model))
        if to_stop:
            raise Stopped
        if last_of_group and keeper.state_is_due():
            pending.read()  # a state never holds weights of a loss that is not finite
            keeper.write_state()
        if last_of_group and _validation_is_due(engine, progress):
            pending.read()
            if validate():
                return True
            pending = _Pending(engine, progress, on_event, already=progress.seconds)
    return False


def _validation_is_due(engine: Engine, progress: Progress) -> bool:
    every = engine.options.val_every
    return (
        every is not None
        and progress.batch < len(engine.loader)
        and progress.updates > 0
        and progress.updates % every == 0
        and (not progress.history or progress.history[-1].step < progress.updates)
    )


def _forward_backward(
    engine: Engine, progress: Progress, images: Tensor, targets: Tensor, group_size: int, on_event: Listener
) -> tuple[Tensor, Tensor] | None:
    """Loss and number of right answers, on the device; None for a batch that was skipped."""
    options = engine.options
    images = images.to(engine.device, non_blocking=True)
    targets = targets.to(engine.device, non_blocking=True)
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    teacher_logits = None if engine.teacher is None else engine.teacher(images)
    if teacher_logits is not None and options.unlabelled:
        targets = teacher_logits.argmax(dim=-1)
    # Losses are looked at before they do harm only if a run may go on after one: that makes an accelerator wait.
    buffers = Buffers(engine.model) if options.nan_skip else None
    # Of each process another: what is dropped of one image must not be dropped of the others' images too.
    seed = derive_seed(options.seed, progress.epoch, Stream.DROPOUT, progress.batch, distributed.rank())
    forward = engine.model if engine.parallel is None else engine.parallel
    with seeded_torch(seed, engine.device):
        with autocast(engine.device, options.amp):
            logits, auxiliary = _outputs(forward(images))
            loss = training_loss(logits, targets, teacher_logits, options)
            for other in auxiliary:
                loss = loss + _AUXILIARY_WEIGHT * training_loss(other, targets, teacher_logits, options)
        if buffers is not None:
            found = float(distributed.sum_(loss.detach().clone())) / distributed.world_size()
            if not math.isfinite(found):
                buffers.restore()
                _skip(engine, progress, f"The loss is {found}", progress.batch, on_event)
                return None
        engine.scaler.scale(loss / group_size).backward()
    labels = targets if targets.ndim == 1 else targets.argmax(dim=-1)
    return loss.detach(), (logits.detach().argmax(dim=-1) == labels).sum()


def _together(engine: Engine, *, last: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if engine.parallel is None else engine.parallel.accumulating(last=last)


def _outputs(outputs: Any) -> tuple[Tensor, list[Tensor]]:
    """The logits, and those of auxiliary classifiers (torchvision's GoogLeNet and Inception have them in training)."""
    if isinstance(outputs, Tensor):
        return outputs, []
    if isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor):
        auxiliary = [output for output in outputs[1:] if output is not None]
        if all(isinstance(output, Tensor) and output.shape == outputs[0].shape for output in auxiliary):
            return outputs[0], auxiliary
    raise TrainingError(
        f"In training this model returns {type(outputs).__name__}, not logits; fixify cannot train it.",
    )


def _update(engine: Engine, progress: Progress, on_event: Listener, *, apply: bool) -> None:
    """Make one update of the gradients, or, if not `apply`, only go on in the schedule."""
    options = engine.options
    if apply and engine.parallel is not None:
        engine.parallel.before_update()
    if apply and options.clip_grad is not None:
        engine.scaler.unscale_(engine.optimiser)
        clip_gradients(engine.model, options)
    # In half precision the scaler looks at the gradients and leaves out the update, as a matter of course.
    if apply and options.nan_skip and not engine.scaler.is_enabled() and not gradients_are_finite(engine.model):
        _skip(engine, progress, "A gradient is not finite", progress.batch - 1, on_event)
        apply = False
    progress.lr = base_rate(engine.optimiser)
    if apply:
        engine.scaler.step(engine.optimiser)
        engine.scaler.update()
    engine.optimiser.zero_grad(set_to_none=True)
    progress.updates += 1
    engine.schedule.step_update(progress.updates)
    if engine.parallel is not None:
        engine.parallel.after_update()
    if apply and engine.ema is not None:
        engine.ema.update(engine.model, step=progress.updates)


def _skip(engine: Engine, progress: Progress, what: str, batch: int, on_event: Listener) -> None:
    """Say that a step was skipped, or stop if there were too many."""
    allowed = engine.options.nan_skip
    if progress.skipped >= allowed:
        raise _not_finite(engine, progress, what, batch, f"; {allowed} steps were skipped before (--nan-skip)")
    progress.skipped += 1
    which = f"skipped {progress.skipped} of at most {allowed}"
    on_event(Warned(f"{what} in {_place(engine, progress, batch)}: {which}."))


def _not_finite(engine: Engine, progress: Progress, what: str, batch: int, more: str = "") -> TrainingError:
    return TrainingError(
        f"{what} in {_place(engine, progress, batch)} (learning rate {progress.lr:.3g}){more}.",
        hint=f"What was last saved is kept. {HINT} Or leave such steps out: --resume --nan-skip "
        f"{max(5, 2 * engine.options.nan_skip)}",
    )


def _place(engine: Engine, progress: Progress, batch: int) -> str:
    return f"epoch {progress.epoch + 1}, batch {batch + 1} of {len(engine.loader)}"


class _Pending:
    """Losses that are still on the device."""

    def __init__(self, engine: Engine, progress: Progress, on_event: Listener, *, already: float) -> None:
        self.engine = engine
        self.progress = progress
        self.on_event = on_event
        self.already = already
        self.started = time.perf_counter()
        self.first_images = progress.images
        self.every = 1 if engine.device.type == "cpu" else _READ_EVERY
        self.entries: list[tuple[Tensor, Tensor, int, int]] = []

    @property
    def due(self) -> bool:
        return len(self.entries) >= self.every

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        self.entries.append((loss, right, images, self.progress.batch - 1))

    def read(self) -> None:
        if not self.entries:
            return
        progress = self.progress
        rows = torch.stack([torch.stack([loss.float(), right.float()]) for loss, right, *_ in self.entries])
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # MPS has no float64
        sizes = rows.new_tensor([[images] for *_, images, _ in self.entries])
        sums = distributed.sum_(torch.cat([rows[:, :1] * sizes, rows[:, 1:], sizes], dim=1))
        sums_before = (progress.loss_sum, progress.images)
        for (*_, batch), (loss, right, images) in zip(self.entries, sums.tolist(), strict=True):
            if not math.isfinite(loss):
                raise _not_finite(self.engine, progress, f"The loss is {loss / images}", batch)
            progress.loss_sum += loss
            progress.right += int(right)
            progress.images += int(images)
            progress.window_loss += loss
            progress.window_images += int(images)
        self.entries.clear()
        recent_images = progress.images - sums_before[1]
        elapsed = time.perf_counter() - self.started
        progress.seconds = self.already + elapsed
        self.on_event(
            Step(
                epoch=progress.epoch,
                batch=progress.batch,
                batches=len(self.engine.loader),
                loss=progress.loss_sum / progress.images,
                top1=100 * progress.right / progress.images,
                lr=progress.lr,
                images_per_second=(progress.images - self.first_images) / max(elapsed, 1e-9),
                scale=head_scale(self.engine.model),
                step=progress.updates,
                recent_loss=(progress.loss_sum - sums_before[0]) / max(recent_images, 1),
                recent_images=recent_images,
            )
        )
