"""Read a text as numbered words: WikiText's or Penn Treebank's layout, or any folder of text files."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fixify._values import counted
from fixify.data.registry import data_roots
from fixify.errors import DataError

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
SPLITS = ("train", "val", "test")

_LAYOUTS = (
    ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),  # WikiText (Merity et al., 2016)
    ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),  # Penn Treebank (Mikolov et al., 2010)
    ("train.txt", "valid.txt", "test.txt"),
)
_NAMED = {"wikitext-2": ("wikitext-2", "wikitext-2-v1"), "wikitext-103": ("wikitext-103", "wikitext-103-v1")}
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_HELD_OUT = 0.05
"""Part of each file, from its end, that validation gets; test gets as much."""


@dataclass(frozen=True)
class Corpus:
    """A text in three parts, as word numbers.

    Attributes:
        words: The vocabulary: every word of the training text, the most frequent first.
        counts: How often each word occurs in the training text, int64 [C].
        train, val, test: Word numbers, int64 [number of words].
        description: Description for a person.
        digest: SHA-256 of the vocabulary and the three parts, 64 hexadecimal digits.
    """

    words: tuple[str, ...]
    counts: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    description: str
    digest: str


def read_corpus(name: str, *, min_count: int = 1, lowercase: bool = False) -> Corpus:
    """Read a text by name.

    In WikiText's and Penn Treebank's layout, words are separated by blanks and every line ends with `<eos>`, as in the
    papers that report results on them. In any other folder, every `*.txt` file is cut into words and punctuation marks,
    and the end of each file is held out: 5 % of its lines for validation, then 5 % for test.

    Args:
        name: A folder, here or in $FIXIFY_DATA; or "wikitext-2" or "wikitext-103", searched there and in ./data.
        min_count: Words that occur less often in the training text become `<unk>`.
        lowercase: Convert all words to lower case; `<unk>` stays.

    Raises:
        DataError: there is no such folder, it has no text, a part is empty, or validation or test has words that
            training lacks and training has no `<unk>`.
    """
    folder = _find(name)
    files, tokenised = _files(folder)
    parts = {split: list(_words(text, tokenised, lowercase)) for split, text in _texts(files, tokenised).items()}
    if empty := [split for split in SPLITS if not parts[split]]:
        raise DataError(
            f"{folder} has no text for {' and '.join(empty)}.",
            hint=f"Give it {', '.join(_LAYOUTS[0])}, or longer *.txt files.",
        )
    words, counts = _vocabulary(parts["train"], min_count)
    number = {word: index for index, word in enumerate(words)}
    encoded = {split: _encode(parts[split], number, folder, split) for split in SPLITS}
    digest = hashlib.sha256("\n".join(words).encode())
    for split in SPLITS:
        digest.update(encoded[split].numpy().astype("<i8").tobytes())
    return Corpus(
        words=tuple(words),
        counts=torch.tensor(counts),
        train=encoded["train"],
        val=encoded["val"],
        test=encoded["test"],
        description=f"{counted(len(encoded['train']), 'word')} of {counted(len(words), 'kind')} from {folder.name}",
        digest=digest.hexdigest(),
    )


def _find(name: str) -> Path:
    candidates = [Path(name).expanduser()]
    candidates += [root / called for root in data_roots() for called in _NAMED.get(name, (name,))]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise DataError(
        f"There is no text {name!r}: no such folder here, in ./data or in $FIXIFY_DATA.",
        hint=f"Name a folder with {', '.join(_LAYOUTS[0])}, or one with *.txt files.",
    )


def _files(folder: Path) -> tuple[list[Path], bool]:
    """List the files, and tell whether they are the three parts of a text whose words are separated by blanks."""
    for layout in _LAYOUTS:
        found = [folder / name for name in layout]
        if all(path.is_file() for path in found):
            return found, True
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(f"{folder} has no text.", hint=f"Put {', '.join(_LAYOUTS[0])} there, or *.txt files in UTF-8.")
    return files, False


def _texts(files: Sequence[Path], tokenised: bool) -> dict[str, list[str]]:
    lines = [_lines(path) for path in files]
    if tokenised:
        return dict(zip(SPLITS, lines, strict=True))
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for own in lines:
        held_out = max(1, round(_HELD_OUT * len(own)))
        parts["train"] += own[: -2 * held_out]
        parts["val"] += own[-2 * held_out : -held_out]
        parts["test"] += own[-held_out:]
    return parts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


def _words(lines: Iterable[str], tokenised: bool, lowercase: bool) -> Iterator[str]:
    for line in lines:
        if lowercase:
            line = line.lower()
        found = line.split() if tokenised else _WORD.findall(line)
        if found or tokenised:  # empty lines count in WikiText; elsewhere they are layout
            yield from found
            yield END_OF_LINE


def _vocabulary(words: Sequence[str], min_count: int) -> tuple[list[str], list[int]]:
    counted = Counter(words)
    rare = [word for word, count in counted.items() if count < min_count and word != UNKNOWN]
    unknown = sum(counted.pop(word) for word in rare)
    if unknown:
        counted[UNKNOWN] += unknown
    ordered = sorted(counted.items(), key=lambda entry: (-entry[1], entry[0]))
    return [word for word, _ in ordered], [count for _, count in ordered]


def _encode(words: Sequence[str], number: dict[str, int], folder: Path, split: str) -> Tensor:
    unknown = number.get(UNKNOWN)
    found = np.empty(len(words), dtype=np.int64)
    for index, word in enumerate(words):
        known = number.get(word, unknown)
        if known is None:
            raise DataError(
                f"The {split} text of {folder} has the word {word!r}, which its training text lacks.",
                hint="Make rare training words <unk>: --set language.min_count=3, or more.",
            )
        found[index] = known
    return torch.from_numpy(found)
