"""Read what a checkpoint says about its model (architecture, classes, preprocessing), trusting none of it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fixify.checkpoints.keys import items_of
from fixify.checkpoints.labels import find_label_lists, labels_of_config
from fixify.checkpoints.source import Facts
from fixify.errors import ArchitectureError
from fixify.lookup import parse_architecture

_MAX_CHANNELS = 1 << 10
_LARGEST = 1e9  # the largest number in the arguments of an architecture or its preprocessing
_MAX_DEPTH = 4  # of nested lists in an argument


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _are_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and 0 < len(value) <= _MAX_CHANNELS and all(map(_is_number, value))


def _is_size(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_positive, value))


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _is_share(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


# How images are prepared, by the names that timm's options and its pretrained_cfg share, and the check of each value.
_DATA_OPTIONS: dict[str, Callable[[object], bool]] = {
    "input_size": _is_size,
    "mean": _are_numbers,
    "std": _are_numbers,
    "interpolation": _is_word,
    "crop_pct": _is_share,
    "crop_mode": _is_word,
}
# Dictionaries of a training checkpoint with such options, besides its arguments.
_PREPROCESSING = ("pretrained_cfg", "default_cfg", "data_config", "data_cfg", "preprocessing")


def facts_of_training(tree: object) -> Facts:
    """Extract facts from what a training script saves (timm's, torchvision's, PyTorch's ImageNet example).

    >>> facts_of_training({"arch": "resnet18", "state_dict": {}}).architecture
    'timm/resnet18'
    """
    top = {key: value for key, value in items_of(tree) if isinstance(key, str)}
    args = _arguments(top.get("args"))
    said = _said_of_classes(top, pooling=_pooling(args))
    model = args.get("model")
    arch = top.get("arch")
    name = model if isinstance(model, str) else arch if isinstance(arch, str) else None
    if name is None:
        return said
    # torchvision's reference script saves "model" and "lr_scheduler", PyTorch's example saves "best_acc1". timm saves
    # neither.
    torchvision = ("model" in top and "lr_scheduler" in top) or "best_acc1" in top
    architecture = known_architecture(f"torchvision/{name}" if torchvision else name)
    if architecture is None:
        return said  # without args, timm saves the name of the model's class here
    return replace(
        said,
        architecture=architecture,
        architecture_kwargs=_model_arguments(args, architecture),
        num_classes=_positive(args.get("num_classes")),
        pretrained_cfg=_data_options(args) or said.pretrained_cfg,
    )


def facts_of_metadata(metadata: Mapping[str, str]) -> Facts:
    """Extract facts from the metadata of a safetensors file.

    Recognises the keys that people write there (`architecture`, `num_classes`) and those of
    `fixify.checkpoints.learned.save_ordinary`.

    >>> facts_of_metadata({"architecture": "resnet18", "num_classes": "3"}).num_classes
    3
    """
    name = metadata.get("architecture") or metadata.get("arch") or metadata.get("model_name")
    architecture = known_architecture(name) if name else None
    digits = metadata.get("num_classes", "")
    labels = metadata.get("label_names")
    said = _said_of_classes({key: value for key, value in metadata.items() if key != "label_names"})
    return Facts(
        architecture=architecture,
        num_classes=_positive(int(digits)) if digits.isascii() and digits.isdigit() and len(digits) < 8 else None,
        architecture_kwargs={
            key: value
            for key, value in items_of(_json(metadata.get("model_args", "")))
            if isinstance(key, str) and _is_plain(value)
        },
        pretrained_cfg=_data_options(
            {str(key): value for key, value in items_of(_json(metadata.get("pretrained_cfg", "")))}
        ),
        labels=(_json_labels(labels) if labels else None) or said.labels,
        label_lists=said.label_lists,
        unread=said.unread,
        global_pool=_pooling(metadata),
    )


def facts_of_config(config: Mapping[str, Any]) -> Facts:
    """Extract facts from a config.json of timm (also the older flat form) or transformers (also the timm wrapper)."""
    labels = labels_of_config(config.get("label_names") or config.get("labels"), config.get("label_descriptions"))
    labels = labels or labels_of_config(config.get("id2label"), None)
    said = Facts() if labels else _said_of_classes(config)
    labels = labels or said.labels
    name = config.get("architecture")
    if not isinstance(name, str):
        num_classes = len(labels) if labels else None
        return replace(said, labels=labels, num_classes=num_classes, pretrained_cfg=None)  # a model of transformers
    nested = config.get("pretrained_cfg")
    cfg = dict(nested) if isinstance(nested, Mapping) else dict(config)
    labels = labels or labels_of_config(cfg.get("label_names"), cfg.get("label_descriptions"))
    tag = cfg.get("tag")
    architecture = (known_architecture(f"timm/{name}.{tag}") if tag else None) or known_architecture(f"timm/{name}")
    num_classes = _positive(config.get("num_classes")) or _positive(cfg.get("num_classes"))
    given = config.get("model_args")
    kwargs = {key: value for key, value in items_of(given) if isinstance(key, str) and _is_plain(value)}
    num_classes = _positive(kwargs.pop("num_classes", None)) or num_classes
    data = _data_options(cfg) or {}
    if data.get("input_size", [3])[0] != 3:
        kwargs.setdefault("in_chans", data["input_size"][0])
    return Facts(
        architecture=architecture,
        architecture_kwargs=kwargs,
        num_classes=num_classes,
        pretrained_cfg=data or None,
        labels=labels,
        label_lists=said.label_lists,
        unread=said.unread,
    )


def known_architecture(name: str) -> str | None:
    """Return `name` as `library/name` if a library has it, else None: a wrong hint is not an error.

    >>> known_architecture("resnet18"), known_architecture("no_such_network")
    ('timm/resnet18', None)
    """
    try:
        return parse_architecture(name).ref
    except ArchitectureError:
        return None


def _said_of_classes(top: Mapping[str, Any], *, pooling: str | None = None) -> Facts:
    """Return what a file says of its classes, its pooling and its images, whether or not it names an architecture."""
    found, unread = find_label_lists(top)
    nested = next((dict(items_of(top[key])) for key in _PREPROCESSING if key in top), {})
    # The mean and std beside the weights are read with the tensors (`fixify.checkpoints.keys`): they can be tensors.
    cfg = nested or {key: value for key, value in top.items() if key not in ("mean", "std")}
    return Facts(
        labels=next(iter(found.values()), None),
        label_lists=found,
        unread=unread,
        global_pool=pooling or _pooling(top),
        pretrained_cfg=_data_options({str(key): value for key, value in cfg.items()}),
    )


def _pooling(args: Mapping[str, Any]) -> str | None:
    """Return the pooling that arguments name. MAE and its relatives say `global_pool=True` for the average."""
    for key in ("global_pool", "gp"):
        value = args.get(key)
        if isinstance(value, bool):
            return "avg" if value else "token"
        if isinstance(value, str) and _is_word(value):
            return value
    return None


def _arguments(args: object) -> dict[str, Any]:
    if isinstance(args, Namespace):
        return {key: value for key, value in vars(args).items() if isinstance(key, str)}
    return {key: value for key, value in items_of(args) if isinstance(key, str)}


def _model_arguments(args: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    # The arguments that timm's train.py passes to create_model, where they differ from the defaults.
    given = items_of(args.get("model_kwargs"))
    kwargs = {key: value for key, value in given if isinstance(key, str) and _is_plain(value)}
    input_size = args["input_size"] if _is_size(args.get("input_size")) else (None, None, None)
    channels = _positive(args.get("in_chans")) or input_size[0]
    if channels is not None and channels != 3:
        kwargs["in_chans"] = channels
    size = _positive(args.get("img_size")) or input_size[1]
    if size is not None and _is_built_for_one_size(architecture):
        kwargs.setdefault("img_size", size)
    if isinstance(args.get("gp"), str):
        kwargs["global_pool"] = args["gp"]
    return kwargs


def _is_built_for_one_size(architecture: str) -> bool:
    from timm.models import get_pretrained_cfg

    library, _, name = architecture.partition("/")
    cfg = get_pretrained_cfg(name) if library == "timm" else None
    return cfg is not None and cfg.fixed_input_size


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else None


def _is_plain(value: object, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < _MAX_DEPTH and all(_is_plain(item, depth + 1) for item in value)
    return value is None or isinstance(value, (bool, str)) or _is_number(value)


def _data_options(given: Mapping[str, Any]) -> dict[str, Any] | None:
    found = {key: given[key] for key, is_value in _DATA_OPTIONS.items() if is_value(given.get(key))}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()} or None


def _json_labels(text: str) -> list[str] | None:
    return labels_of_config(_json(text), None)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
