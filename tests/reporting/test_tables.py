"""fixify.reporting.tables: what the cells say."""

from __future__ import annotations

import pytest

from fixify.reporting.tables import savings_table
from fixify.savings import Savings


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((1000, 4000), (900, 3600), ["100 (10.0 %)", "400 B (10.0 %)"]),
        ((1000, 4000), (1000, 4000), ["nothing", "nothing"]),
        ((1000, 4000), (1004, 4016), ["4 more", "16 B more"]),
        ((10**7, 4 * 10**7), (10**7 - 3, 4 * 10**7 - 12), ["3 (less than 0.1 %)", "12 B (less than 0.1 %)"]),
    ],
)
def test_what_is_saved_in_plain_words(before: tuple[int, int], after: tuple[int, int], said: list[str]) -> None:
    savings = Savings(
        parameters_before=before[0],
        parameters_after=after[0],
        classifier_parameters=100,
        removed=100,
        bytes_before=before[1],
        bytes_after=after[1],
        classifier_bytes_before=0,
        classifier_bytes_after=0,
    )
    cells = list(savings_table(savings).columns[3].cells)
    assert [cells[0], cells[2]] == said
    assert cells[3] == "nothing"
    assert not any("-" in str(cell) for cell in cells)
