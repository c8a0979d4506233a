"""Write the King James Bible as a text in WikiText's layout, for the recipe kjv-lstm.

    apt-get install bible-kjv
    python tests/benchmarks/kjv.py kjv

Of every 20 chapters, the 10th is for validation and the 20th for test, so that all three texts have parts of the whole
book. Words are in lower case, and punctuation marks are words. Words that appear less than three times in the training
text become <unk>. Each line is a verse.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import Counter
from pathlib import Path

EVERY, MIN_COUNT = 20, 3
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_NAMES = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    done = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True)
    parts: list[list[list[str]]] = [[], [], []]
    chapters: dict[str, int] = {}
    for line in done.stdout.splitlines():
        place, _, verse = line.partition(" ")
        chapter = chapters.setdefault(place.partition(":")[0], len(chapters)) % EVERY
        parts[1 if chapter == EVERY // 2 else 2 if chapter == EVERY - 1 else 0].append(_WORD.findall(verse.lower()))
    counts = Counter(word for verse in parts[0] for word in verse)
    folder.mkdir(parents=True, exist_ok=True)
    for name, verses in zip(_NAMES, parts, strict=True):
        known = ([word if counts[word] >= MIN_COUNT else "<unk>" for word in verse] for verse in verses)
        (folder / name).write_text("".join(" ".join(verse) + "\n" for verse in known))
    kinds = sum(count >= MIN_COUNT for count in counts.values()) + 2
    sizes = [sum(len(verse) + 1 for verse in verses) for verses in parts]
    print(
        f"{folder}: {' + '.join(f'{size:,}' for size in sizes)} words of {kinds:,} kinds in {len(chapters):,} chapters"
    )


if __name__ == "__main__":
    main()
