"""Say on one line what was read from a file besides the network's weights, and what was left out."""

from __future__ import annotations

from fixify._values import counted, shorten
from fixify.checkpoints.beside import remark_on_class_lists
from fixify.checkpoints.source import Facts, Source


def choose_labels(facts: Facts, num_classes: int) -> list[str] | None:
    """Return the class names of a checkpoint: the first list with one name per class, or None.

    >>> choose_labels(Facts(label_lists={"classes": ["a"], "meta.CLASSES": ["cat", "dog"]}), 2)
    ['cat', 'dog']
    """
    lists = [*([] if facts.labels is None else [facts.labels]), *facts.label_lists.values()]
    return next((names for names in lists if len(names) == num_classes), None)


def remarks_on(source: Source, num_classes: int | None) -> tuple[str, ...]:
    """Say what was read of a checkpoint besides its weights, and what was left out: one line, or none.

    One more line names a list of class names that lies beside a checkpoint without class names.

    Args:
        source: The checkpoint.
        num_classes: Width of its logits, or None if that is unknown.
    """
    read = _labels_read(source.facts, num_classes)
    if source.facts.global_pool is not None:
        read.append(f"global_pool {source.facts.global_pool}")
    if source.used_ema:
        read.append("averaged weights (EMA)")
    left = [*_labels_left(source.facts, num_classes), *source.beside, *source.dropped]
    parts = [f"joined {' and '.join(source.joined)} to one network"] if source.joined else []
    parts += [f"read {', '.join(read)}"] if read else []
    parts += [f"applied {', '.join(source.extras.applied)}"] if source.extras.applied else []
    parts += [f"left out {shorten(left)}"] if left else []
    lines = [f"Besides the weights of {source.name}: {'; '.join(parts)}."] if parts else []
    if num_classes is not None and choose_labels(source.facts, num_classes) is None:
        remark = remark_on_class_lists(source.class_lists, num_classes)
        lines += [] if remark is None else [remark]
    return tuple(lines)


def _labels_read(facts: Facts, num_classes: int | None) -> list[str]:
    chosen = None if num_classes is None else choose_labels(facts, num_classes)
    place = next((place for place, names in facts.label_lists.items() if names == chosen), None)
    return [] if place is None else [f"class names from {place}"]


def _labels_left(facts: Facts, num_classes: int | None) -> list[str]:
    """List the places of class names that are not used because they are others, or are not understood."""
    left = [f"{place} (no list of class names)" for place in facts.unread]
    chosen = None if num_classes is None else choose_labels(facts, num_classes)
    for place, names in facts.label_lists.items():
        if num_classes is not None and names != chosen:
            how = "other class names" if len(names) == num_classes else f"{counted(len(names), 'class name')}"
            left.append(f"{place} ({how})")
    return left
