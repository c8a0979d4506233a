from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.utils.misc import natural_key

from fixify.data import OpenedData, check_classes
from fixify.data.classes import natural_order
from fixify.errors import DataError


def opened(*names: str) -> OpenedData:
    class Nothing:
        def __len__(self) -> int:
            return 0

        def load(self, index: int) -> tuple[object, int]:
            raise IndexError(index)

    return OpenedData(Nothing(), names, "somewhere", "", "data", "val")  # type: ignore[arg-type]


def test_numbers_in_names_compare_as_numbers() -> None:
    assert natural_order(["class10", "class2", "Class1"]) == ["Class1", "class2", "class10"]


@given(st.lists(st.text("aB01 9_", min_size=1, max_size=6), unique=True, max_size=8))
def test_the_order_is_timms(names: list[str]) -> None:
    # timm leaves the order of names with equal keys ("1", "01"; "a", "A") to chance; all others have one order.
    assert [natural_key(name) for name in natural_order(names)] == sorted(natural_key(name) for name in names)


def test_names_that_differ_in_case_only_have_one_order() -> None:
    assert natural_order(["b", "B", "a"]) == natural_order(["B", "a", "b"]) == ["a", "B", "b"]


def test_another_number_of_classes_is_refused_with_both_numbers_and_what_to_do() -> None:
    with pytest.raises(DataError, match="3 classes and the data at somewhere has 2") as caught:
        check_classes(opened("ant", "bee"), 3)
    assert "--num-classes 2" in str(caught.value)


def test_equal_names_pass_and_so_do_checkpoints_without_names() -> None:
    check_classes(opened("ant", "bee"), 2, ["ant", "bee"])
    check_classes(opened("ant", "bee"), 2)


def test_the_same_names_in_another_order_are_refused() -> None:
    with pytest.raises(DataError, match="label 0 is 'bee' in the checkpoint and 'ant' here"):
        check_classes(opened("ant", "bee"), 2, ["bee", "ant"])


def test_torchvisions_lexical_order_is_recognised() -> None:
    found = natural_order([f"c{i}" for i in range(12)])
    with pytest.raises(DataError, match=r"lexical, as torchvision sorts\): label 2 is 'c10'"):
        check_classes(opened(*found), 12, sorted(found))


def test_partly_different_names_are_refused_and_named() -> None:
    with pytest.raises(DataError, match=r"1 of the checkpoint's 3 classes are not in the data: 'cat'.*'dog'"):
        check_classes(opened("ant", "bee", "dog"), 3, ["ant", "bee", "cat"])


def test_names_of_another_vocabulary_cannot_be_compared() -> None:
    check_classes(opened("n01440764", "n01443537"), 2, ["tench", "goldfish"])
