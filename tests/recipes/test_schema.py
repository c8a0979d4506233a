from __future__ import annotations

import inspect

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.conversion import convert
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


def test_the_convert_section_is_the_signature_of_convert() -> None:
    parameters = inspect.signature(convert).parameters
    fields = schema.ConvertOptions.model_fields
    assert set(parameters) - set(fields) == {"source", "out", "force", "on_images"}
    assert {name: field.default for name, field in fields.items()} == {
        name: parameters[name].default for name in fields
    }
    assert set(schema._LIMITS) <= set(fields)


def test_an_option_that_convert_gets_is_an_option_of_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(source: str, *, head: str = "auto", bits_per_class: int | None = None, on_step: object = None) -> None:
        del source, head, bits_per_class, on_step

    monkeypatch.setattr(schema, "convert", newer)
    options = schema._convert_options()
    assert set(options.model_fields) == {"head", "bits_per_class"}
    assert options(bits_per_class=64).model_dump(exclude_unset=True) == {"bits_per_class": 64}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("convert: {head: hadamrd}", "convert.head must be 'auto', 'hadamard', 'orthogonal'"),
        ("convert: {dtype: float31}", "convert.dtype must be 'float"),
        ("convert: {match: yes}", "convert.match must be true or false, not the text 'yes'."),
        ("convert: {match: 1}", "convert.match must be true or false, not 1."),
        ("convert: {seed: -1}", "convert.seed must be greater than or equal to 0, not -1."),
        ("convert: {num_classes: 0}", "convert.num_classes must be greater than or equal to 1, not 0."),
        ("convert: {scale: .inf}", "convert.scale must be a finite number, not inf."),
        ("convert: {calibrate_images: 7}", "convert.calibrate_images must be greater than or equal to 8, not 7."),
        ("convert: {calibrate: 7}", "convert.calibrate must be text, not 7."),
        ("convert: {labels: 3}", "convert.labels must be text, not 3."),
        ("convert: {lr: 3}", "convert.lr is not an option; finetune.lr is."),
        ("convert: {force: true}", "convert.force is not an option."),
        ("convert: {standardise: true}", "convert.standardise is not an option; did you mean 'standardize'?"),
        ("convert: 3", "convert must be a section, `option: value` lines below it, not 3."),
        ("finetune: [lr]", "finetune must be a section, `option: value` lines below it, not [lr]."),
        ("finetune: {lr: '1e-4'}", "finetune.lr must be a number, not the text '1e-4'."),
        ("finetune: {epochs: 2.0}", "finetune.epochs must be a whole number, not 2.0."),
        ("finetune: {epochs: true}", "finetune.epochs must be a whole number, not true."),
        ("finetune: {epochs: null}", "finetune.epochs must be a whole number, not null."),
        ("finetune: {scale: [0.8]}", "finetune.scale has no value number 2: [0.8]."),
        ("finetune: {scale: [0.8, x]}", "finetune.scale[1] must be a number, not the text 'x'."),
        ("finetune: {scale: [1, 0.8]}", "finetune.scale must be two positive numbers, the smaller first, not 1 0.8."),
        ("finetune: {opt: sgdd}", "finetune.opt 'sgdd' is not an optimiser of timm; near to it: sgd"),
        ("finetune: {epochs: 3, warmup_epochs: 3}", "finetune: warmup_epochs (3) must be less than epochs (3)."),
        ("convert:\nlr: 3", "lr belongs into a section: finetune.lr or train.lr or language.lr."),
        ("convert:\nfintune: {}", "fintune is not a section or entry of a recipe; did you mean 'finetune'?"),
        ("convert:\ndescription: [a]", "description must be text, not [a]."),
        ("description: a", "A recipe needs one or more of these sections: convert, finetune, train, language."),
        ("", "the recipe has sections (convert, finetune, train, language), and this is empty."),
        ("- a", "the recipe has sections (convert, finetune, train, language), and this is [a]."),
    ],
)
def test_mistakes(text: str, problem: str) -> None:
    (said,) = _problems(text)
    assert said.split(": ", 1)[1].startswith(problem)


def test_options_that_do_not_go_together_are_told_where_the_first_is_given() -> None:
    assert _problems("finetune:\n  lr: 0.1\n  epochs: 3\n  warmup_epochs: 4\n")[0].startswith("line 4: ")
    assert _problems("finetune:\n  lr: 0.1\n  epochs: 1\n  min_lr: 0.2\n")[0].startswith("line 4: ")


def test_every_mistake_is_told_at_once_with_its_line() -> None:
    text = (
        "convert:\n  head: binary\n  match: false\n  num_classes: 5\n  sed: 1\n"
        "finetune:\n  lr: 0.1\n  min_lr: 0.2\n  epochs: five\n  warmup_epochs: 9\n  batch_size: 3\n  mixup: 1\n"
    )
    assert sorted(line.split(" or ")[0] for line in _problems(text)) == [
        "line 11: finetune: batch_size must be even with mixup",
        "line 2: convert: A binary head takes its signs from the old classifier, and a new label set has none.",
        "line 3: convert: A binary head has no codes that could go to classes in order: its signs are the old "
        "classifier's.",
        "line 5: convert.sed is not an option; did you mean 'seed'?",
        "line 8: finetune: min_lr (0.2) must not be above lr (0.1).",
        "line 9: finetune.epochs must be a whole number, not the text 'five'.",
    ]
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


@settings(deadline=None, max_examples=300)
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
