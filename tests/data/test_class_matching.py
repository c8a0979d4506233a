"""Match the labels of a data set to those of a checkpoint."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

from fixify.data import OpenedData, check_classes, match_classes
from fixify.data.dataset import natural_order
from fixify.errors import DataError


def opened(*names: str, order: str = "own", assumed: bool = False) -> OpenedData:
    class Nothing:
        def __len__(self) -> int:
            return 0

        def load(self, index: int) -> tuple[object, int]:
            return None, index

    return OpenedData(Nothing(), names, "somewhere", "", "data", "val", order=order, assumed=assumed)  # type: ignore[arg-type]


def test_numbers_in_names_compare_as_numbers() -> None:
    assert natural_order(["class10", "class2", "Class1"]) == ["Class1", "class2", "class10"]


@given(st.lists(st.text("aB01 9_", min_size=1, max_size=6), unique=True, max_size=8))
def test_natural_order_is_timms(names: list[str]) -> None:
    # timm leaves the order of names with equal keys ("1", "01"; "a", "A") to chance; all others have one order.
    assert [natural_key(name) for name in natural_order(names)] == sorted(natural_key(name) for name in names)


def test_names_that_differ_in_case_only_have_one_order() -> None:
    assert natural_order(["b", "B", "a"]) == natural_order(["B", "a", "b"]) == ["a", "B", "b"]


def test_another_number_of_classes_is_refused_with_both_numbers_and_what_to_do() -> None:
    with pytest.raises(DataError, match=r"\b3 classes .*somewhere has 2\b") as caught:
        check_classes(opened("ant", "bee"), 3)
    assert "--num-classes 2" in str(caught.value.hint)
    with pytest.raises(DataError) as caught:
        check_classes(opened("ant"), 3)
    assert "--num-classes" not in str(caught.value.hint)  # a classifier of one class is refused


def test_equal_names_pass_and_so_do_checkpoints_without_names() -> None:
    check_classes(opened("ant", "bee"), 2, ["ant", "bee"])
    check_classes(opened("ant", "bee"), 2)


def test_the_same_names_in_another_order_get_the_checkpoints_labels() -> None:
    data = opened("1", "2", "10", order="natural", assumed=True)
    matched = match_classes(data, 3, ["1", "10", "2"])
    assert matched.label_of == (0, 2, 1) and matched.moved
    assert matched.data.class_names == ("1", "10", "2")
    assert [matched.data.images.load(index)[1] for index in range(3)] == [0, 2, 1]
    assert "natural order" in str(matched.note) and str(matched.note) in matched.data.description
    # Two models that have to agree on labels are another matter.
    with pytest.raises(DataError, match=r"label 1 .*'10' .*'2' "):
        check_classes(data, 3, ["1", "10", "2"])


def test_without_names_in_the_checkpoint_it_is_said_which_order_is_used() -> None:
    names = [str(number) for number in (1, 2, 10)]
    note = match_classes(opened(*names, order="natural", assumed=True), 3).note
    assert note is not None and all(
        word in note for word in ("natural", "label 1 is '2'", "--class-order lexical", "'10'")
    )
    # Not where there is no doubt, or where somebody has decided.
    assert match_classes(opened("ant", "bee", order="natural", assumed=True), 2).note is None
    assert match_classes(opened(*names, order="natural"), 3).note is None
    assert match_classes(opened(*names), 3).note is None


def test_an_order_that_contradicts_the_checkpoint_is_refused_with_both() -> None:
    for order, names in (("lexical", ("1", "10", "2")), ("map", ("1", "10", "2"))):
        with pytest.raises(DataError, match=r"'10' .*label 2\b.*label 1\b") as caught:
            match_classes(opened(*names, order=order), 3, ["1", "2", "10"])
        assert "'1', '2', '10'" in caught.value.message and "'1', '10', '2'" in caught.value.message
    assert not match_classes(opened("1", "2", "10", order="natural"), 3, ["1", "2", "10"]).moved


def test_some_of_the_classes_are_matched_by_name() -> None:
    matched = match_classes(opened("bee", "dog"), 4, None, ["ant", "bee", "cat", "dog"], subset=True)
    assert matched.label_of == (1, 3)
    assert matched.data.class_names == ("ant", "bee", "cat", "dog")
    assert str(matched.note).startswith("2 of the checkpoint's 4 classes")
    with pytest.raises(DataError, match=r"has 2 of .* 4 classes.*'ant', 'cat'") as caught:
        match_classes(opened("bee", "dog"), 4, ["ant", "bee", "cat", "dog"])
    assert "--num-classes 2" in str(caught.value.hint)


IMAGENETTE = (
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)


def test_ten_synsets_and_a_model_of_imagenet() -> None:
    expected = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)  # as Imagenette's own pages say
    words = ImageNetInfo("imagenet-1k").label_descriptions()
    for stored in (None, words):
        matched = match_classes(opened(*IMAGENETTE, order="natural", assumed=True), 1000, stored, subset=True)
        assert matched.label_of == expected
    # By words, as Hugging Face's copies have them, and by the labels themselves.
    by_word = match_classes(opened(*(words[label] for label in expected[:5])), 1000, subset=True)
    assert by_word.label_of == expected[:5]
    by_number = match_classes(opened("000", "217", "482", order="natural", assumed=True), 1000, subset=True)
    assert by_number.label_of == (0, 217, 482) and str(by_number.note).startswith("3 of the checkpoint's 1,000")
    # A model of 1,000 other classes is no model of ImageNet.
    with pytest.raises(DataError, match=r"\b1,000 classes .*somewhere has 10\b"):
        match_classes(opened(*IMAGENETTE), 1000, [f"thing {label}" for label in range(1000)], subset=True)


def test_a_few_renamed_of_many_keep_their_places() -> None:
    stored = [f"class {label}" for label in range(200)]
    found = [*stored[:199], "another spelling"]
    matched = match_classes(opened(*found), 200, stored)
    assert not matched.moved and "'another spelling', not 'class 199'" in str(matched.note)
    swapped = [*stored[:198], stored[199], "another spelling"]
    with pytest.raises(DataError, match=r"\b1 of .* 200 classes: 'class 198'"):
        match_classes(opened(*swapped), 200, stored)


def test_partly_different_names_are_refused_and_named() -> None:
    with pytest.raises(DataError, match=r"\b1 of .* 3 classes: 'dog'.*\b1 of .* 3 classes: 'cat'"):
        check_classes(opened("ant", "bee", "dog"), 3, ["ant", "bee", "cat"])


def test_names_of_another_vocabulary_cannot_be_compared() -> None:
    check_classes(opened("n01440764", "n01443537"), 2, ["tench", "goldfish"])


def test_validation_labels_that_are_numbers_may_lack_the_last_class() -> None:
    matched = match_classes(opened("0", "1"), 3, ("0", "1", "2"), subset=True)
    assert not matched.moved and matched.data.num_classes == 3
