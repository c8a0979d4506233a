"""Read the names of a state dict in other ways: under the names that an architecture has today.

A reading renames tensors by a rule that somebody wrote down: timm's own `checkpoint_filter_fn` (Swin before timm 0.9
and of its authors, ConvNeXt, ...), torchvision's old names, a wrapper around the network, a classifier of another name.
No reading depends on the order of the tensors, so a `.pth` and a `.safetensors` file give the same result.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import timm.models
import torch
from torch import nn

from fixify.catalogue.shipped import Entry
from fixify.catalogue.signature import StateShapes, head_positions, is_counter
from fixify.errors import ArchitectureError, NoClassifierError
from fixify.models.architectures import Architecture, build
from fixify.models.built import shapes_of
from fixify.models.classifiers import find_heads, is_auxiliary
from fixify.models.openmmlab import openmmlab_names

Shape = tuple[int, ...]

# Tensors that timm's filters leave out and that change no answer: indices that follow from the architecture, and the
# token that stands for a hidden patch in pretraining.
_WITHOUT_EFFECT = re.compile(
    r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|mask_token|num_batches_tracked)$"
)
# Families whose files have other names than timm's networks, by a tensor that shows the family -> timm's modules.
_FAMILIES = {
    r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table": ("swin_transformer",),
    r"layers\.0\.blocks\.0\.attn\.cpb_mlp\.0\.weight": ("swin_transformer_v2",),
    r"downsample_layers\.0\.0\.weight": ("convnext",),
    r"blocks\.0\.(attn\.qkv\.weight|gamma_1)": ("vision_transformer", "deit", "beit"),
    r"network\.0\.0\.norm1\.weight": ("metaformer",),
}
_OLD_VIT_MLP = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}
_MOST_IN_HEAD = 24


@dataclass(frozen=True)
class Reading:
    """A state dict under other names.

    Attributes:
        key_map: Name in the state dict -> name in the architecture. Tensors that it omits have no effect on answers.
        shapes: Shapes under the new names. A shape can differ from the stored one in axes of length one.
        kwargs: Arguments of the architecture that the names show.
        notes: What was read, for the user.
        unfolded: Names in the architecture, for tensors that `fixify.models.openmmlab.patches_first` reorders.
    """

    key_map: Mapping[str, str]
    shapes: Mapping[str, Shape]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unfolded: frozenset[str] = frozenset()

    @classmethod
    def renamed(cls, shapes: Mapping[str, Shape], names: Mapping[str, str], *notes: str) -> Reading:
        """Rename the tensors in `names`, and leave out the others."""
        return cls(dict(names), {new: tuple(shapes[old]) for old, new in names.items()}, notes=notes)

    def then(self, other: Reading) -> Reading:
        """Apply another reading to the names of this one."""
        key_map = {old: other.key_map[new] for old, new in self.key_map.items() if new in other.key_map}
        unfolded = {other.key_map[key] for key in self.unfolded if key in other.key_map} | other.unfolded
        kwargs, notes = {**self.kwargs, **other.kwargs}, (*self.notes, *other.notes)
        return Reading(key_map, other.shapes, kwargs, notes, frozenset(unfolded))


def readings(shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry]) -> Iterator[Reading]:
    """Yield the ways to read the names, the plainest first.

    Args:
        shapes: Name -> shape of each tensor.
        entries: The architectures in question. Without a filter of timm's for one of them that suits the names, and
            without a network among them of which only the classifier has another name, few readings are left.
    """
    plain = Reading.renamed({key: tuple(shape) for key, shape in shapes.items()}, {key: key for key in shapes})
    others = (*_of_openmmlab(plain.shapes), *_old_names(plain.shapes), *_without_wrapper(plain.shapes))
    for base in (plain, *others, *_filtered(plain.shapes, entries)):
        if base is not plain:
            yield base
        for more in (*_without_auxiliary(base.shapes), *_pooled(base.shapes), *_other_heads(base.shapes, entries)):
            yield base.then(more)


@dataclass(frozen=True)
class HandMadeHead:
    """A network without its classifier, and tensors that are not that classifier.

    Attributes:
        architecture: The network.
        tensors: Name -> shape of the tensors that stand in place of the classifier.
        classifier: Name -> shape of what the architecture has there.
    """

    architecture: Architecture
    tensors: Mapping[str, Shape]
    classifier: Mapping[str, Shape]

    def describe(self) -> str:
        """Say what the head is, such as "fc.0, fc.3: a hand-made head of two Linears (512 -> 256 -> 2)"."""
        return describe_head(self.tensors)


def hand_made_head(shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry]) -> HandMadeHead | None:
    """Find a network whose classifier was replaced by several layers; None if it is no such file."""
    for head in _heads(shapes, entries):
        if head.place is None:
            model = build(head.entry.architecture, meta=True)
            own = {key: shape for key, shape in shapes_of(model).items() if key.startswith(tuple(head.sites(model)))}
            return HandMadeHead(head.entry.architecture, head.tensors, own)
    return None


def describe_head(tensors: Mapping[str, Sequence[int]]) -> str:
    """Describe the layers of a head from the names and shapes of its tensors."""
    linear = [(key.rpartition(".")[0], shape) for key, shape in tensors.items() if _is_linear(key, shape)]
    linear.sort(key=lambda each: _natural(each[0]))
    norms = sorted({key.rpartition(".")[0] for key in tensors} - {path for path, _ in linear}, key=_natural)
    widths = " -> ".join(str(width) for width in [*(shape[1] for _, shape in linear), *(linear[-1][1][:1])])
    count = {1: "one Linear", 2: "two Linears", 3: "three Linears"}.get(len(linear), f"{len(linear)} Linears")
    kinds = [f"{path}, {'a batch norm' if f'{path}.running_mean' in tensors else 'a norm'}" for path in norms]
    further = f" and further layers ({'; '.join(kinds)})" if norms else ""
    return f"{', '.join(path for path, _ in linear)}: a hand-made head of {count} ({widths}){further}"


def differences(arch: Architecture, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """List what is missing, extra, or of another shape, compared with an architecture; at most three of each."""
    model = build(arch, meta=True)
    try:
        sites = [f"{site.path}." for site in find_heads(model, arch)]
    except NoClassifierError:
        sites = []
    own = {key: shape for key, shape in shapes_of(model).items() if not is_counter(key)}
    theirs = {key: tuple(shapes[key]) for key in sorted(shapes, key=_natural) if not is_counter(key)}
    largest = max(theirs, key=lambda key: sum(other.startswith(key.partition(".")[0] + ".") for other in theirs))
    inside = f"{largest.partition('.')[0]}."
    stripped = {key.removeprefix(inside): shape for key, shape in theirs.items()}
    if len(stripped) == len(theirs) and len(own.keys() & stripped) > len(own.keys() & theirs):
        theirs = stripped
    missing = [f"{key} {list(own[key])}" for key in own if key not in theirs]
    extra = [f"{key} {list(theirs[key])}" for key in theirs if key not in own]
    other = [
        f"{key} {list(theirs[key])} instead of {list(shape)}"
        for key, shape in own.items()
        if key in theirs and theirs[key] != shape
        # A classifier may have any number of classes.
        if not (key.startswith(tuple(sites)) and theirs[key][1:] == shape[1:])
    ]
    return [
        f"{what}: {', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}"
        for what, found in (("missing", missing), ("extra", extra), ("of another shape", other))
        if found
    ]


def _of_openmmlab(shapes: Mapping[str, Shape]) -> Iterator[Reading]:
    """Rename the networks of mmpretrain for which there is a rule."""
    names = openmmlab_names(shapes)
    if names is not None:
        note = f"Read with the names of mmpretrain's {names.family}"
        note += ", whose downsample layers have their channels in another order." if names.unfolded else "."
        yield replace(Reading.renamed(shapes, names.key_map, note), unfolded=names.unfolded)


def _old_names(shapes: Mapping[str, Shape]) -> Iterator[Reading]:
    """Rename what torchvision's vision transformers had until version 0.13."""
    if any(old in key for key in shapes for old in _OLD_VIT_MLP):
        names = {key: key for key in shapes}
        for old, new in _OLD_VIT_MLP.items():
            names = {key: name.replace(old, new) for key, name in names.items()}
        yield Reading.renamed(shapes, names, "Read with torchvision's old names (mlp.linear_1).")


def _without_wrapper(shapes: Mapping[str, Sequence[int]]) -> Iterator[Reading]:
    """Strip a wrapper of any name that holds every tensor."""
    first = {key.partition(".")[0] for key in shapes}
    if len(first) == 1 and all("." in key for key in shapes):
        (wrapper,) = first
        names = {key: key.partition(".")[2] for key in shapes}
        yield Reading.renamed(
            {key: tuple(shape) for key, shape in shapes.items()}, names, f"Stripped {wrapper}. from the names."
        )


def _without_auxiliary(shapes: Mapping[str, Shape]) -> Iterator[Reading]:
    """Leave out torchvision's auxiliary classifiers, which a new `model.fc` leaves with another number of classes."""
    groups = sorted({key.partition(".")[0] for key in shapes if is_auxiliary(key)})
    if groups:
        yield Reading.renamed(
            shapes,
            {key: key for key in shapes if not is_auxiliary(key)},
            f"Left out the auxiliary classifiers {', '.join(groups)}: they are unused in eval mode.",
        )


def _pooled(shapes: Mapping[str, Shape]) -> Iterator[Reading]:
    """Read `fc_norm` or `norm` as what timm builds for patches that are averaged, or for a class token."""
    tops = {key.partition(".")[0] for key in shapes}
    for theirs, other, pooling in (("fc_norm", "norm", "avg"), ("norm", "fc_norm", "token")):
        if theirs in tops and other not in tops and "blocks" in tops:
            note = f"Read as global_pool={pooling}: the file has {theirs}.weight and no {other}.weight."
            same = Reading.renamed(shapes, {key: key for key in shapes}, note)
            yield replace(same, kwargs={"global_pool": pooling})


def _filtered(shapes: Mapping[str, Shape], entries: Sequence[Entry]) -> Iterator[Reading]:
    """Rename as timm does when it loads a file: with the filter of the architecture's module."""
    shown = [names for marker, names in _FAMILIES.items() if any(re.fullmatch(marker, key) for key in shapes)]
    modules = {name for names in shown for name in names}
    tried: set[str] = set()
    for entry in entries:
        arch = entry.architecture
        if arch.library != "timm" or entry.signature.keys in tried or entry.signature.num_tensors > len(shapes):
            continue
        module = timm.models.model_entrypoint(arch.name).__module__
        if len(entries) > 4 and module.rpartition(".")[2] not in modules:
            continue
        function = getattr(sys.modules[module], "checkpoint_filter_fn", None)
        if function is None:
            continue
        tried.add(entry.signature.keys)
        found = _through(function, arch, shapes)
        if found is not None and found.key_map != {key: key for key in shapes}:
            yield found


def _through(function: Callable[..., Any], arch: Architecture, shapes: Mapping[str, Shape]) -> Reading | None:
    """Pass tensors on the meta device through one of timm's filters, and see under which name each comes out.

    Returns:
        None if the filter does not take these names, makes new values, or leaves out what could change answers. A
        position embedding that it resizes is taken as it was: the image size follows from its shape.
    """
    given = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    origin = {id(tensor): key for key, tensor in given.items()}
    options = {}
    if any(".gamma_1" in key for key in shapes) and "adapt_layer_scale" in inspect.signature(function).parameters:
        options["adapt_layer_scale"] = True
    try:
        out = function(dict(given), build(arch, meta=True), **options)
    # Each filter fails in its own way on names that it was not written for.
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError, KeyError):
        return None
    key_map: dict[str, str] = {}
    new: dict[str, Shape] = {}
    for key, tensor in out.items():
        source = origin.get(id(tensor), origin.get(id(tensor._base)))
        if source is None and key in given and tensor.numel() != given[key].numel():
            source, tensor = key, given[key]
        if source is None or source in key_map:
            return None
        key_map[source], new[key] = key, tuple(tensor.shape)
    left_out = [key for key in shapes if key not in key_map and not _WITHOUT_EFFECT.search(key)]
    if left_out:
        return None
    module = function.__module__.rpartition(".")[2]
    return Reading(key_map, new, notes=(f"Names read as timm reads them (timm.models.{module}.checkpoint_filter_fn).",))


@dataclass(frozen=True)
class _Head:
    """A network without its classifier, and what else the state dict holds."""

    entry: Entry
    backbone: Mapping[str, str]
    tensors: Mapping[str, Shape]
    place: str | None

    def sites(self, model: nn.Module) -> list[str]:
        return [f"{site.path}." for site in find_heads(model, self.entry.architecture)]


def _other_heads(shapes: Mapping[str, Shape], entries: Sequence[Entry]) -> Iterator[Reading]:
    """Rename a classifier that is one linear layer under another name: `head.weight`, `fc.1.weight`."""
    seen: set[str] = set()
    for head in _heads(shapes, entries):
        if head.place is None:
            continue
        try:
            model = build(head.entry.architecture, meta=True)
            sites = find_heads(model, head.entry.architecture)
        except (ArchitectureError, NoClassifierError):
            continue
        own = {key for key in shapes_of(model) if key.startswith(f"{sites[0].path}.")}
        found = {f"{head.place}.{part}": f"{sites[0].path}.{part}" for part in ("weight", "bias")}
        theirs = {old: new for old, new in found.items() if old in shapes}
        if len(sites) != 1 or set(theirs.values()) != own or head.place in seen:
            continue
        seen.add(head.place)
        note = f"{head.place} is taken as the classifier {sites[0].path}."
        if head.place.startswith(f"{sites[0].path}.") and head.place != f"{sites[0].path}.0":
            note = (
                f"{head.place} is taken as the classifier; what stands before it in {sites[0].path} has no tensors and "
                "is taken for dropout."
            )
        yield Reading.renamed(shapes, {**head.backbone, **theirs}, note)


def _heads(shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry]) -> Iterator[_Head]:
    """Split the tensors in every likely way, and yield the splits of which one part is a network without classifier."""
    given = {key: tuple(shape) for key, shape in shapes.items()}
    for backbone, rest in _splits(given):
        state = StateShapes({new: given[old] for old, new in backbone.items()})
        linear = [key for key, shape in rest.items() if _is_linear(key, shape)]
        parts = {key for key in rest if not is_counter(key)}
        place = linear[0].rpartition(".")[0] if len(linear) == 1 else None
        if place is not None and not parts <= {f"{place}.weight", f"{place}.bias"}:
            place = None
        for entry in entries:
            signature = entry.signature
            if len(state.ordered) != signature.num_tensors - len(head_positions(signature.free)):
                continue
            if state.headless(signature.free) == signature.headless:
                yield _Head(entry, backbone, rest, place)


def _splits(shapes: Mapping[str, Shape]) -> Iterator[tuple[dict[str, str], dict[str, Shape]]]:
    """Yield (backbone names -> names in the network, tensors of the head)."""
    groups: dict[str, list[str]] = {}
    for key in shapes:
        groups.setdefault(key.partition(".")[0], []).append(key)
    largest = max(groups, key=lambda group: len(groups[group]), default="")
    outside = {key: shape for key, shape in shapes.items() if key.partition(".")[0] != largest}
    if outside and _may_be_head(outside):
        inside = [key for key in groups[largest] if "." in key]
        if len(inside) == len(groups[largest]):
            yield {key: key.partition(".")[2] for key in inside}, outside
    prefixes: dict[str, None] = {}
    for group, keys in groups.items():
        if len(keys) <= _MOST_IN_HEAD or len(groups) == 1:
            for key in keys:
                parts = key.split(".")
                prefixes |= {".".join(parts[:depth]): None for depth in range(1, min(len(parts), 4))}
            prefixes.setdefault(group)
    for prefix in prefixes:
        head = {key: shape for key, shape in shapes.items() if key.startswith(f"{prefix}.")}
        if head and len(head) < len(shapes) and _may_be_head(head):
            yield {key: key for key in shapes if key not in head}, head


def _may_be_head(tensors: Mapping[str, Shape]) -> bool:
    return len(tensors) <= _MOST_IN_HEAD and any(_is_linear(key, shape) for key, shape in tensors.items())


def _is_linear(key: str, shape: Iterable[int]) -> bool:
    shape = tuple(shape)
    return key.endswith(".weight") and (len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1)))


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in text.split(".")]
