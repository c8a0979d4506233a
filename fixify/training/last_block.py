"""Training only the last blocks on features that are computed once.

A network that got other codes for its classes has to change most at its end. There a step costs a fraction of a whole
one: the images are read and run through the rest of the network once, not every epoch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.feature_extraction import NodePathTracer

from fixify.data import ImageLoader
from fixify.data.seeding import Stream, derive_seed, permutation, seeded_torch
from fixify.errors import TrainingError, UsageError
from fixify.evaluation import Precision, autocast, eval_mode
from fixify.heads import FixedClassifier
from fixify.training import distributed
from fixify.training.freezing import Frozen
from fixify.training.optimisation import clip_gradients, make_optimiser, make_schedule
from fixify.training.options import FinetuneOptions

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
    taught: Tensor | None


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
    inputs, targets, taught, done = list[Tensor](), list[Tensor](), list[Tensor](), 0
    with eval_mode(divided.front), torch.no_grad():
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            with autocast(device, amp):
                inputs.append(divided.front(images).float().cpu())
            targets.append(labels.cpu())
            if teacher is not None:
                taught.append(teacher(images).cpu())
            done += len(labels)
            on_batch(done)
    return Features(torch.cat(inputs), torch.cat(targets), torch.cat(taught) if taught else None)


def joined(part: Features) -> Features:
    """The features of all images, in order, of which each process has every so manieth."""
    parts = distributed.gathered(part)
    if len(parts) == 1:
        return part

    def woven(pieces: list[Tensor]) -> Tensor:
        whole = pieces[0].new_empty(sum(map(len, pieces)), *pieces[0].shape[1:])
        for first, piece in enumerate(pieces):
            whole[first :: len(pieces)] = piece
        return whole

    taught = [each.taught for each in parts if each.taught is not None]
    return Features(
        woven([each.inputs for each in parts]),
        woven([each.targets for each in parts]),
        woven(taught) if taught else None,
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
    size = min(options.batch_size * distributed.count(), count)
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
            taught = None if features.taught is None else features.taught[picked].to(device)
            with (
                seeded_torch(derive_seed(options.seed, epoch, Stream.LAST_BLOCK_DROPOUT, step), device),
                autocast(device, options.amp),
            ):
                loss = loss_of(divided.tail(inputs), targets, taught)
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
