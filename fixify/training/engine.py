"""Everything that one training step needs: the engine, compilation, and activation checkpointing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixify.data import ImageLoader, UnreadableImages, make_loader
from fixify.errors import TrainingError, UsageError
from fixify.heads import FixedClassifier
from fixify.training import distributed
from fixify.training.facts import OpenedInputs
from fixify.training.losses import HeadMargin, LossPlan, check_cosine_heads, make_margin, plan_loss
from fixify.training.optimisers import (
    Frozen,
    freeze_,
    hold_signs_,
    learn_signs_,
    make_optimiser,
    make_schedule,
    make_sign_optimiser,
    take_over_state,
)
from fixify.training.options import FinetuneOptions
from fixify.training.parallel import (
    ReplicatedModel,
    ShardedModel,
    broadcast_parameters,
    check_shard,
    gather_weights,
    shard_,
    synchronize_batch_norm,
)
from fixify.training.teacher import Teacher


@dataclass
class Engine:
    """Everything that one training step needs.

    Attributes:
        model: The model that is trained.
        optimiser, schedule, scaler: They update it.
        ema: The moving average of its weights; None without `options.ema_decay`, and before training.
        loader: Batches of training images.
        options: Options of the run.
        device: Where the model is.
        frozen: The parts of it that do not learn.
        teacher: The model to learn from; None without one, and before training.
        unsharded: On rank 0 a whole copy of a sharded model, on the CPU, to write checkpoints of.
        parallel: The model wrapped for several processes, while they train.
        loss_plan: Whether the loss is computed without logits.
        margin: Of the right class in the loss; None without `options.margin`.
        signs: Updates the signs of the heads; None without `options.learn_signs`, and while the classifier is learned.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    loader: ImageLoader
    options: FinetuneOptions
    device: torch.device
    frozen: Frozen
    teacher: Teacher | None = None
    unsharded: nn.Module | None = None
    parallel: ReplicatedModel | ShardedModel | None = None
    loss_plan: LossPlan = field(default_factory=LossPlan)
    margin: HeadMargin | None = None
    signs: torch.optim.Optimizer | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The model that is measured and saved: the moving average if there is one, else the trained model."""
        return self.model if self.ema is None else self.ema.module

    @property
    def awaits_conversion(self) -> bool:
        """Whether the classifier is still the learned one that the run converts."""
        return self.options.converts and head_scale(self.model) is None

    def model_to_save(self) -> nn.Module:
        """Return the model that rank 0 writes a checkpoint of; every process must call this."""
        if self.signs is not None:
            held = copy.deepcopy(self.model)
            hold_signs_(held)
            return held
        if not self.options.shard:
            return self.evaluated
        weights = gather_weights(self.model)
        if self.unsharded is None:
            return self.model
        self.unsharded.load_state_dict(weights)
        return self.unsharded

    def start_average(self) -> None:
        """Start the moving average at the current weights, if the options ask for one."""
        if self.options.ema_decay is not None:
            # The decay warms up as 1 - (1 + step)^(-2/3). A constant one would keep the start for many steps.
            self.ema = ModelEmaV3(self.model, decay=self.options.ema_decay, use_warmup=True)

    def fit_to_head_(self, opened: OpenedInputs, updates: int) -> None:
        """Set up anew what depends on the classifier, after it was replaced; every process must call this.

        The optimiser keeps what it knows of the other parameters. The moving average starts anew at the model.

        Args:
            opened: The images, and the teacher.
            updates: Updates so far, for the learning rate.

        Raises:
            UsageError: the options do not fit the new classifier.
        """
        options = self.options
        for module in self.model.modules():
            if isinstance(module, FixedClassifier):
                module.keeps_statistics = bool(options.freeze_bn)
        if options.learn_signs is not None:
            learn_signs_(self.model)
            self.signs = make_sign_optimiser(self.model, options.learn_signs)
        input_size = opened.preprocessing["input_size"]
        self.margin = make_margin(self.model, options, input_size=input_size, device=self.device)
        self.loss_plan = plan_loss(
            self.model, options, input_size=input_size, device=self.device, has_teacher=opened.teacher is not None
        )
        previous, self.optimiser = self.optimiser, make_optimiser(self.model, options)
        take_over_state(self.optimiser, previous)
        self.schedule = make_schedule(self.optimiser, options, self.updates_per_epoch)
        self.schedule.step_update(updates)
        if self.parallel is not None:
            self.parallel.close()
            self.parallel = None  # before the next one: both would average the gradients
            self.parallel = ReplicatedModel(self.model, options, self.device)
        self.start_average()

    @property
    def updates_per_epoch(self) -> int:
        """Updates of the weights in one epoch."""
        return updates_per_epoch(self.loader, self.options)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Wrap training and its validations; within the block only `fit_to_head_` may change the model's modules."""
        if self.options.grad_checkpointing:
            checkpoint_activations_(self.model)
        with self._parallel():
            if not self.options.compile:
                yield
                return
            with self._compiled():
                yield

    @contextlib.contextmanager
    def _parallel(self) -> Iterator[None]:
        if distributed.world_size() == 1:
            yield
            return
        if self.options.shard:
            self.parallel = ShardedModel(self.model, self.options)
        else:
            self.parallel = ReplicatedModel(self.model, self.options, self.device)
            if self.ema is not None:
                broadcast_parameters(self.ema.module)
        try:
            yield
        finally:
            if self.parallel is not None:
                self.parallel.close()
            self.parallel = None

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        compile_(self.model)
        if self.ema is not None:
            compile_(self.ema.module)
        with compiling():
            yield


def updates_per_epoch(loader: ImageLoader, options: FinetuneOptions) -> int:
    """Count the updates of the weights in one epoch."""
    return -(-len(loader) // options.grad_accum)


def make_engine(model: nn.Module, opened: OpenedInputs, options: FinetuneOptions) -> Engine:
    """Set up training, with the model on its device; without average and teacher, which start later.

    Raises:
        UsageError: the options do not fit the model or this machine.
    """
    device = options.resolved_device()
    begin = options.before_conversion()
    if options.grad_checkpointing:
        check_checkpointing(model)
    if options.loss == "cosine":
        check_cosine_heads(model)
    if options.sync_bn and distributed.world_size() > 1:
        model = synchronize_batch_norm(model, device)
    frozen = freeze_(model, options.freeze, statistics=bool(options.freeze_bn))
    if begin.learn_signs is not None:
        learn_signs_(model)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    unsharded = None
    if options.shard:
        check_shard(options)
        unsharded = shard_(model, device)
    else:
        model = model.to(device)
    input_size = opened.preprocessing["input_size"]
    margin = make_margin(model, begin, input_size=input_size, device=device)
    loader = make_loader(
        opened.train,
        opened.preprocessing,
        training=True,
        seed=options.seed,
        augmentation=options.augmentation(),
        batch_size=options.batch_size,
        workers=options.resolved_workers(),
        device=device,
        unreadable=UnreadableImages(len(opened.train), options.max_unreadable),
        shard=distributed.local_shard(),
    )
    optimiser = make_optimiser(model, options)
    loss_plan = plan_loss(
        model,
        begin,
        input_size=input_size,
        device=device,
        has_teacher=opened.teacher is not None,
    )
    return Engine(
        model=model,
        optimiser=optimiser,
        schedule=make_schedule(optimiser, options, updates_per_epoch(loader, options)),
        scaler=torch.amp.GradScaler(device.type, enabled=options.amp == "fp16"),
        ema=None,
        loader=loader,
        options=options,
        device=device,
        frozen=frozen,
        unsharded=unsharded,
        loss_plan=loss_plan,
        margin=margin,
        signs=None if begin.learn_signs is None else make_sign_optimiser(model, begin.learn_signs),
    )


def head_scale(model: nn.Module) -> float | None:
    """Return the learned scale alpha of the model's first fixed head; None if it has none."""
    return next(
        (float(module.scale.detach()) for module in model.modules() if isinstance(module, FixedClassifier)), None
    )


# torch.compile.


def compile_(model: nn.Module) -> None:
    """Compile a model in place; its type, modules and state dict stay the same.

    Modules and hooks must not change afterwards. Compilation happens in the first forward passes, inside `compiling`.

    Shapes are static. With dynamic ones, what a training step compiles to would depend on whether a validation, whose
    last batch is smaller, came before it, and a resumed run would differ in its last bits.
    """
    model.compile(fullgraph=True, dynamic=False)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Wrap the use of compiled models.

    Raises:
        TrainingError: a model cannot be compiled as a whole; it never runs uncompiled instead.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield
    except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(
            f"This model cannot be compiled here: {first}",
            hint="Leave out --compile. On a CPU it needs a C++ compiler (g++, or the one in $CXX).",
        ) from error


# Activation checkpointing: less memory for a second forward pass, with the same result.


def check_checkpointing(model: Any) -> None:
    """Check that a model supports activation checkpointing.

    Raises:
        UsageError: it does not.
    """
    _enable_checkpointing(model)
    model.set_grad_checkpointing(False)


def checkpoint_activations_(model: Any) -> None:
    """Make a timm model keep only the activations between its blocks, and recompute the others in the backward pass.

    The second forward pass of a batch norm would count its batch twice in the running statistics. It is prevented, so
    that a run with checkpointing validates like one without.

    Raises:
        UsageError: the model does not support it.
    """
    _enable_checkpointing(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(partial(_track_once, momentum=module.momentum))


def _enable_checkpointing(model: Any) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # not a timm model; a timm model that does not support it
        raise UsageError(
            f"{type(model).__name__} has no gradient checkpointing (timm's set_grad_checkpointing).",
            hint="Leave out --grad-checkpointing; --batch-size and --grad-accum save memory too.",
        ) from error


def _track_once(module: _BatchNorm, _inputs: Any, *, momentum: float | None) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled graph recomputes only what the backward pass needs, not running statistics
    # The second pass must save the same tensors as the first, or torch refuses it. So it tracks with momentum 0, which
    # changes no bit. Every pass sets the momentum anew.
    is_second_pass = torch._C._current_graph_task_id() != -1
    module.momentum = 0.0 if is_second_pass else momentum
    if is_second_pass and module.training and module.num_batches_tracked is not None:
        module.num_batches_tracked.sub_(1)
