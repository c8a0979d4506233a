"""Statistics for a standardising head that has none yet, from training images without their labels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.feature_extraction import NodePathTracer

from fixify.data import ImageLoader, OpenedData, Shard, Subset, make_loader
from fixify.data.seeding import Stream, derive_seed, permutation, seeded_torch
from fixify.errors import DataError, TrainingError, UsageError
from fixify.heads import FixedClassifier
from fixify.metrics import Precision, autocast, eval_mode
from fixify.training import distributed
from fixify.training.engine import Engine, Frozen
from fixify.training.events import Calibrated, Evaluating, LastBlockEpoch, Listener
from fixify.training.loop import training_loss
from fixify.training.optimisers import clip_gradients, make_optimiser, make_schedule
from fixify.training.options import FinetuneOptions
from fixify.training.parallel import broadcast_parameters


def uncalibrated_heads(model: nn.Module) -> list[FixedClassifier]:
    """The fixed heads whose center and spread were never set."""
    return [
        module
        for module in model.modules()
        if isinstance(module, FixedClassifier)
        and module.num_batches_tracked is not None
        and int(module.num_batches_tracked) == 0
    ]


def calibrate_heads_(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device) -> int:
    """Set center and spread of the uncalibrated heads to those of the features of every image of the loader.

    Without this the first steps of training would be spent on whatever center 0 and spread 1 happen to mean for
    the network's features.

    Args:
        model: The model, on `device`. Runs in eval mode; its modes are restored.
        loader: Batches of (images, labels), preprocessed as for evaluation.
        device: Where the model is.

    Returns:
        Images used; 0 if there was nothing to calibrate.
    """
    heads = uncalibrated_heads(model)
    if not heads:
        return 0
    seen: list[list[Tensor]] = [[] for _ in heads]

    def keep(features: list[Tensor], inputs: tuple[Tensor, ...]) -> None:
        features.append(inputs[0].detach().float().cpu())

    hooks = [
        head.register_forward_pre_hook(lambda _module, inputs, into=into: keep(into, inputs))
        for head, into in zip(heads, seen, strict=True)
    ]
    num_images = 0
    try:
        with eval_mode(model), torch.no_grad():
            for images, _ in loader:
                model(images.to(device))
                num_images += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    for head, features in zip(heads, seen, strict=True):
        if features:  # an auxiliary head is not called in eval mode; training will set its statistics
            head.calibrate_(features)
    return num_images


# Training only the last blocks on features that are computed once.
#
# A network that got other codes for its classes has to change most at its end. There a step costs a fraction of a whole
# one: the images are read and run through the rest of the network once, not every epoch.


_SHARE = 0.25  # of the weights below the classifier
_LARGEST = 2 << 30  # bytes of features


@dataclass(frozen=True)
class Divided:
    """A model in two parts that share its modules: `tail(front(images))` are its logits."""

    front: nn.Module
    tail: nn.Module


def divide(model: nn.Module, images: Tensor) -> Divided:
    """Divide a model where a single tensor passes, with the fewest layers behind that have a quarter of its weights.

    The classifier's own are not counted. For a ResNet-50 that is the last two bottlenecks, for a ViT of twelve blocks
    the last three.

    Args:
        model: Images to logits.
        images: A batch to compare the parts with the whole on.

    Raises:
        UsageError: the model cannot be divided.
    """
    tracer = NodePathTracer(leaf_modules=_leaves(model), autowrap_functions=tuple(get_notrace_functions()))
    _images, *others = inspect.signature(model.forward).parameters.values()
    with eval_mode(model), torch.no_grad():
        try:
            graph = tracer.trace(model, concrete_args={other.name: other.default for other in others})
            divided = _at_the_cut(model, graph)
            same = divided is not None and torch.allclose(divided.tail(divided.front(images)), model(images), atol=1e-4)
        except (fx.proxy.TraceError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise UsageError(
                f"The last blocks of this model cannot be trained alone: {str(error).splitlines()[0]}",
                hint="Leave out --last-block-epochs.",
            ) from error
    if divided is None or not same:
        raise UsageError(
            "The last blocks of this model cannot be trained alone: it does not divide into two parts.",
            hint="Leave out --last-block-epochs.",
        )
    return divided


def _leaves(model: nn.Module) -> list[type[nn.Module]]:
    """Modules that tracing takes as they are, so that they go on to act by their own mode (training or not)."""
    containers = {type(module) for module in model.modules() if any(True for _ in module.children())}
    leaves = {type(module) for module in model.modules()} - containers
    leaves = {leaf for leaf in leaves if not any(issubclass(container, leaf) for container in containers)}
    modal = {type(module) for module in model.modules() if isinstance(module, (FixedClassifier, _BatchNorm))}
    return [*leaves, *modal, *get_notrace_modules()]


def _at_the_cut(model: nn.Module, graph: fx.Graph) -> Divided | None:
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    weights, counted = [0] * len(nodes), set[int]()
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if not isinstance(module, FixedClassifier):
                new = [p for p in module.parameters() if id(p) not in counted]
                counted |= {id(p) for p in new}
                weights[index] = sum(p.numel() for p in new)
    wanted, behind = _SHARE * sum(weights), 0
    for index in reversed(range(len(nodes) - 1)):
        behind += weights[index + 1]
        if behind < wanted or nodes[index].op in ("placeholder", "get_attr"):
            continue
        # Stored parameters (a class token) belong to whoever uses them; all else that passes has to be this one.
        passing = {
            node
            for node in nodes[: index + 1]
            if node.op != "get_attr" and any(place[user] > index for user in node.users)
        }
        if passing == {nodes[index]}:
            return _parts(model, nodes, index)
    return None


def _parts(model: nn.Module, nodes: list[fx.Node], index: int) -> Divided:
    later = set(nodes[index + 1 :])
    stored = [node for node in nodes[: index + 1] if node.op == "get_attr" and later & set(node.users)]
    front, tail = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[: index + 1]:
        copies[node] = front.node_copy(node, lambda old: copies[old])
    front.output(copies[nodes[index]])
    behind: dict[fx.Node, fx.Node] = {nodes[index]: tail.placeholder("features")}
    for node in [*stored, *nodes[index + 1 :]]:
        behind[node] = tail.node_copy(node, lambda old: behind[old])
    parts = []
    for part in (front, tail):
        module = fx.GraphModule(model, part)
        module.graph.eliminate_dead_code()
        module.recompile()
        module.delete_all_unused_submodules()
        parts.append(module)
    return Divided(*parts)


@dataclass(frozen=True)
class Features:
    """What the front makes of images, unaugmented: inputs [n, ...], targets int64 [n], the teacher's logits or None."""

    inputs: Tensor
    targets: Tensor
    teacher_logits: Tensor | None


def most_images(divided: Divided, images: Tensor) -> int:
    """How many images' features may be kept."""
    with eval_mode(divided.front), torch.no_grad():
        one = divided.front(images[:1])
    return max(1, _LARGEST // (one.numel() * one.element_size()))


def compute(
    divided: Divided,
    loader: ImageLoader,
    teacher: Callable[[Tensor], Tensor] | None,
    *,
    device: torch.device,
    amp: Precision,
    on_batch: Callable[[int], object],
) -> Features:
    """Run the front and the teacher on every image of a loader, once; the result stays in the machine's memory."""
    inputs, targets, teacher_logits, done = list[Tensor](), list[Tensor](), list[Tensor](), 0
    with eval_mode(divided.front), torch.no_grad():
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            with autocast(device, amp):
                inputs.append(divided.front(images).float().cpu())
            targets.append(labels.cpu())
            if teacher is not None:
                teacher_logits.append(teacher(images).cpu())
            done += len(labels)
            on_batch(done)
    return Features(torch.cat(inputs), torch.cat(targets), torch.cat(teacher_logits) if teacher_logits else None)


def joined(part: Features) -> Features:
    """The features of all images, in order, of which each process has every so manieth."""
    parts = distributed.all_gather(part)
    if len(parts) == 1:
        return part

    def woven(pieces: list[Tensor]) -> Tensor:
        whole = pieces[0].new_empty(sum(map(len, pieces)), *pieces[0].shape[1:])
        for first, piece in enumerate(pieces):
            whole[first :: len(pieces)] = piece
        return whole

    teacher_logits = [each.teacher_logits for each in parts if each.teacher_logits is not None]
    return Features(
        woven([each.inputs for each in parts]),
        woven([each.targets for each in parts]),
        woven(teacher_logits) if teacher_logits else None,
    )


def train_tail(
    model: nn.Module,
    divided: Divided,
    features: Features,
    options: FinetuneOptions,
    loss_of: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    *,
    device: torch.device,
    frozen: Frozen,
    on_epoch: Callable[[int, float], object],
    on_step: Callable[[], object],
) -> None:
    """Train the tail for `options.last_block_epochs`, by the optimiser, rates and schedule of the options.

    Args:
        model: The whole model, which knows its layers.
        divided: The same; the modules of its tail are changed.
        features: See `compute`.
        options: How.
        loss_of: (logits, targets, teacher's logits) to the loss.
        device: Where the model is.
        frozen: What does not learn.
        on_epoch: Told the epoch, from 0, and its mean loss.
        on_step: Called before each step; may raise to stop.

    Raises:
        TrainingError: a loss is not finite.
    """
    epochs, count = options.last_block_epochs, len(features.targets)
    size = min(options.batch_size * distributed.world_size(), count)
    steps = count // size
    options = options.replace(
        epochs=epochs, warmup_epochs=min(options.warmup_epochs, 0.5), max_drop=None, original_top1=None
    )
    optimiser = make_optimiser(model, options, part=divided.tail)
    schedule = make_schedule(optimiser, options, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    frozen.train(divided.tail)
    for epoch in range(epochs):
        order, total = permutation(options.seed, epoch, Stream.LAST_BLOCK_ORDER, count=count), 0.0
        for step in range(steps):
            on_step()
            picked = torch.from_numpy(order[step * size : (step + 1) * size])
            inputs, targets = features.inputs[picked].to(device), features.targets[picked].to(device)
            teacher_logits = None if features.teacher_logits is None else features.teacher_logits[picked].to(device)
            with (
                seeded_torch(derive_seed(options.seed, epoch, Stream.LAST_BLOCK_DROPOUT, step), device),
                autocast(device, options.amp),
            ):
                loss = loss_of(divided.tail(inputs), targets, teacher_logits)
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if options.clip_grad is not None:
                scaler.unscale_(optimiser)
                clip_gradients(divided.tail, options)
            scaler.step(optimiser)
            scaler.update()
            schedule.step_update(epoch * steps + step + 1)
            total += float(loss.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"The loss is {total} in pass {epoch + 1} over the features of the last blocks.",
                hint="Try a lower --lr, or --clip-grad 1.",
            )
        on_epoch(epoch, total / steps)


# What may come before training the whole network: calibrating its heads, and training only its last blocks.
#
# Both look at some training images, as in validation. Neither stores anything on its way: a run that is stopped in one
# begins it anew, and exactly so. Several processes read the images for the last blocks together; the rest each does,
# and the first one's result is taken.


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
        broadcast_parameters(engine.model)
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
            self.on_event(Evaluating("features", min(images * distributed.world_size(), count), count))
            self.look_at_stop()

        with self._some_images(Stream.LAST_BLOCK, count, distributed.local_shard()) as loader:
            part = compute(divided, loader, engine.teacher, device=engine.device, amp=options.amp, on_batch=tell)
            for _ in range(len(loader) - loader.own_batches):
                self.look_at_stop()
        features = joined(part)
        train_tail(
            engine.model,
            divided,
            features,
            options,
            lambda logits, targets, teacher_logits: training_loss(logits, targets, teacher_logits, options),
            device=engine.device,
            frozen=engine.frozen,
            on_epoch=lambda epoch, loss: self.on_event(LastBlockEpoch(epoch, options.last_block_epochs, count, loss)),
            on_step=self.look_at_stop,
        )
        broadcast_parameters(engine.model)
        if engine.ema is not None:
            engine.ema.set(engine.model)

    def _watched(self, loader: ImageLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            self.look_at_stop()
            yield batch

    @contextmanager
    def _some_images(self, stream: int, count: int, shard: Shard | None = None) -> Iterator[ImageLoader]:
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
            shard=shard,
        )
        try:
            yield loader
        finally:
            loader.close()
