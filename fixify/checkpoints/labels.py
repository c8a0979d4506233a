"""Read class names: ImageNet's from timm's tables, or those in a file."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fixify._files import require_regular
from fixify._values import counted
from fixify.checkpoints.keys import items_of
from fixify.errors import SourceError

_MAX_BYTES = 64 << 20
# Where training scripts keep class names: torchvision's ImageFolder (class_to_idx, classes), transformers (id2label),
# OpenMMLab (CLASSES). The most certain first: a mapping gives the label of each name, a list may be sorted otherwise.
_MAPPINGS = ("class_to_idx", "idx_to_class", "id2label", "label2id", "class_indices", "idx2class", "class2idx")
_LISTS = ("class_names", "label_names", "CLASSES", "classes", "labels", "categories", "names")
# Dictionaries beside the weights that have such entries.
_INSIDE = (
    *("meta", "dataset_meta", "metadata", "hyper_parameters", "datamodule_hyper_parameters", "hparams", "args"),
    *("config", "cfg", "opt", "data", "dataset", "info", "extra"),
)
_MAX_CLASSES = 1 << 22
# The safe loader in C is ten times as fast, but does not come with every build of PyYAML.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MOST_YAML = 2_000_000  # characters, which PyYAML reads in about two seconds
# A line of YAML that needs no parser: "7: tench" or "- tench", where the name is no word or number of YAML's own.
_PLAIN_YAML = re.compile(r"(?:(?P<index>0|[1-9][0-9]{0,6}):|-) +(?P<name>[A-Za-z_][\w .,()/'-]*)", re.ASCII)
_YAML_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null"})
# Both take time in proportion to the length of a line, whatever is in it.
_LAST_NUMBER = re.compile(r"[\s,;:](?P<index>[0-9]{1,7})$")
_FIRST_NUMBER = re.compile(r"^(?P<index>[0-9]{1,7})[\s,;:]+(?=\S)")


def imagenet_labels(num_classes: int) -> list[str] | None:
    """Return the descriptions of ImageNet's classes in the order of the logits, from timm's tables.

    Args:
        num_classes: Selects the version of ImageNet: 1000, 11221 (21k, cleaned), 11821 (12k), or 21841, 21842 or 21843
            (22k and its variants).

    Returns:
        None if no version has that number of classes.

    >>> imagenet_labels(1000)[0]
    'tench, Tinca tinca'
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    return None if subset is None else list(ImageNetInfo(subset).label_descriptions())


def read_class_map(path: Path) -> list[str]:
    """Read class names from a file.

    The file may contain:

    - one name per line;
    - "name index" or "index name" per line, separated by spaces, a tab, a comma or a colon;
    - a list of names, in JSON or YAML (.yaml, .yml);
    - a JSON or YAML object: index -> name, index -> [..., name] (as Keras writes it), or name -> index;
    - a config.json that holds one of these as id2label, label_names, class_to_idx, ...

    Returns:
        The names in the order of their indices.

    Raises:
        SourceError: the file cannot be read, or its indices are not 0 to C-1 with each occurring once.
    """
    value = _read(path)
    if isinstance(value, list):
        return _indexed(value, _LAST_NUMBER) or _indexed(value, _FIRST_NUMBER) or value
    labels = _by_index(value)
    if labels is None and (lists := find_label_lists(value)[0]):  # a config.json with id2label or label_names
        return next(iter(lists.values()))
    if labels is None:
        raise _no_names(path)
    return labels


def read_class_indices(path: Path) -> dict[str, int]:
    """Read the index of each class from a file in one of the formats of `read_class_map`.

    Unlike there, indices may be missing (for a part of a larger label set). Several classes may share an index where
    the file maps names to indices: in JSON, in YAML, and in lines of a name, a tab and an index.

    Raises:
        SourceError: the file cannot be read, or a class has two indices.
    """
    value = _read(path)
    if isinstance(value, list):
        pairs = [line.split("\t") for line in value]
        if all(len(pair) == 2 and _is_index(pair[1].strip()) for pair in pairs):
            found = [(pair[0].strip(), int(pair[1])) for pair in pairs]
        else:
            names = _indexed(value, _LAST_NUMBER) or _indexed(value, _FIRST_NUMBER) or value
            found = [(name, index) for index, name in enumerate(names)]
    elif all(_is_index(index) and not isinstance(index, str) for index in value.values()):
        found = [(str(name), index) for name, index in value.items()]
    elif all(map(_is_index, value)) and all(isinstance(name, str) for name in value.values()):
        found = [(name, int(index)) for index, name in value.items()]
    elif lists := find_label_lists(value)[0]:
        found = [(name, index) for index, name in enumerate(next(iter(lists.values())))]
    else:
        raise _no_names(path)
    indices = dict(found)
    if len(indices) != len(found):
        name = next(name for name, index in found if indices[name] != index or found.count((name, index)) > 1)
        raise SourceError(f"{path} gives the class {name[:200]!r} two indices.")
    return indices


def _read(path: Path) -> list[str] | dict[Any, Any]:
    """Read the lines of a text file, or the list or object of a JSON or YAML file."""
    if path.suffix == ".pkl":
        raise SourceError(
            f"{path} is a pickle, which can run code when it is read.", hint="Write the class names as JSON or text."
        )
    require_regular(path, SourceError, "Give a file of class names.")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SourceError(f"{path} is too large for a list of class names.", hint="Write one name per line.")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"The class names in {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not a list of class names: it is not UTF-8 text.") from error
    if path.suffix in (".yaml", ".yml"):
        return _checked(path, _from_yaml(path, text))
    if text.lstrip().startswith(("[", "{")):
        return _checked(path, _from_json(path, text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise SourceError(f"{path} holds no class names.", hint="Write one name per line, in the order of the classes.")
    return lines


def read_labels(path: Path | str, num_classes: int) -> list[str]:
    """Return the class names for a model.

    Args:
        path: A file (see `read_class_map`), or "imagenet" for the version of ImageNet with that number of classes.
        num_classes: Number of classes of the model.

    Raises:
        SourceError: the file cannot be read, or its number of names is not `num_classes`.

    >>> read_labels("imagenet", 1000)[967]
    'espresso'
    """
    if str(path) == "imagenet":
        known = imagenet_labels(num_classes)
        if known is None:
            raise SourceError(
                f"No version of ImageNet has {counted(num_classes, 'class', 'classes')}.",
                hint="Give a file of class names.",
            )
        return known
    names = read_class_map(Path(path))
    if len(names) != num_classes:
        raise SourceError(
            f"{path} has {counted(len(names), 'class name')}; the model has {counted(num_classes, 'class', 'classes')}."
        )
    return names


def labels_of_config(names: Any, descriptions: Any) -> list[str] | None:
    """Combine timm's `label_names` and `label_descriptions` into one label per class, preferring the description.

    Args:
        names: timm's `label_names`, or transformers' `id2label`.
        descriptions: timm's `label_descriptions`: name -> description, or one description per class.

    Returns:
        None if the values do not have these forms.

    >>> labels_of_config(["n01", "n02"], {"n01": "cat"})
    ['cat', 'n02']
    """
    if isinstance(names, dict):  # transformers' id2label
        return _by_index({index: name for index, name in names.items() if isinstance(name, str)})
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        return None
    if isinstance(descriptions, dict):
        return [str(descriptions.get(name, name)) for name in names]
    if isinstance(descriptions, (list, tuple)) and len(descriptions) == len(names):
        return [str(description) for description in descriptions]
    return list(names)


def find_label_lists(tree: Mapping[str, Any]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Find the class names that a training script saved with its weights, or that the metadata of a file holds.

    Args:
        tree: The content of a checkpoint, a config.json, or the metadata of a safetensors file (values in JSON).

    Returns:
        Place -> names in class order, the most certain place first; and the places whose values are not understood.

    >>> find_label_lists({"class_to_idx": {"dog": 1, "cat": 0}, "meta": {"CLASSES": ("a", "b")}})[0]
    {'class_to_idx': ['cat', 'dog'], 'meta.CLASSES': ['a', 'b']}
    """
    found: dict[str, list[str]] = {}
    unread = []
    places = [("", tree)]
    for key in _INSIDE:
        inner = _entries(tree.get(key))
        places.append((f"{key}.", inner))
        places += [(f"{key}.{second}.", _entries(inner.get(second))) for second in _INSIDE]
    for key in (*_MAPPINGS, *_LISTS):
        for prefix, entries in places:
            if key not in entries or entries[key] is None:
                continue
            value = _from_text(entries[key])
            names = _names_of(value)
            if names is not None:
                found[prefix + key] = names
            elif key in _MAPPINGS or key in ("class_names", "CLASSES"):  # the others have other uses as well
                unread.append(prefix + key)
    return found, tuple(unread)


def _entries(value: object) -> Mapping[str, Any]:
    if isinstance(value, Namespace):
        value = vars(value)
    return {key: item for key, item in items_of(value) if isinstance(key, str)}


def _from_text(value: object) -> object:
    """Read the JSON of a safetensors file's metadata, whose values are strings."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _names_of(value: object) -> list[str] | None:
    """Return one name per class from a list, name -> index or index -> name; None for anything else."""
    if isinstance(value, (list, tuple)):
        names = list(value)
    else:
        pairs = list(items_of(value))
        if all(_is_index(name) and not isinstance(name, str) for _, name in pairs):
            pairs = [(label, name) for name, label in pairs]
        if not all(_is_index(index) for index, _ in pairs):
            return None
        by_index = {int(index): name for index, name in pairs}  # type: ignore[call-overload]
        if len(by_index) != len(pairs) or sorted(by_index) != list(range(len(pairs))):
            return None
        names = [by_index[index] for index in range(len(by_index))]
    if not 0 < len(names) <= _MAX_CLASSES:
        return None
    if any(isinstance(name, bool) or not isinstance(name, (str, int)) for name in names):
        return None
    return [str(name) for name in names]


def _indexed(lines: list[str], pattern: re.Pattern[str]) -> list[str] | None:
    matches = [pattern.search(line) for line in lines]
    by_index = {
        int(match["index"]): (line[: match.start()] + line[match.end() :]).rstrip(" ,;:\t")
        for match, line in zip(matches, lines, strict=True)
        if match and line[: match.start()].strip() + line[match.end() :]
    }
    if sorted(by_index) != list(range(len(lines))):
        return None
    # If at most half of the names are distinct, they are names that end in a number ("class 0", "class 1", ...), not
    # names and indices. A few classes may share a name, such as ImageNet's two cranes.
    if 2 * len(set(by_index.values())) <= len(lines) and len(lines) > 1:
        return None
    return [by_index[index] for index in range(len(lines))]


def _from_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"The class names in {path} are not valid JSON: {error}.") from error


def _plain_yaml(text: str) -> list[str] | dict[int, str] | None:
    """Read a list of names or index -> name, one per line, several times as fast as PyYAML; None for other YAML."""
    lines = [line.rstrip(" \r") for line in text.split("\n") if line.strip(" \r")]
    found = [_PLAIN_YAML.fullmatch(line) for line in lines]
    matches = [match for match in found if match is not None and match["name"].lower() not in _YAML_WORDS]
    if len(matches) < len(lines) or not matches:
        return None
    indices = [match["index"] for match in matches]
    names = [match["name"] for match in matches]
    if not any(indices):
        return names
    return None if not all(indices) else dict(zip(map(int, indices), names, strict=True))


def _from_yaml(path: Path, text: str) -> Any:
    plain = _plain_yaml(text)
    if plain is not None:
        return plain
    if len(text) > _MOST_YAML:
        raise SourceError(
            f"The YAML in {path} has {len(text):,} characters; at most {_MOST_YAML:,} are read unless each line is "
            '"0: name" or "- name".',
            hint="Write the class names as JSON, or one name per line in a .txt file.",
        )
    try:
        return yaml.load(text, _YAML_LOADER)  # noqa: S506, a safe loader
    # The last three are what PyYAML makes of tags whose value is of another kind: "!!bool x", "!!timestamp x".
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:500]
        raise SourceError(f"The class names in {path} are not valid YAML: {reason}.") from error


def _checked(path: Path, value: Any) -> list[str] | dict[Any, Any]:
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return value
    if isinstance(value, dict) and value:
        return {key: name[-1] if isinstance(name, list) and name else name for key, name in value.items()}
    raise _no_names(path)


def _no_names(path: Path) -> SourceError:
    return SourceError(
        f"The JSON in {path} is not a list of class names."
        if path.suffix not in (".yaml", ".yml")
        else f"The YAML in {path} is not a list of class names.",
        hint='Allowed are ["cat", "dog"], {"0": "cat", "1": "dog"} and {"cat": 0, "dog": 1}.',
    )


def _is_index(value: object) -> bool:
    if isinstance(value, str):
        return value.isascii() and value.isdigit() and len(value) < 8
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10_000_000


def _by_index(names: dict[Any, Any]) -> list[str] | None:
    if all(isinstance(index, int) and not isinstance(index, bool) for index in names.values()):
        names = {index: name for name, index in names.items()}
    try:
        by_index = {int(index): name for index, name in names.items()}
    except (TypeError, ValueError):
        return None
    if sorted(by_index) != list(range(len(names))) or not by_index:
        return None
    ordered = [by_index[index] for index in range(len(by_index))]
    return ordered if all(isinstance(name, str) for name in ordered) else None
