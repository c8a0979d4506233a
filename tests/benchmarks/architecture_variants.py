"""Choose the architectures for a round trip and build each with random weights, small enough for a workshop machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fixify.catalogue.matches import variants
from fixify.errors import ArchitectureError, NoClassifierError
from fixify.models import (
    Architecture,
    build,
    default_num_classes,
    find_classifiers,
    list_architectures,
    parse_architecture,
    preprocessing,
)

NUM_CLASSES = 37
LARGE = 150_000_000  # above this many parameters, a model is built with fewer blocks, if it takes the argument
HEAVY = {20_000_000: 224, 60_000_000: 128}  # above this many parameters, images are no larger than this, if possible
DRAWN = 30_000_000  # up to this many, the library draws the weights; above, they are copied from a pool of noise
# Arguments that leave one or two blocks per stage: of transformers, hierarchical ones, ResNets, and regnety_2560.
FEWER_BLOCKS = ({"depth": 4}, {"depths": [1, 1, 2, 1]}, {"layers": [1, 1, 1, 1]}, {"depth": 5, "wa": 1900.0})
SMALLER_IMAGES = (112, 128, 160, 192, 224, 256)
# What builders and networks raise if an argument or an image size does not suit them.
UNSUITED = (ArchitectureError, TypeError, ValueError, AssertionError, RuntimeError, IndexError, KeyError)


def wanted(only: list[str]) -> Iterator[tuple[int, Architecture]]:
    """Yield every architecture that has a classifier, with its variants and its size; small ones first.

    Architectures that have a classifier only if they are built with a number of classes come last.
    """
    found = []
    for ref in only or list_architectures():
        for arch in variants(parse_architecture(ref)):
            try:
                model = build(arch, num_classes=NUM_CLASSES, meta=True)
                find_classifiers(model, arch)
            except (NoClassifierError, *UNSUITED):
                continue
            found.append((not default_num_classes(arch), count(model), arch))
    yield from ((size, arch) for _, size, arch in sorted(found, key=lambda triple: triple[:2]))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def buildable(arch: Architecture) -> tuple[Architecture, str | None]:
    """Return the architecture as it is run here, and what was changed if it is too large."""
    size = count(build(arch, num_classes=NUM_CLASSES, meta=True))
    notes = []
    if size > LARGE:
        for extra in FEWER_BLOCKS:
            smaller = replace(arch, kwargs={**arch.kwargs, **extra})
            try:
                now = count(build(smaller, num_classes=NUM_CLASSES, meta=True))
                if now < size:
                    runs(smaller, preprocessing(smaller)["input_size"][1])
            except UNSUITED:
                continue
            if now < size:
                notes.append(f"{size / 1e6:.0f} M parameters: built with {extra}")
                arch, size = smaller, now
                break
    pixels = preprocessing(arch)["input_size"][1]
    heavy = any(size > parameters and pixels > largest for parameters, largest in HEAVY.items())
    argument = size_argument(arch)
    if heavy and argument is not None:
        for pixels in (smaller for smaller in SMALLER_IMAGES if smaller < pixels):
            smaller = replace(arch, kwargs={**arch.kwargs, argument: pixels})
            try:
                runs(smaller, pixels)
            except UNSUITED:
                continue
            notes.append(f"built for images of {pixels}")
            return smaller, "; ".join(notes)
    return arch, "; ".join(notes) or None


def runs(arch: Architecture, pixels: int) -> None:
    """Raise one of `UNSUITED` unless the network runs on an image of that size."""
    build(arch, num_classes=NUM_CLASSES, meta=True)  # an argument that does not suit fails here at no cost
    build(arch, num_classes=NUM_CLASSES, blank=True).eval()(images(arch, pixels, 0)[:1])


def size_argument(arch: Architecture) -> str | None:
    """Return the argument that sets an architecture's only image size; None if it takes any size."""
    from timm.models import get_pretrained_cfg

    if arch.library == "torchvision":
        return "image_size" if arch.name.startswith("vit_") else None
    cfg = get_pretrained_cfg(arch.name)
    return "img_size" if cfg is not None and cfg.fixed_input_size else None


def original(arch: Architecture, seed: int, gain: float | None = None) -> nn.Module:
    """Build a model with random weights, without the zeros and ones that would hide a branch.

    Args:
        arch: The architecture.
        seed: Decides the weights.
        gain: Fill all weights with noise whose std is this times 1 / sqrt(fan-in). None lets the library draw them if
            that does not take too long, and otherwise uses noise of gain 1.
    """
    small = gain is None and count(build(arch, num_classes=NUM_CLASSES, meta=True)) <= DRAWN
    torch.manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # `build` restores the generator, so each seed gives other weights
        model = build(arch, num_classes=NUM_CLASSES, blank=not small)
    pool = torch.randn(1 << 20)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or name.endswith("running_var") or value.numel() == 0:
                continue
            if isinstance(value, nn.Parameter) and not small:
                _fill(value, name, pool, gain or 1.0)
            elif value.ndim < 2 and (isinstance(value, nn.Parameter) or name.endswith("running_mean")):
                value.add_(0.1 * pool[: value.numel()].reshape(value.shape) if value.numel() < len(pool) else 0)
    return model.eval()


def _fill(value: Tensor, name: str, pool: Tensor, gain: float) -> None:
    if value.ndim < 2 or value[0].numel() == 1:  # weights of a norm, or the scale of a layer
        scale, shift = 0.1, 1.0 if name.endswith("weight") else 0.0
    else:
        scale, shift = gain * value[0].numel() ** -0.5, 0.0
    flat = value.view(-1)
    for start in range(0, len(flat), len(pool)):
        part = flat[start : start + len(pool)]
        torch.mul(pool[: len(part)], scale, out=part)
    value.add_(shift)


def images(arch: Architecture, pixels: int, seed: int) -> Tensor:
    channels = preprocessing(arch)["input_size"][0]
    return torch.randn(2, channels, pixels, pixels, generator=torch.Generator().manual_seed(seed))
