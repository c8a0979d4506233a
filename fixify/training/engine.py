"""What one step of training needs, and how it is put together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from fixify.data import ImageLoader, OpenedData, UnreadableImages, make_loader
from fixify.training import distributed
from fixify.training.checkpointing import check_checkpointing, checkpoint_activations_
from fixify.training.compiling import compile_, compiling
from fixify.training.cosine import check_cosine_heads
from fixify.training.distillation import Teacher
from fixify.training.freezing import Frozen, freeze_
from fixify.training.optimisation import make_optimiser, make_schedule
from fixify.training.options import FinetuneOptions
from fixify.training.replicas import Replicas, make_alike
from fixify.training.running_statistics import synchronize_batch_norm
from fixify.training.shards import Shards, check_shard, shard_, whole_weights


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
        if distributed.count() == 1:
            yield
            return
        if self.options.shard:
            self.parallel = Shards(self.model, self.options)
        else:
            self.parallel = Replicas(self.model, self.options, self.device)
            if self.ema is not None:
                make_alike(self.ema.module)
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
    if options.sync_bn and distributed.count() > 1:
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
        share=distributed.share(),
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
