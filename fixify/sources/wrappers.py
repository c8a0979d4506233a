"""From what a training script saved to the state dict inside it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fixify.errors import SourceError

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
