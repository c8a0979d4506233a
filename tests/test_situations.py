"""The table of situations names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_row_has_a_test() -> None:
    named = re.findall(r"`([\w/]+\.py)((?:::\w+)+)`", (TESTS / "SITUATIONS.md").read_text())
    assert len(named) >= 30
    for file, path in named:
        source = (TESTS / file).read_text()
        for part in path.strip(":").split("::"):
            assert re.search(rf"(def|class) {part}\b", source), f"{file}{path}"
