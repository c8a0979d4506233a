"""From what a training script saved to the state dict inside it."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fixify.errors import SourceError, UnsafeCheckpointError

# Where scripts put the weights, and where their moving average; first found, first taken.
WEIGHTS_KEYS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params")
EMA_KEYS = (
    "state_dict_ema",
    "model_ema",
    "model_ema_state_dict",
    "ema_state_dict",
    "ema_model",
    "ema",
    "params_ema",
)
WHERE_WEIGHTS_GO = (
    f"Weights may be at the top or under {', '.join(WEIGHTS_KEYS[:4])}: torch.save(model.state_dict(), ...)"
)


@dataclass(frozen=True)
class StateDict:
    """The entries of one state dict as they were saved: tensors, and whatever else is between them."""

    entries: dict[str, object]
    used_ema: bool = False
    has_ema: bool = False


def items_of(mapping: object) -> Iterator[tuple[object, object]]:
    """The items of a dictionary that came out of a file; none if it is no dictionary.

    Not `mapping.items()`: the safe reader lets a file set attributes on an OrderedDict, `items` among them.
    """
    if isinstance(mapping, OrderedDict):
        return iter(OrderedDict.items(mapping))
    if isinstance(mapping, dict):
        return iter(dict.items(mapping))
    return iter(())


def find_state_dict(tree: object, name: str, *, ema: bool = False) -> StateDict:
    """Find the weights in what a file holds: bare, or in the checkpoint of a training script.

    Args:
        tree: What was read.
        name: Of the file, for messages.
        ema: Take the moving average rather than the weights, if it is there under a name of its own.

    Raises:
        SourceError: there are no weights.
    """
    top = {key: value for key, value in items_of(tree) if isinstance(key, str)}
    average = next((top[key] for key in EMA_KEYS if _holds_tensors(top.get(key))), None)
    weights = next((top[key] for key in WEIGHTS_KEYS if _holds_tensors(top.get(key))), None)
    if average is not None and (ema or weights is None):
        # A file with nothing but the average holds one set of weights: there is nothing to choose.
        return StateDict(_innermost(average), used_ema=True, has_ema=True)
    if weights is not None:
        return StateDict(_innermost(weights), has_ema=average is not None)
    if any(isinstance(value, Tensor) for value in top.values()):
        return StateDict(top)
    raise SourceError(f"{name} holds no weights: it is {_describe(tree, top)}.", hint=WHERE_WEIGHTS_GO)


def _holds_tensors(value: object) -> bool:
    return any(
        isinstance(item, Tensor)
        or (key in WEIGHTS_KEYS and any(isinstance(inner, Tensor) for _, inner in items_of(item)))
        for key, item in items_of(value)
    )


def _innermost(value: object) -> dict[str, object]:
    entries = {key: item for key, item in items_of(value) if isinstance(key, str)}
    if any(isinstance(item, Tensor) for item in entries.values()):
        return entries
    return _innermost(next((entries[key] for key in WEIGHTS_KEYS if _holds_tensors(entries.get(key))), None))


def _describe(tree: object, top: Mapping[str, object]) -> str:
    if not isinstance(tree, dict):
        return f"a {type(tree).__name__}"
    if not tree:
        return "an empty dictionary"
    keys = ", ".join(list(top)[:6])
    return f"a dictionary with {keys}{', ...' if len(top) > 6 else ''}" if keys else "a dictionary without names"


# From the entries of a state dict to plain tensors under the model's own key names.


# Modules that people wrap a model in. A leading one goes when everything is below it; no model of timm's or
# torchvision's has all its names below one of these ("encoder" would be such a name).
_WRAPPERS = frozenset({"module", "model", "net", "network", "backbone", "base_model", "timm_model", "trunk"})
# Names that only torch.compile, FSDP and activation checkpointing give; they may stand anywhere in a key.
_INNER_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# A copy of the model beside it in one state dict: torch's AveragedModel, timm's ModelEma inside another module.
_AVERAGE = re.compile(r"(?:^|_)(?:ema|swa|averaged?)(?:_|$)")
# torchvision's DenseNet had dots in the names of its submodules until PyTorch forbade them; its files still do.
_OLD_DENSENET = re.compile(r"(\bdenselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
# What weights and counters of an image model are stored in. Others (float8, packed 4 bit, complex) mean nothing
# without the scales or the code that belongs to them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Weights:
    """Tensors under the model's own names, and what was left out."""

    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]
    used_ema: bool
    has_ema: bool


def clean(found: StateDict, name: str, *, file_bytes: int, ema: bool = False) -> Weights:
    """Check the tensors of a state dict, choose between the weights and their moving average, take wrappers off.

    Args:
        found: The entries as they were saved.
        name: Of the file, for messages.
        file_bytes: Its size, against which the size of the tensors is held.
        ema: Take the moving average.

    Raises:
        SourceError: a tensor is sparse, quantised or of a dtype no model is stored in; names clash; nothing is
            left; or there is no moving average though asked for.
        UnsafeCheckpointError: the tensors claim many times the size of the file.
    """
    tensors = {}
    dropped = []
    for key, value in found.entries.items():
        if isinstance(value, Tensor) and key.rpartition(".")[2] != "n_averaged":
            tensors[key] = _plain(key, value, name)
        else:
            dropped.append(key)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > 4 * file_bytes + (1 << 20):
        raise UnsafeCheckpointError(
            f"{name} was refused: its tensors claim {claimed} bytes and the file has {file_bytes}.",
            hint="They are views that repeat a few stored values; save contiguous tensors.",
        )
    tensors, average = _split_average(tensors, name)
    if ema and not (found.used_ema or average):
        raise SourceError(
            f"{name} holds no moving average of the weights (EMA).",
            hint="Leave out --ema to take the weights themselves.",
        )
    take_average = ema and not found.used_ema
    stripped, outside = strip_wrappers(average if take_average else tensors, name)
    if not stripped:
        raise SourceError(f"{name} holds no weights.", hint=WHERE_WEIGHTS_GO)
    return Weights(
        tensors=stripped,
        dropped=(*dropped, *outside),
        used_ema=found.used_ema or take_average,
        has_ema=found.has_ema or bool(average),
    )


def strip_wrappers(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take wrapper prefixes off the names; returns the tensors, and the names outside the wrapper that were left out.

    A leading wrapper goes when every name is below it, or when what is outside holds no weight matrix (the class
    weights of a loss, the counters of a metric).
    """
    names = {key: _current(key) for key in tensors}
    outside: list[str] = []
    while len(names) > 1:
        first = Counter(new.split(".", 1)[0] for new in names.values() if "." in new)
        known = {part: count for part, count in first.items() if part in _WRAPPERS}
        if not known:
            break
        wrapper = max(known, key=known.__getitem__)
        others = [key for key, new in names.items() if not new.startswith(wrapper + ".")]
        if known[wrapper] < len(others) or any(_is_matrix(tensors[key]) for key in others):
            break
        outside += others
        names = {key: new[len(wrapper) + 1 :] for key, new in names.items() if new.startswith(wrapper + ".")}
    if len(set(names.values())) != len(names):
        twice = next(new for new, times in Counter(names.values()).items() if times > 1)
        raise SourceError(
            f"{name} holds {twice} twice, once inside a wrapper and once outside.",
            hint="Save the state dict of the model itself, not of what wraps it.",
        )
    return {new: tensors[key] for key, new in names.items()}, tuple(outside)


def _split_average(tensors: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and their moving average, where both are in one state dict under names of their own."""
    for group in sorted({key.split(".", 1)[0] for key in tensors if "." in key}):
        if not _AVERAGE.search(group):
            continue
        inside = {key[len(group) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(group + ".")}
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(group + ".")}
        if rest and _shapes(strip_wrappers(inside, name)[0]) == _shapes(strip_wrappers(rest, name)[0]):
            return rest, inside
    return tensors, {}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _current(key: str) -> str:
    key = ".".join(part for part in key.split(".") if part not in _INNER_WRAPPERS)
    return _OLD_DENSENET.sub(r"\1\2", key)


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2


def _plain(key: str, value: Tensor, name: str) -> Tensor:
    if type(value) not in (torch.Tensor, torch.nn.Parameter):  # as the program allows them: DTensor, torchao's
        raise SourceError(
            f"{name} stores {key} as a {type(value).__name__}, which needs the code that made it.",
            hint="Save plain tensors: gathered (full_state_dict=True) if they are split, dequantised if quantised.",
        )
    # Unbound: the safe reader lets a file set attributes on a Parameter, `detach` among them.
    tensor = torch.Tensor.detach(value)
    if tensor.layout != torch.strided:
        raise SourceError(f"{name} stores {key} as a sparse tensor.", hint="Save it dense: tensor.to_dense().")
    if tensor.dtype not in DTYPES.values():
        raise unusual_dtype(name, key, str(tensor.dtype))
    if not tensor.is_meta and tensor.data_ptr() % tensor.element_size():
        return tensor.clone()  # mapped at an odd address: an archive or a header that another tool wrote
    return tensor.resolve_neg()


def unusual_dtype(name: str, key: str, dtype: str) -> SourceError:
    """The refusal of a dtype that is not in `DTYPES`."""
    return SourceError(
        f"{name} stores {key} as {dtype}; fixify reads floating point of 16, 32 and 64 bits, and plain integers.",
        hint="Quantised weights need the code that made them: give the checkpoint from before quantisation.",
    )
