"""torch.compile, whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixify.data import ImageLoader, OpenedData, UnreadableImages, make_loader
from fixify.errors import TrainingError, UsageError
from fixify.heads import FixedClassifier
from fixify.models.classifiers import find_classifiers
from fixify.training import distributed
from fixify.training.losses import check_cosine_heads
from fixify.training.optimisers import groups_of, make_optimiser, make_schedule
from fixify.training.options import FinetuneOptions
from fixify.training.parallel import (
    Replicas,
    Shards,
    broadcast_parameters,
    check_shard,
    shard_,
    synchronize_batch_norm,
    whole_weights,
)
from fixify.training.teacher import Teacher


def compile_(model: nn.Module) -> None:
    """Compile a model in place: its type, modules and state dict stay as they are.

    Whatever changes the model's modules or hooks has to be done before. The work itself happens in the first forward
    passes, inside `compiling`.

    No sizes are left open: with them, what a training step is compiled to would depend on whether validation, whose
    last batch is smaller, came before it, and a resumed run would differ in its last bits.
    """
    model.compile(fullgraph=True, dynamic=False)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Where compiled models are run.

    Raises:
        TrainingError: one cannot be compiled; nothing runs uncompiled instead.
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
            hint="Leave out --compile. On a CPU it needs a C++ compiler (g++, or another one in $CXX).",
        ) from error


# Activation checkpointing: less memory for a second forward pass, with the same result.


def check_checkpointing(model: Any) -> None:
    """Raise `UsageError` if the model cannot do it."""
    _switch_on(model)
    model.set_grad_checkpointing(False)


def checkpoint_activations_(model: Any) -> None:
    """Have a timm model keep only the activations between its blocks, and compute the rest again in the backward pass.

    The second forward pass of a batch norm would count its batch twice in the running statistics; here it does not, so
    that a run with checkpointing validates as one without.

    Raises:
        UsageError: the model cannot do it.
    """
    _switch_on(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(partial(_track_once, momentum=module.momentum))


def _switch_on(model: Any) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # not timm's; timm's way of saying that one cannot
        raise UsageError(
            f"A {type(model).__name__} has no gradient checkpointing (timm's set_grad_checkpointing).",
            hint="Leave out --grad-checkpointing; --batch-size and --grad-accum save memory too.",
        ) from error


def _track_once(module: _BatchNorm, _inputs: Any, *, momentum: float | None) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled graph computes again only what the backward pass needs, and running statistics it does not
    # With other inputs to its kernel the second pass would save other tensors than the first, which torch refuses; so
    # it tracks with momentum 0, which changes no bit. Every pass sets the momentum anew.
    second = torch._C._current_graph_task_id() != -1
    module.momentum = 0.0 if second else momentum
    if second and module.training and module.num_batches_tracked is not None:
        module.num_batches_tracked.sub_(1)


# Leaving the first stages of a model as they are.


@dataclass(frozen=True)
class Frozen:
    """What does not learn.

    Attributes:
        stages: Names of the frozen stages, the first at the input.
        modules: The largest modules that are frozen whole; to be kept in eval mode, so that batch norms keep their
            statistics and nothing is dropped.
    """

    stages: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()

    def train(self, model: nn.Module) -> None:
        """Put the model into training mode, except for what is frozen."""
        model.train()
        for module in self.modules:
            module.eval()


def freeze_(model: nn.Module, depth: int) -> Frozen:
    """Freeze the first stages of a model: its coarse groups, of which the stem is one and the classifier the last.

    Args:
        model: Its parameters in those stages no longer require gradients.
        depth: How many stages; 0 freezes nothing.

    Raises:
        UsageError: the model does not tell its stages (see `groups_of`), or has fewer.
    """
    if depth == 0:
        return Frozen()
    stages = _stages(model)
    labels = _labels(stages)
    if depth > len(stages):
        listed = "\n".join(f"  {number} {label}" for number, label in enumerate(labels, start=1))
        raise UsageError(
            f"The model has {len(stages)} stages that can be frozen, not {depth}:\n{listed}",
            hint=f"Give --freeze a number from 0 to {len(stages)}.",
        )
    parameters = dict(model.named_parameters())
    for names in stages[:depth]:
        for name in names:
            parameters[name].requires_grad_(False)
    return Frozen(tuple(labels[:depth]), tuple(_frozen_modules(model)))


def _stages(model: nn.Module) -> list[list[str]]:
    """Names of the parameters of each stage before the classifier."""
    groups = groups_of(model, coarse=True, option="--freeze")
    heads = [path for path, module in model.named_modules() if isinstance(module, FixedClassifier)]
    heads = heads or [site.path for site in find_classifiers(model)]
    end = min(number for name, number in groups.items() if name.rpartition(".")[0] in heads)
    stages: list[list[str]] = [[] for _ in range(end)]
    for name, number in groups.items():
        if number < end:
            stages[number].append(name)
    return stages


def _frozen_modules(module: nn.Module) -> list[nn.Module]:
    """The largest modules that have parameters, none of which learn."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [found for child in module.children() for found in _frozen_modules(child)]


def _labels(stages: Sequence[Sequence[str]]) -> list[str]:
    """The shortest names that are of one stage alone: `layer1`, `blocks.3`, or `conv1, bn1`."""
    found = []
    stages = [[_module(name, stage, stages) for name in stage] for stage in stages]
    for stage in stages:
        others = [name for other in stages if other is not stage for name in other]
        deepest = max(name.count(".") for name in stage)
        for depth in range(1, deepest + 2):
            own = dict.fromkeys(_start(name, depth) for name in stage)
            if not own.keys() & {_start(name, depth) for name in others}:
                break
        found.append(", ".join(own))
    return found


def _module(name: str, stage: Sequence[str], stages: Sequence[Sequence[str]]) -> str:
    """Of the parameter; its own name if parts of that module are in another stage (`encoder.pos_embedding`)."""
    module = name.rpartition(".")[0]
    others = (other for each in stages if each is not stage for other in each)
    return name if not module or any(other.startswith(f"{module}.") for other in others) else module


def _start(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


# What one step of training needs, and how it is put together.


@dataclass
class Engine:
    """What one step of training needs.

    Attributes:
        model: What is trained.
        whole: If the model is sharded, a whole one on the CPU of the first process, to write checkpoints of.
        parallel: While training in several processes: the model, with what they do together.
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
    whole: nn.Module | None = None
    parallel: Replicas | Shards | None = None

    @property
    def evaluated(self) -> nn.Module:
        """What is measured and saved: the moving average if there is one, else the model."""
        return self.model if self.ema is None else self.ema.module

    def to_save(self) -> nn.Module:
        """What a checkpoint is written of, by the first process; all have to call this."""
        if not self.options.shard:
            return self.evaluated
        weights = whole_weights(self.model)
        if self.whole is None:
            return self.model
        self.whole.load_state_dict(weights)
        return self.whole

    def start_average(self) -> None:
        """Begin the moving average of the weights, if the options want one, with the weights as they are."""
        if self.options.ema_decay is not None:
            # An average over few steps would still be the start: the decay warms up, 1 - (1 + step)^(-2/3) at first.
            self.ema = ModelEmaV3(self.model, decay=self.options.ema_decay, use_warmup=True)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around training and its validations, once nothing changes the model's modules any more."""
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
            self.parallel = Shards(self.model, self.options)
        else:
            self.parallel = Replicas(self.model, self.options, self.device)
            if self.ema is not None:
                broadcast_parameters(self.ema.module)
        try:
            yield
        finally:
            self.parallel.close()
            self.parallel = None

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        compile_(self.model)
        if self.ema is not None:
            compile_(self.ema.module)
        with compiling():
            yield


def make_engine(model: nn.Module, train: OpenedData, preprocessing: dict[str, Any], options: FinetuneOptions) -> Engine:
    """Everything at its start, the model on its device; without average and teacher, which may depend on what happens
    before training.
    """
    device = options.resolved_device()
    if options.grad_checkpointing:
        check_checkpointing(model)
    if options.loss == "cosine":
        check_cosine_heads(model)
    if options.sync_bn and distributed.world_size() > 1:
        model = synchronize_batch_norm(model, device)
    frozen = freeze_(model, options.freeze)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    whole = None
    if options.shard:
        check_shard(options)
        whole = shard_(model, device)
    else:
        model = model.to(device)
    loader = make_loader(
        train,
        preprocessing,
        training=True,
        seed=options.seed,
        augmentation=options.augmentation(),
        batch_size=options.batch_size,
        workers=options.resolved_workers(),
        device=device,
        unreadable=UnreadableImages(len(train), options.max_unreadable),
        shard=distributed.local_shard(),
    )
    optimiser = make_optimiser(model, options)
    return Engine(
        model=model,
        optimiser=optimiser,
        schedule=make_schedule(optimiser, options, -(-len(loader) // options.grad_accum)),
        scaler=torch.amp.GradScaler(device.type, enabled=options.amp == "fp16"),
        ema=None,
        loader=loader,
        options=options,
        device=device,
        frozen=frozen,
        whole=whole,
    )


def head_scale(model: nn.Module) -> float | None:
    """The learned scale alpha of the model's (first) fixed head; None if it has none."""
    return next(
        (float(module.scale.detach()) for module in model.modules() if isinstance(module, FixedClassifier)), None
    )
