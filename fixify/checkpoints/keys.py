"""Find the state dict in what a training script saved, and reduce it to plain tensors under the model's own names."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fixify._values import counted
from fixify.checkpoints.extras import (
    INNER_WRAPPERS,
    WRAPPERS,
    Extras,
    fold_parametrizations,
    refuse_adapters,
    refuse_unknown,
    take_extras,
)
from fixify.checkpoints.outline import DTYPES, AnyTensor, Outline, dtype_name, is_tensor, unusual_dtype
from fixify.errors import SourceError, UnsafeCheckpointError
from fixify.savings import count_bytes

# Where training scripts store the weights and their moving average. The first key that is found is used.
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
    f"Weights may be at the top level or under {', '.join(WEIGHTS_KEYS[:4])}: torch.save(model.state_dict(), ...)"
)
# Where others keep weights: DeepSpeed, DINO, ... They are read if no other key holds weights.
_OTHER_WEIGHTS_KEYS = ("module",)
# A copy of the model beside it in the same state dict: torch's AveragedModel or timm's ModelEma inside another module.
_AVERAGE = re.compile(r"(?:^|_)(?:ema|swa|averaged?)(?:_|$)")
# torchvision's DenseNet had dots in the names of its submodules until PyTorch forbade them; its files still have them.
_OLD_DENSENET = re.compile(r"(\bdenselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
# What a training script may store beside the weights that changes the answers.
_SETTINGS = ("temperature", "mean", "std")
_MOST_NUMBERS = 16
_LARGEST = 1e30  # a longer number is as wrong as this one
_LONGEST_NAME = 1_000  # characters; the longest name in timm has 80
_MOST_WRAPPERS = 16  # around one another
_FEW = 8  # the tensors of a classifier, at most
_CLASSIFIERS = ("classifier", "fc", "head", "linear", "cls_head", "classification_head", "last_linear")


@dataclass(frozen=True)
class StateDict:
    """The entries of one state dict as they were saved.

    Attributes:
        entries: Name -> tensor, or whatever else was saved between the tensors.
        used_ema: Whether these are the moving average of the weights.
        has_ema: Whether the file also holds a moving average.
        beside: What else the file holds of tensors, and is not read, in words.
        settings: Tensors of a temperature and an input normalisation that are stored beside the weights.
        joined: The two keys of the file whose state dicts these are, each name below its key; None for one state dict.
    """

    entries: dict[str, object]
    used_ema: bool = False
    has_ema: bool = False
    beside: tuple[str, ...] = ()
    settings: Mapping[str, AnyTensor] = field(default_factory=dict)
    joined: tuple[str, str] | None = None


def items_of(mapping: object) -> Iterator[tuple[object, object]]:
    """Iterate over the items of a dictionary that came from a file; no items if it is not a dictionary.

    `mapping.items()` is unsafe, because torch's safe reader lets a file set attributes of an OrderedDict, such as
    `items`.

    >>> list(items_of({"a": 1})), list(items_of("not a dictionary"))
    ([('a', 1)], [])
    """
    if isinstance(mapping, OrderedDict):
        return iter(OrderedDict.items(mapping))
    if isinstance(mapping, dict):
        return iter(dict.items(mapping))
    return iter(())


def find_state_dict(tree: object, name: str, *, ema: bool = False) -> StateDict:
    """Find the weights in the content of a file: at the top level, or inside the checkpoint of a training script.

    Args:
        tree: The content of the file.
        name: The file's name, for messages.
        ema: Use the moving average instead of the weights, if it is stored under a key of its own.

    Raises:
        SourceError: there are no weights.

    >>> import torch
    >>> list(find_state_dict({"epoch": 3, "state_dict": {"fc.bias": torch.zeros(2)}}, "last.pth").entries)
    ['fc.bias']
    """
    top = {key: value for key, value in items_of(tree) if isinstance(key, str)}
    average = next((key for key in EMA_KEYS if _holds_tensors(top.get(key))), None)
    keys = (*WEIGHTS_KEYS, *_OTHER_WEIGHTS_KEYS)
    weights = next((key for key in keys if _holds_tensors(top.get(key))), None)
    if average is not None and weights is not None and _is_swapped(top):
        # OpenMMLab stores the average as state_dict, and the weights themselves as ema_state_dict.
        found = StateDict(_innermost(top[weights]), used_ema=ema, has_ema=True)
        beside = [f"{average} (the weights before averaging)"]
    elif average is not None and (ema or weights is None):
        # A file with only the moving average holds one set of weights, so `ema` need not be given.
        found = StateDict(_innermost(top[average]), used_ema=True, has_ema=True)
        beside = [] if weights is None else [f"{weights} (the weights before averaging)"]
    elif weights is not None:
        found = StateDict(_innermost(top[weights]), has_ema=average is not None)
        beside = [] if average is None else [f"{average} (averaged weights: --ema reads them)"]
    elif any(is_tensor(value) for value in top.values()):
        return StateDict(top)
    elif (parts := _two_parts(top)) is not None:
        found, weights, beside = _join(top, *parts), parts[0], []
    else:
        raise SourceError(f"{name} holds no weights: it is {_describe(tree, top)}.", hint=_where_weights_are(top, name))
    if found.joined is None and weights is not None and not found.has_ema:
        parts = _with_classifier(top, weights)
        found = found if parts is None else _join(top, *parts)
    others = {key: value for key, value in top.items() if key not in (weights, average, *(found.joined or ()))}
    return replace(
        found,
        beside=(*beside, *_beside(others, found.entries, name)),
        settings=_settings(top, name),
    )


@dataclass(frozen=True)
class Weights:
    """Tensors under the model's own names.

    Attributes:
        tensors: Name -> tensor.
        dropped: Names of the entries that were left out.
        used_ema, has_ema, beside: See `StateDict`.
        extras: What was applied of the tensors that the network itself does not have.
    """

    tensors: dict[str, AnyTensor]
    dropped: tuple[str, ...]
    used_ema: bool
    has_ema: bool
    beside: tuple[str, ...] = ()
    extras: Extras = field(default_factory=Extras)


def clean(found: StateDict, name: str, *, file_bytes: int, ema: bool = False) -> Weights:
    """Check the tensors of a state dict, select the weights or their moving average, and strip wrapper prefixes.

    Args:
        found: The entries as they were saved.
        name: The file's name, for messages.
        file_bytes: The file's size, which limits the size of the tensors.
        ema: Use the moving average.

    Raises:
        SourceError: a tensor is sparse, quantised or of a dtype that models do not use; two names clash; no tensor is
            left; the requested moving average does not exist; or the file holds tensors besides the network that may
            change its answers and cannot be applied (`fixify.checkpoints.extras`).
        UnsafeCheckpointError: the tensors claim several times the size of the file.
    """
    tensors = {}
    dropped = []
    for key, value in found.entries.items():
        if len(key) > _LONGEST_NAME:
            raise SourceError(
                f"{name} holds an entry whose name has {len(key):,} characters: {key[:40]}...",
                hint=f"Names of tensors have at most {_LONGEST_NAME:,} characters.",
            )
        if is_tensor(value) and key.rpartition(".")[2] != "n_averaged":
            tensors[key] = _plain(key, value, name)
        else:
            dropped.append(key)
    claimed = count_bytes(tensors.values())
    if claimed > 4 * file_bytes + (1 << 20):
        raise UnsafeCheckpointError(
            f"{name} was refused: its tensors claim {claimed} bytes and the file has {file_bytes}.",
            hint="They are views that repeat a few stored values. Save contiguous tensors.",
        )
    refuse_adapters(tensors, name)
    _refuse_quantised(tensors, name)
    tensors, extras = take_extras({**found.settings, **tensors}, name)
    tensors, swapped = _without_swapped(tensors)
    tensors, average = _split_average(tensors, name)
    if ema and not (found.used_ema or average):
        raise SourceError(
            f"{name} holds no moving average of the weights (EMA).",
            hint="Leave out --ema to use the weights themselves.",
        )
    take_average = ema and not found.used_ema
    chosen = average if take_average else tensors
    stripped, outside = strip_wrappers(chosen, name)
    refuse_unknown({key: chosen[key] for key in outside}, name)
    stripped, folded = fold_parametrizations(stripped, name)
    if not stripped:
        raise SourceError(f"{name} holds no weights.", hint=WHERE_WEIGHTS_GO)
    return Weights(
        tensors=stripped,
        dropped=(*dropped, *extras.left_out, *outside, *swapped),
        used_ema=found.used_ema or take_average,
        has_ema=found.has_ema or bool(average),
        beside=found.beside if not average else (*found.beside, _average_note(take_average)),
        extras=replace(extras, applied=(*extras.applied, *folded)),
    )


def strip_wrappers(tensors: Mapping[str, AnyTensor], name: str) -> tuple[dict[str, AnyTensor], tuple[str, ...]]:
    """Strip the prefixes of wrapping modules from the names.

    A leading wrapper is removed if every name is below it, or if the tensors outside it include no weight matrix (the
    class weights of a loss, the counters of a metric).

    Args:
        tensors: Name -> tensor.
        name: The file's name, for messages.

    Returns:
        The tensors under their new names, and the names outside the wrapper, which were left out.

    Raises:
        SourceError: two tensors have the same name after stripping.

    >>> import torch
    >>> tensors, outside = strip_wrappers({"module.fc.weight": torch.ones(2, 2), "module.fc.bias": torch.ones(2)}, "")
    >>> list(tensors)
    ['fc.weight', 'fc.bias']
    """
    names = {key: _current(key) for key in tensors}
    outside: list[str] = []
    for _ in range(_MOST_WRAPPERS):
        if len(names) < 2:
            break
        first = Counter(new.split(".", 1)[0] for new in names.values() if "." in new)
        # torch.nn.Sequential(Normalize(...), network): no network has all its names below a number.
        known = {part: n for part, n in first.items() if part in WRAPPERS or (part.isdigit() and n == len(names))}
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


def _holds_tensors(value: object) -> bool:
    return any(
        is_tensor(item)
        or (key in WEIGHTS_KEYS and any(is_tensor(inner) for name, inner in items_of(item) if _is_name(name)))
        for key, item in items_of(value)
        if _is_name(key)
    )


def _two_parts(top: Mapping[str, object]) -> tuple[str, str] | None:
    """Return the keys of a network without its classifier and of a classifier, if a file holds just these two."""
    sizes = {key: len(_tensors_of(value)) for key, value in top.items() if _holds_tensors(value)}
    parts = sorted(sizes, key=sizes.__getitem__, reverse=True)
    if len(parts) != 2 or sizes[parts[1]] > _FEW or sizes[parts[0]] <= _FEW:
        return None
    return (parts[0], parts[1]) if any(map(_is_matrix, _tensors_of(top[parts[1]]).values())) else None


def _with_classifier(top: Mapping[str, object], weights: str) -> tuple[str, str] | None:
    """Return the keys of the weights and of a classifier beside them, unless the weights have one of that shape."""
    if weights not in ("model", "net", "network"):
        return None
    parts = _two_parts({key: value for key, value in top.items() if key == weights or key in _CLASSIFIERS})
    if parts is None or parts[0] != weights:
        return None
    heads = [tensor.shape for tensor in _tensors_of(top[parts[1]]).values() if _is_matrix(tensor)]
    last = [tensor.shape for tensor in _tensors_of(top[weights]).values() if _is_matrix(tensor)][-1:]
    # A second classifier beside a whole network is another thing: which of the two gives the answers is not known.
    return None if len(heads) == 1 and last and last[0][1:] == heads[0][1:] and len(last[0]) == 2 else parts


def _join(top: Mapping[str, object], *parts: str) -> StateDict:
    """Put two state dicts into one, each name below the key of its part: `backbone.conv1.weight`, `head.weight`."""
    entries = {f"{part}.{key}": item for part in parts for key, item in _innermost(top[part]).items()}
    return StateDict(entries, joined=(parts[0], parts[1]))


def _tensors_of(value: object) -> dict[str, AnyTensor]:
    return {key: item for key, item in _innermost(value).items() if is_tensor(item)}


def _is_swapped(top: Mapping[str, object]) -> bool:
    """Return whether the file is one of mmengine with its EMAHook, which stores the average in place of the weights."""
    meta = {key for key, _ in items_of(top.get("meta"))}
    return "mmengine_version" in meta and _holds_tensors(top.get("ema_state_dict"))


def _beside(others: Mapping[str, object], entries: Mapping[str, object], name: str) -> list[str]:
    """List what else a file holds of tensors.

    Raises:
        SourceError: an entry looks like a classifier of its own.
    """
    names = {_last_parts(key) for key in entries}
    found = []
    for key, value in others.items():
        if is_tensor(value) and key not in _SETTINGS:
            found.append(key)
        if not _holds_tensors(value):
            continue
        tensors = {inner: item for inner, item in _innermost(value).items() if is_tensor(item)}
        if {_last_parts(inner) for inner in tensors} == names:
            how = "averaged weights, not read" if _AVERAGE.search(key) else "other weights of the same network"
            found.append(f"{key} ({how})")
        elif len(tensors) <= _FEW and any(_is_matrix(item) for item in tensors.values()):
            raise SourceError(
                f"{name} holds {key} ({', '.join(list(tensors)[:3])}) beside the network: it can be the trained "
                "classifier.",
                hint="Save both as one state dict, with the classifier under the name that the network gives it "
                f"(fc, head, ...): torch.save({{**network, **{{'fc.' + k: v for k, v in c[{key!r}].items()}}}}, "
                "'model.pth'). If it is not the classifier, save the network without it.",
            )
        else:
            found.append(f"{key} ({counted(len(tensors), 'tensor')})")
    return found


def _last_parts(key: str) -> str:
    return ".".join(key.split(".")[-2:])


def _refuse_quantised(tensors: Mapping[str, AnyTensor], name: str) -> None:
    """Refuse weight matrices of bytes: quantised ones, with or without their scales."""
    for key, tensor in tensors.items():
        if tensor.ndim >= 2 and dtype_name(tensor) in ("int8", "uint8") and key.endswith("weight"):
            raise SourceError(
                f"{name} stores {key} as {dtype_name(tensor)}: quantised weights.",
                hint="Give the checkpoint from before quantisation, or dequantise it: module.weight.dequantize()",
            )


def _settings(top: Mapping[str, object], name: str) -> dict[str, AnyTensor]:
    """Return a temperature and an input normalisation that are stored beside the weights, as tensors or numbers."""
    found = {}
    for key in _SETTINGS:
        value = top.get(key)
        if is_tensor(value):
            found[key] = _plain(key, value, name)
            continue
        given = list(value) if isinstance(value, (list, tuple)) else [value]
        numbers = [number for number in given if isinstance(number, (int, float)) and not isinstance(number, bool)]
        if 0 < len(numbers) <= _MOST_NUMBERS and len(numbers) == len(given):
            import torch

            found[key] = torch.tensor([float(max(-_LARGEST, min(_LARGEST, number))) for number in numbers])
    alone = [key for key in ("mean", "std") if key in found]
    if len(alone) == 1:
        raise SourceError(
            f"{name} holds {alone[0]} beside the weights, and no {'std' if alone == ['mean'] else 'mean'}. It may "
            "be the normalisation of the images, which changes the answers.",
            hint="Save it again with both (mean and std of the images, one number per channel), or without it.",
        )
    temperature = found.get("temperature")
    if temperature is not None and temperature.numel() != 1:
        raise SourceError(
            f"{name} holds a temperature of {temperature.numel()} numbers; fixify applies one number to all classes.",
            hint="Divide the classifier by it where the model was made: weight / temperature[:, None] and "
            "bias / temperature. Then save the network without it.",
        )
    return found


def _without_swapped(tensors: dict[str, AnyTensor]) -> tuple[dict[str, AnyTensor], list[str]]:
    """Separate the copies that mmcv's EMAHook keeps as `ema_layer1_0_weight`: the weights before averaging."""
    flat = {"ema_" + key.replace(".", "_") for key in tensors}
    swapped = [key for key in tensors if key in flat]
    return {key: tensor for key, tensor in tensors.items() if key not in flat}, swapped


def _average_note(used: bool) -> str:
    return "the weights before averaging" if used else "averaged weights (--ema reads them)"


def _where_weights_are(top: Mapping[str, object], name: str) -> str:
    """Say what to type for a file that keeps its weights at an unusual place."""
    places = [key for key, value in top.items() if _holds_tensors(value)]
    if len(places) == 1:
        return (
            f"Its tensors are under {places[0]!r}: torch.save(torch.load({name!r}, weights_only=True)[{places[0]!r}], "
            "'weights.pth')"
        )
    if places:
        return f"Its tensors are under {', '.join(map(repr, places[:4]))}: save the network alone, as one state dict."
    return WHERE_WEIGHTS_GO


def _is_name(key: object) -> bool:
    return isinstance(key, str)


def _innermost(value: object) -> dict[str, object]:
    entries = {key: item for key, item in items_of(value) if isinstance(key, str)}
    if any(is_tensor(item) for item in entries.values()):
        return entries
    return _innermost(next((entries[key] for key in WEIGHTS_KEYS if _holds_tensors(entries.get(key))), None))


def _describe(tree: object, top: Mapping[str, object]) -> str:
    if not isinstance(tree, dict):
        return f"a {type(tree).__name__}"
    if not tree:
        return "an empty dictionary"
    keys = ", ".join(list(top)[:6])
    return f"a dictionary with {keys}{', ...' if len(top) > 6 else ''}" if keys else "a dictionary without names"


def _split_average(tensors: dict[str, AnyTensor], name: str) -> tuple[dict[str, AnyTensor], dict[str, AnyTensor]]:
    """Separate the weights from their moving average, if one state dict holds both."""
    for group in sorted({key.split(".", 1)[0] for key in tensors if "." in key}):
        if not _AVERAGE.search(group):
            continue
        inside = {key[len(group) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(group + ".")}
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(group + ".")}
        if rest and _shapes(strip_wrappers(inside, name)[0]) == _shapes(strip_wrappers(rest, name)[0]):
            return rest, inside
    return tensors, {}


def _shapes(tensors: Mapping[str, AnyTensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _current(key: str) -> str:
    key = ".".join(part for part in key.split(".") if part not in INNER_WRAPPERS)
    return _OLD_DENSENET.sub(r"\1\2", key)


def _is_matrix(tensor: AnyTensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2


def _plain(key: str, value: Any, name: str) -> Any:
    if isinstance(value, Outline):  # its type was checked when it was read
        return value
    import torch

    # The safe reader also builds other classes, such as DTensor, if the calling program allows them.
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise SourceError(
            f"{name} stores {key} as a {type(value).__name__}, which needs the code that made it.",
            hint="Save plain tensors: gather shards (full_state_dict=True) and dequantise what is quantised.",
        )
    # Called on the class, because the safe reader lets a file set attributes of a Parameter, such as `detach`.
    tensor = torch.Tensor.detach(value)
    if tensor.layout != torch.strided:
        raise SourceError(f"{name} stores {key} as a sparse tensor.", hint="Save it dense: tensor.to_dense().")
    if dtype_name(tensor) not in DTYPES.values():
        raise unusual_dtype(name, key, str(tensor.dtype))
    if not tensor.is_meta and tensor.data_ptr() % tensor.element_size():
        return tensor.clone()  # mapped at an unaligned address: another tool wrote the archive or the header
    return tensor.resolve_neg()
