"""Answers on the validation images: their order, and how those of two models differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fixify.training.answers import Answers, RightImages
from fixify.training.events import EpochRecord, best_of, is_above_start

RECORD = EpochRecord(0, 0, 0.1, None, None, 1.0, 90.0, 100.0, 1.0, None, 1.0, 1.0)


def right_images(right: str, parts: int = 1) -> RightImages:
    return RightImages.of(np.array([each == "1" for each in right], bool), parts)


@pytest.mark.parametrize("right", ["", "1", "0101", "11111111", "101010101"])
def test_one_bit_per_image_is_kept(right: str) -> None:
    found = right_images(right)
    assert found.flags().tolist() == [each == "1" for each in right]
    assert len(found.packed) <= 4


def test_gained_and_lost_images_are_counted() -> None:
    assert right_images("110010").changes_to(right_images("101110")) == (2, 1)
    assert right_images("11").changes_to(right_images("11")) == (0, 0)


def test_other_images_are_not_compared() -> None:
    start = right_images("1100")
    assert start.changes_to(right_images("110")) is None
    assert start.changes_to(right_images("1100", parts=2)) is None


def test_what_is_no_bits_is_refused() -> None:
    for num_images, packed in ((9, "oA=="), (1, ""), (0, "oA==")):
        with pytest.raises(ValueError):
            RightImages(num_images, 1, packed)


def pairs(*predicted: int) -> torch.Tensor:
    """Images of class 1."""
    return torch.tensor([[1] * len(predicted), predicted], dtype=torch.int32)


def test_the_answers_of_several_processes_have_the_order_of_the_data() -> None:
    whole = Answers.of([pairs(0, 1, 2, 3, 1)], 5, 4)
    assert whole.parts == 1 and torch.equal(whole.pairs, pairs(0, 1, 2, 3, 1))
    for shards in ([pairs(0, 2, 1), pairs(1, 3)], [pairs(0, 3), pairs(1, 1), pairs(2)]):
        assert torch.equal(Answers.of(shards, 5, 4).pairs, whole.pairs)
    assert Answers.of([pairs(1), pairs()], 1, 4).right().flags().tolist() == [True]
    assert whole.right() == right_images("01001")
    assert whole.confusions().right == (0, 2, 0, 0) and whole.confusions().images == (0, 5, 0, 0)


def test_if_an_image_was_left_out_the_order_is_that_of_the_processes() -> None:
    two, one = Answers.of([pairs(0, 1), pairs(1, 3)], 5, 4), Answers.of([pairs(0, 1, 1, 3)], 5, 4)
    assert (two.parts, one.parts) == (2, 1) and two.right().flags().tolist() == [False, True, True, False]
    assert two.right().changes_to(one.right()) is None and one.right().changes_to(one.right()) == (0, 0)


@pytest.mark.parametrize(
    ("gained", "lost", "above"),
    [(0, 0, False), (1, 0, False), (4, 0, False), (5, 0, True), (5, 5, False), (12, 4, False), (13, 4, True),
     (29, 17, False), (3, 9, False), (None, None, True)],
)  # fmt: skip
def test_a_gain_counts_above_two_standard_errors(gained: int | None, lost: int | None, above: bool) -> None:
    assert is_above_start(replace(RECORD, gained=gained, lost=lost)) is above


def test_the_start_is_best_unless_a_validation_is_above_it_by_more_than_chance() -> None:
    noise = replace(RECORD, step=5, val_top1=90.1, gained=6, lost=4)
    same = replace(RECORD, step=10, val_loss=0.5, gained=0, lost=0)
    clear = replace(RECORD, step=15, val_top1=90.05, gained=5, lost=0)
    assert best_of(RECORD, [noise, same]) is RECORD
    assert best_of(RECORD, [noise, clear]) is clear
    assert best_of(RECORD, [replace(each, gained=None, lost=None) for each in (noise, same)]).step == 5  # type: ignore[union-attr]
