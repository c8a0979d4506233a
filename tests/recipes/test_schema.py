from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.recipes import schema
from fixify.recipes.parsing import parse
from fixify.training import FinetuneOptions

TOKENS = [
    *"convert finetune lr seed scale head : - [ ] { } , *a &a !!x 1e-4 ? | ' # ~ << --- %YAML".split(),
    *(": ", "- ", "? ", "\n", "\n  ", "\t", '"', "\\ud800", "9" * 30),
]


def _problems(text: str) -> list[str]:
    parsed = parse(text)
    assert schema.check(parsed) is None or not parsed.problems
    return [str(problem) for problem in parsed.problems]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("convert: {head: hadamrd}", "convert.head 'auto' 'hadamard' 'hadamrd'"),
        ("convert: {dtype: float31}", "convert.dtype 'float16' 'float31'"),
        ("convert: {match: yes}", "convert.match true false 'yes'"),
        ("convert: {match: 1}", "convert.match true false 1"),
        ("convert: {seed: -1}", "convert.seed 0 -1"),
        ("convert: {num_classes: 0}", "convert.num_classes 1 0"),
        ("convert: {alpha: .inf}", "convert.alpha finite inf"),
        ("convert: {scale: .inf}", "convert.alpha finite inf"),
        ("convert: {calibrate_images: 7}", "convert.calibrate_images 8 7"),
        ("convert: {calibrate: 7}", "convert.calibrate text 7"),
        ("convert: {labels: 3}", "convert.labels text 3"),
        ("convert: {lr: 3}", "convert.lr finetune.lr"),
        ("convert: {force: true}", "convert.force"),
        ("convert: {standardise: true}", "convert.standardise 'standardize'"),
        ("convert: 3", "convert section 3"),
        ("finetune: [lr]", "finetune section [lr]"),
        ("finetune: {lr: '1e-4'}", "finetune.lr number '1e-4'"),
        ("finetune: {epochs: 2.0}", "finetune.epochs whole 2.0"),
        ("finetune: {epochs: true}", "finetune.epochs whole true"),
        ("finetune: {epochs: null}", "finetune.epochs whole null"),
        ("finetune: {scale: [0.8]}", "finetune.scale 2 [0.8]"),
        ("finetune: {scale: [0.8, x]}", "finetune.scale[1] number 'x'"),
        ("finetune: {scale: [1, 0.8]}", "finetune.scale positive 1 0.8"),
        ("finetune: {opt: sgdd}", "finetune.opt 'sgdd' sgd,"),
        ("finetune: {epochs: 3, warmup_epochs: 3}", "finetune warmup_epochs (3) epochs"),
        ("convert:\nlr: 3", "lr finetune.lr train.lr language.lr"),
        ("convert:\nfintune: {}", "fintune 'finetune'"),
        ("convert:\ndescription: [a]", "description text [a]"),
        ("description: a", "convert finetune train language"),
        ("", "convert finetune train language empty"),
        ("- a", "convert finetune train language [a]"),
        ("train: {epochs: 3}", "train model"),
    ],
)
def test_mistakes_name_the_option_what_is_allowed_and_what_was_given(text: str, words: str) -> None:
    (said,) = _problems(text)
    assert all(word in said for word in words.split()), said


def test_options_that_do_not_go_together_are_told_where_the_first_is_given() -> None:
    assert _problems("finetune:\n  lr: 0.1\n  epochs: 3\n  warmup_epochs: 4\n")[0].startswith("line 4: ")
    assert _problems("finetune:\n  lr: 0.1\n  epochs: 1\n  min_lr: 0.2\n")[0].startswith("line 4: ")


def test_every_mistake_is_told_at_once_with_its_line() -> None:
    text = (
        "convert:\n  head: binary\n  match: false\n  num_classes: 5\n  sed: 1\n"
        "finetune:\n  lr: 0.1\n  min_lr: 0.2\n  epochs: five\n  warmup_epochs: 9\n  batch_size: 3\n  mixup: 1\n"
    )
    said = {line.split(": ")[0]: line for line in _problems(text)}
    assert {
        line: all(word in said[line] for word in words)
        for line, words in {
            "line 2": ["binary", "label set"],
            "line 3": ["binary", "order"],
            "line 5": ["convert.sed", "'seed'"],
            "line 8": ["min_lr (0.2)", "lr (0.1)"],
            "line 9": ["finetune.epochs", "'five'"],
            "line 11": ["batch_size", "mixup"],
        }.items()
    } == dict.fromkeys(said, True)
    # Nor of one whose value could not be read.
    assert len(_problems("finetune:\n  epochs: *a\n  warmup_epochs: 9\n")) == 1


def test_a_recipe_may_leave_to_the_command_line_what_makes_it_whole() -> None:
    for text in ("convert: {bits_per_class: 8}", "convert: {device: cpu}", "convert: {match: false}"):
        assert _problems(text) == []
    assert len(_problems("convert: {bits_per_class: 8, head: hadamard}")) == 1


def test_a_section_whose_options_are_all_commented_out_changes_nothing() -> None:
    checked = schema.check(parse("convert:\n  # match: false\nfinetune:\n"))
    assert checked is not None
    assert checked.finetune == FinetuneOptions()  # type: ignore[attr-defined]
    assert checked.convert.model_dump(exclude_unset=True) == {}  # type: ignore[attr-defined]


def test_whole_numbers_do_for_numbers_and_lists_for_ranges() -> None:
    checked = schema.check(parse("finetune: {lr: 1, scale: [1, 1], clip_grad: 1e-4, ema_decay: null}"))
    assert checked is not None
    assert checked.finetune == FinetuneOptions(lr=1.0, scale=(1.0, 1.0), clip_grad=1e-4)  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=150)
@given(
    st.one_of(
        st.text(max_size=80),
        st.lists(
            st.sampled_from(TOKENS),
            max_size=30,
        ).map("".join),
        st.dictionaries(
            st.sampled_from(["convert", "finetune", "description", "x"]),
            st.recursive(
                st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
                lambda inner: st.one_of(
                    st.lists(inner, max_size=3),
                    st.dictionaries(st.sampled_from(["lr", "scale", "seed", "head", "opt", "y"]), inner, max_size=4),
                ),
            ),
        ).map(lambda values: yaml.safe_dump(values)),
    )
)
def test_any_text_is_a_recipe_or_has_mistakes(text: str) -> None:
    parsed = parse(text)
    checked = schema.check(parsed)
    assert (checked is None) == bool(parsed.problems)
    assert all(problem.place.line is not None and problem.place.line >= 1 for problem in parsed.problems)
