"""Prepare a model before all of it is trained: calibrate its heads, and train its last blocks alone.

After a head swap the end of a network has to change most. Training only that part costs a fraction of a full step: the
images are read and run through the rest of the network once, not in every epoch.

Both look at some training images, preprocessed as in validation; the last blocks also learn from augmented copies of
them if the options ask for some. Neither stores anything in between: a run that stops in one of them repeats it
exactly. Several processes compute the features of the last blocks together; everything else each of them does by
itself, and rank 0's result is taken.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.feature_extraction import NodePathTracer

from fixify.data import ImageLoader, Shard, Subset, make_loader
from fixify.data.seeding import Stream, derive_seed, permutation, seeded_torch
from fixify.errors import DataError, NoClassifierError, TrainingError, UsageError
from fixify.features import record_inputs
from fixify.heads import FixedClassifier
from fixify.metrics import Precision, autocast, eval_mode
from fixify.models.classifiers import find_classifiers
from fixify.training import distributed
from fixify.training.engine import Engine
from fixify.training.events import Calibrated, Evaluating, LastBlockEpoch, Listener
from fixify.training.facts import OpenedInputs
from fixify.training.interrupt import StopRequest
from fixify.training.losses import training_loss
from fixify.training.optimisers import clip_gradients, make_optimiser, make_schedule
from fixify.training.parallel import broadcast_parameters


class Preparation:
    """The stages before training.

    Args:
        engine: What is trained.
        opened: The training images, and the preprocessing of the model.
        stop: Checked after every batch or step.
        on_event: Called with their progress.
    """

    def __init__(self, engine: Engine, opened: OpenedInputs, stop: StopRequest, on_event: Listener) -> None:
        self.engine, self.data, self.preprocessing = engine, opened.train, opened.preprocessing
        self.stop, self.on_event = stop, on_event

    def calibrate(self) -> bool:
        """Set the statistics of heads that have none yet, and return whether there were any."""
        engine = self.engine
        if not uncalibrated_heads(engine.model):
            return False
        with self.some_images(Stream.CALIBRATION, engine.options.calibration_images) as loader:
            images = calibrate_heads_(engine.model, self.stoppable(loader), device=engine.device)
        broadcast_parameters(engine.model)
        self.on_event(Calibrated(images))
        return True

    def train_last_blocks(self) -> None:
        """Train the last blocks for `options.last_block_epochs`.

        Raises:
            UsageError: the model cannot be split.
            TrainingError: a loss is not finite.
            DataError: too many images cannot be read.
            Stopped: a signal asked to stop.
        """
        engine = self.engine
        with self.some_images(Stream.LAST_BLOCK, 2) as loader:
            few = next((images for images, _ in loader), None)
        if few is None:
            raise DataError("The first images that were drawn cannot be read.", hint="See the warnings above.")
        few = few.to(engine.device)
        split = split_model(engine.model, few)
        self._train_tail(split, self._features(split, few))
        broadcast_parameters(engine.model)
        if engine.ema is not None:
            engine.ema.set(engine.model)

    def _features(self, split: SplitModel, few: Tensor) -> list[Features]:
        """Compute the features of training images, then of their augmented copies, together with the other processes.

        Args:
            split: The model.
            few: Images that show how large features are.
        """
        engine, options, copies = self.engine, self.engine.options, self.engine.options.last_block_copies
        count = min(len(self.data), max(1, max_images(split, few) // (1 + copies)))
        total, found = count * (1 + copies), list[Features]()

        def tell(images: int) -> None:
            done = count * len(found) + min(images * distributed.world_size(), count)
            self.on_event(Evaluating("features", done, total))
            self.stop.check()

        for copy in (None, *range(copies)):
            with self.some_images(Stream.LAST_BLOCK, count, distributed.local_shard(), copy) as loader:
                own = compute_features(
                    split, loader, engine.teacher, device=engine.device, amp=options.amp, on_batch=tell
                )
                for _ in range(len(loader) - loader.own_batches):
                    self.stop.check()
            found.append(gather_features(own))
        return found

    def _train_tail(self, split: SplitModel, copies: Sequence[Features]) -> None:
        """Train the tail with the optimiser, rates and schedule of the options. The copies take turns by epoch."""
        engine, options = self.engine, self.engine.options
        device, epochs, count = engine.device, options.last_block_epochs or 0, len(copies[0].targets)
        size = min(options.batch_size * distributed.world_size(), count)
        steps = count // size
        own = options.replace(
            epochs=epochs, warmup_epochs=min(options.warmup_epochs, 0.5), max_drop=None, original_top1=None
        )
        optimiser = make_optimiser(engine.model, own, part=split.tail)
        schedule = make_schedule(optimiser, own, steps)
        scaler = torch.amp.GradScaler(device.type, enabled=own.amp == "fp16")
        engine.frozen.train(split.tail)
        for epoch in range(epochs):
            order, total = permutation(own.seed, epoch, Stream.LAST_BLOCK_ORDER, count=count), 0.0
            features = copies[epoch % len(copies)]
            for step in range(steps):
                self.stop.check()
                batch = features.batch(order[step * size : (step + 1) * size].tolist(), device)
                seed = derive_seed(own.seed, epoch, Stream.LAST_BLOCK_DROPOUT, step)
                with seeded_torch(seed, device), autocast(device, own.amp):
                    logits = split.tail(batch.inputs)
                    loss = training_loss(logits, batch.targets, batch.teacher_logits, options, engine.margin)
                optimiser.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                if own.clip_grad is not None:
                    scaler.unscale_(optimiser)
                    clip_gradients(split.tail, own)
                scaler.step(optimiser)
                scaler.update()
                schedule.step_update(epoch * steps + step + 1)
                total += float(loss.detach())
            if not math.isfinite(total):
                raise TrainingError(
                    f"The loss is {total} in epoch {epoch + 1} of the last blocks.",
                    hint="Try a lower --lr, or --clip-grad 1.",
                )
            self.on_event(LastBlockEpoch(epoch, epochs, count, total / steps))

    def stoppable(self, loader: ImageLoader) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a loader; before each, a signal may stop the run."""
        for batch in loader:
            self.stop.check()
            yield batch

    @contextmanager
    def some_images(
        self, stream: int, count: int, shard: Shard | None = None, copy: int | None = None
    ) -> Iterator[ImageLoader]:
        """Open a loader of the first `count` training images in a seeded order, or of an augmented copy of them."""
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
            seed=options.seed,
            augmentation=options.augmentation(),
            copy=copy,
        )
        try:
            yield loader
        finally:
            loader.close()


# Calibrating the heads.


def uncalibrated_heads(model: nn.Module) -> dict[str, FixedClassifier]:
    """Return by path the fixed heads whose mean and std were never set."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, FixedClassifier)
        and module.num_batches_tracked is not None
        and int(module.num_batches_tracked) == 0
    }


def calibrate_heads_(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device) -> int:
    """Set mean and std of the uncalibrated heads from the features of every image of a loader.

    Otherwise the first steps of training would learn to make up for mean 0 and std 1.

    Args:
        model: The model, on `device`. It runs in eval mode, and its modes are restored.
        loader: Batches of (images, labels), preprocessed as for evaluation.
        device: Where the model is.

    Returns:
        The number of images; 0 if no head was uncalibrated.
    """
    heads = uncalibrated_heads(model)
    if not heads:
        return 0
    num_images = 0
    with record_inputs(model, heads) as seen, eval_mode(model), torch.no_grad():
        for images, _ in loader:
            model(images.to(device))
            num_images += len(images)
    for path, features in seen.items():
        if features:  # auxiliary heads are not called in eval mode; training sets their statistics
            heads[path].calibrate_(features)
    return num_images


# Splitting a model into a front, which stays, and a tail, which is trained.

_TAIL_PART = 0.25  # of the weights below the classifier


@dataclass(frozen=True)
class SplitModel:
    """A model in two parts that share its modules: `tail(front(images))` are its logits."""

    front: nn.Module
    tail: nn.Module


def split_model(model: nn.Module, images: Tensor) -> SplitModel:
    """Split a model where a single tensor passes, with the smallest tail that has a quarter of its weights.

    The classifier's own weights are not counted. The tail of a ResNet-50 is its last two bottlenecks, that of a ViT
    with twelve blocks its last three.

    Args:
        model: Images to logits.
        images: A batch on which the parts are compared with the whole.

    Raises:
        UsageError: the model cannot be split.
    """
    tracer = NodePathTracer(leaf_modules=_leaf_types(model), autowrap_functions=tuple(get_notrace_functions()))
    _images, *others = inspect.signature(model.forward).parameters.values()
    with eval_mode(model), torch.no_grad():
        try:
            graph = tracer.trace(model, concrete_args={other.name: other.default for other in others})
            split = _split_graph(model, graph)
            same = split is not None and torch.allclose(split.tail(split.front(images)), model(images), atol=1e-4)
        except (fx.proxy.TraceError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise UsageError(
                f"The last blocks of this model cannot be trained alone: {str(error).splitlines()[0]}",
                hint="Leave out --last-block-epochs.",
            ) from error
    if split is None or not same:
        raise UsageError(
            "The last blocks of this model cannot be trained alone: it cannot be split into two parts.",
            hint="Leave out --last-block-epochs.",
        )
    return split


def _leaf_types(model: nn.Module) -> list[type[nn.Module]]:
    """List the modules that tracing must keep as they are, because they behave differently in training mode."""
    containers = {type(module) for module in model.modules() if any(True for _ in module.children())}
    leaves = {type(module) for module in model.modules()} - containers
    leaves = {leaf for leaf in leaves if not any(issubclass(container, leaf) for container in containers)}
    modal = {type(module) for module in model.modules() if isinstance(module, (FixedClassifier, _BatchNorm))}
    return [*leaves, *modal, *get_notrace_modules()]


def _classifier_paths(model: nn.Module) -> set[str]:
    """Return the paths of the fixed heads; without any, those of the learned classifiers, as far as they are known."""
    fixed = {path for path, module in model.named_modules() if isinstance(module, FixedClassifier)}
    if fixed:
        return fixed
    try:
        return {site.path for site in find_classifiers(model)}
    except NoClassifierError:
        return set()  # neither timm's nor torchvision's: all weights are counted


def _split_graph(model: nn.Module, graph: fx.Graph) -> SplitModel | None:
    nodes = list(graph.nodes)
    classifiers = _classifier_paths(model)
    place = {node: index for index, node in enumerate(nodes)}
    weights, counted = [0] * len(nodes), set[int]()
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if str(node.target) not in classifiers:
                new = [p for p in module.parameters() if id(p) not in counted]
                counted |= {id(p) for p in new}
                weights[index] = sum(p.numel() for p in new)
    wanted, behind = _TAIL_PART * sum(weights), 0
    for index in reversed(range(len(nodes) - 1)):
        behind += weights[index + 1]
        if behind < wanted or nodes[index].op in ("placeholder", "get_attr"):
            continue
        # Stored parameters (a class token) belong to the part that uses them. Nothing else may pass but this node.
        passing = {
            node
            for node in nodes[: index + 1]
            if node.op != "get_attr" and any(place[user] > index for user in node.users)
        }
        if passing == {nodes[index]}:
            return _split_after(model, nodes, index)
    return None


def _split_after(model: nn.Module, nodes: list[fx.Node], index: int) -> SplitModel:
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
    return SplitModel(*parts)


# The features that the front computes once.

_MAX_BYTES = 2 << 30


@dataclass(frozen=True)
class Features:
    """The outputs of the front on images.

    Attributes:
        inputs: What the tail gets, [n, ...].
        targets: Labels, int64 [n].
        teacher_logits: Float32 [n, C]; None without a teacher.
    """

    inputs: Tensor
    targets: Tensor
    teacher_logits: Tensor | None

    def batch(self, picked: list[int], device: torch.device) -> Features:
        """Copy some of the rows to a device."""
        logits = None if self.teacher_logits is None else self.teacher_logits[picked].to(device)
        return Features(self.inputs[picked].to(device), self.targets[picked].to(device), logits)


def max_images(split: SplitModel, images: Tensor) -> int:
    """Return how many images' features fit into 2 GiB, at least 1."""
    with eval_mode(split.front), torch.no_grad():
        one = split.front(images[:1])
    return max(1, _MAX_BYTES // (one.numel() * one.element_size()))


def compute_features(
    split: SplitModel,
    loader: ImageLoader,
    teacher: Callable[[Tensor], Tensor] | None,
    *,
    device: torch.device,
    amp: Precision,
    on_batch: Callable[[int], object],
) -> Features:
    """Run the front and the teacher once on every image of a loader.

    Args:
        split: The model.
        loader: Batches of (images, labels).
        teacher: Images to logits; None without one.
        device: Where the models are.
        amp: Autocast precision.
        on_batch: Called after each batch with the number of images so far.

    Returns:
        The features, on the CPU.
    """
    inputs, targets, teacher_logits, done = list[Tensor](), list[Tensor](), list[Tensor](), 0
    with eval_mode(split.front), torch.no_grad():
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            with autocast(device, amp):
                inputs.append(split.front(images).float().cpu())
            targets.append(labels.cpu())
            if teacher is not None:
                teacher_logits.append(teacher(images).cpu())
            done += len(labels)
            on_batch(done)
    return Features(torch.cat(inputs), torch.cat(targets), torch.cat(teacher_logits) if teacher_logits else None)


def gather_features(own: Features) -> Features:
    """Gather features in data order; rank r holds every world_size-th image, starting at r."""
    parts = distributed.all_gather(own)
    if len(parts) == 1:
        return own

    def interleave(pieces: list[Tensor]) -> Tensor:
        whole = pieces[0].new_empty(sum(map(len, pieces)), *pieces[0].shape[1:])
        for first, piece in enumerate(pieces):
            whole[first :: len(pieces)] = piece
        return whole

    teacher_logits = [each.teacher_logits for each in parts if each.teacher_logits is not None]
    return Features(
        interleave([each.inputs for each in parts]),
        interleave([each.targets for each in parts]),
        interleave(teacher_logits) if teacher_logits else None,
    )
