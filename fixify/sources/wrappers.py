"""From what a training script saved to the weights of the model inside it."""

from __future__ import annotations

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

# Modules that people wrap a model in. A leading one goes when everything is below it.
_WRAPPERS = frozenset(
    {
        "module",
        "model",
        "net",
        "network",
        "backbone",
        "encoder",
        "base_model",
        "timm_model",
        "student",
        "teacher",
        "trunk",
    }
)
# Names that only torch.compile, FSDP and activation checkpointing give; they may stand anywhere in a key.
_INNER_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
_MAX_DEPTH = 3


@dataclass(frozen=True)
class StateDict:
    """The entries of one state dict as found, before cleaning."""

    entries: dict[str, object]
    used_ema: bool
    has_ema: bool


def items_of(mapping: object) -> Iterator[tuple[object, object]]:
    """The items of a dictionary that came out of a file.

    Not `mapping.items()`: the safe reader lets a file set attributes on an OrderedDict, `items` among them.
    """
    if isinstance(mapping, OrderedDict):
        return iter(OrderedDict.items(mapping))
    if isinstance(mapping, dict):
        return iter(dict.items(mapping))
    return iter(())


def find_state_dict(tree: object, name: str, *, ema: bool) -> StateDict:
    """Find the weights in what a file holds: bare, or in the checkpoint of a training script.

    Args:
        tree: What was read.
        name: Of the file, for messages.
        ema: Take the moving average rather than the weights.

    Raises:
        SourceError: there are no weights, or no moving average though asked for.
    """
    top = {key: value for key, value in items_of(tree) if isinstance(key, str)}
    average = next((top[key] for key in EMA_KEYS if _holds_tensors(top.get(key))), None)
    weights = next((top[key] for key in WEIGHTS_KEYS if _holds_tensors(top.get(key))), None)
    if weights is None and average is None:
        if ema:
            raise _no_average(name)
        if any(isinstance(value, Tensor) for value in top.values()):
            return StateDict(top, used_ema=False, has_ema=False)
        raise SourceError(f"{name} holds no weights: {_describe(tree, top)}.", hint=_where_weights_go())
    if ema and average is None:
        raise _no_average(name)
    # A file with nothing but the average holds one set of weights: there is nothing to choose.
    used_ema = ema or weights is None
    return StateDict(_innermost(average if used_ema else weights), used_ema=used_ema, has_ema=average is not None)


def clean(found: StateDict, name: str, *, file_bytes: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under the model's own key names, and the names of the entries left out.

    Raises:
        SourceError: a tensor is sparse, quantised or of a dtype no model is stored in; or names clash.
        UnsafeCheckpointError: the tensors claim many times the size of the file.
    """
    tensors = {}
    dropped = []
    for key, value in found.entries.items():
        if isinstance(value, Tensor) and key != "n_averaged":
            tensors[key] = _plain(key, value, name)
        else:
            dropped.append(key)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > 4 * file_bytes + (1 << 20):
        raise UnsafeCheckpointError(
            f"{name} was refused: its tensors claim {claimed} bytes and the file has {file_bytes}.",
            hint="They are views that repeat a few stored values; save contiguous tensors.",
        )
    stripped, outside = strip_wrappers(tensors, name)
    if not stripped:
        raise SourceError(f"{name} holds no weights.", hint=_where_weights_go())
    return stripped, (*dropped, *outside)


def strip_wrappers(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take wrapper prefixes off the names; returns the tensors and the names outside the wrapper that were left out.

    A leading wrapper goes when every name is below it, or when what is outside holds no weight matrix (the class
    weights of a loss, the counters of a metric).
    """
    names = {key: ".".join(part for part in key.split(".") if part not in _INNER_WRAPPERS) for key in tensors}
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
        raise SourceError(f"{name} holds {twice} twice, once inside a wrapper and once outside.")
    return {new: tensors[key] for key, new in names.items()}, tuple(outside)


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2


def _plain(key: str, value: Tensor, name: str) -> Tensor:
    # Unbound: the safe reader lets a file set attributes on a Parameter, `detach` among them.
    tensor = torch.Tensor.detach(value)
    if tensor.layout != torch.strided:
        raise SourceError(f"{name} stores {key} as a sparse tensor.", hint="Save it dense: tensor.to_dense().")
    if tensor.dtype not in _DTYPES:
        raise SourceError(
            f"{name} stores {key} as {tensor.dtype}; fixify reads floating point from 16 bits up, and plain integers.",
            hint="Quantised weights need the code that made them: give the checkpoint from before quantisation.",
        )
    if not tensor.is_meta and tensor.data_ptr() % tensor.element_size():
        return tensor.clone()  # mapped at an odd address: a zip archive that was packed again
    return tensor.resolve_neg()


def _holds_tensors(value: object) -> bool:
    return any(isinstance(item, Tensor) or _holds_nested(key, item) for key, item in items_of(value))


def _holds_nested(key: object, item: object) -> bool:
    return key in WEIGHTS_KEYS and any(isinstance(inner, Tensor) for _, inner in items_of(item))


def _innermost(value: object) -> dict[str, object]:
    for _ in range(_MAX_DEPTH):
        entries = {key: item for key, item in items_of(value) if isinstance(key, str)}
        if any(isinstance(item, Tensor) for item in entries.values()):
            break
        value = next(entries[key] for key in WEIGHTS_KEYS if _holds_tensors(entries.get(key)))
    return entries


def _no_average(name: str) -> SourceError:
    return SourceError(
        f"{name} holds no moving average of the weights (EMA).", hint="Leave out --ema to take the weights themselves."
    )


def _describe(tree: object, top: Mapping[str, object]) -> str:
    if not isinstance(tree, dict):
        return f"it is a {type(tree).__name__}"
    if not tree:
        return "it is an empty dictionary"
    keys = ", ".join(list(top)[:6])
    return f"a dictionary with {keys}{', ...' if len(top) > 6 else ''}" if keys else "a dictionary without names"


def _where_weights_go() -> str:
    return f"Weights may be at the top or under {', '.join(WEIGHTS_KEYS[:4])}: torch.save(model.state_dict(), ...)"
