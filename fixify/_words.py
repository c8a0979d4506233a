"""Numbers with their nouns, for messages."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number with its noun.

    >>> counted(1, "class", "classes"), counted(12, "class", "classes"), counted(2, "tensor")
    ('1 class', '12 classes', '2 tensors')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
