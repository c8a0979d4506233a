from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.errors import FormatError, OutputError, OutputExistsError, TrainingError, UsageError
from fixify.language import Corpus, LanguageOptions, LanguageResult, load_language, run_language
from fixify.language.loop import LanguageEpochEnded, LanguageEvent, LanguageStep, Prediction
from fixify.language.model import build_model, size_of
from fixify.language.run import read_language_runs
from fixify.recipes import read_recipe
from fixify.recipes.running import train
from fixify.training import TrainingInterrupted, Warned
from fixify.training.run_folder import write_sealed

WORDS = ["learned", "tied", "orthogonal", "hadamard", "pmi"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_language(path).model.state_dict()


def assert_same(first: Path, second: Path) -> None:
    found, wanted = weights(first), weights(second)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


@pytest.fixture(scope="module")
def done(text: Path, small: LanguageOptions, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageResult, Any]:
    """A run with the `small` options, and its events."""
    events: list[LanguageEvent] = []
    return run_language(str(text), tmp_path_factory.mktemp("run"), small, on_event=events.append), events


@pytest.mark.parametrize("words", WORDS)
def test_it_learns_and_its_checkpoint_is_what_was_measured(text: Path, tmp_path: Path, words: str) -> None:
    options = LanguageOptions.create(
        words=words, num_features=16, epochs=3, batch_size=4, seq_len=10, lr=0.02, embedding_scale=4, device="cpu"
    )
    result = run_language(str(text), tmp_path / "run", options)
    assert result.history[-1].train_loss < result.history[0].train_loss - 0.1
    losses = [record.val_loss for record in result.history]
    assert result.val.loss == pytest.approx(min(losses), rel=1e-6)
    assert result.best.val_perplexity == min(record.val_perplexity for record in result.history)
    (run,) = read_language_runs([tmp_path / "run"])
    assert run.test_perplexity == result.test.perplexity
    assert run.size == result.size
    # What is not learned is not in the file where it can be rebuilt.
    stored = result.best_path.stat().st_size
    numbers = result.size.learned + (result.size.fixed // 2 if words == "pmi" else 0)
    assert stored < 4 * numbers + 6000


def test_only_learned_words_learn(done: Any, small: LanguageOptions, corpus: Corpus) -> None:
    before = build_model(small, corpus).state_dict()
    after = weights(done[0].last_path)
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert same == {"embedding.weight", "classifier.codes"}


def test_rows_differ_in_nothing_but_the_words(corpus: Corpus, small: LanguageOptions) -> None:
    fixed, learned = (build_model(each, corpus) for each in (small, small.with_learned_words()))
    for name, value in fixed.layers.state_dict().items():
        assert torch.equal(value, learned.layers.state_dict()[name])
    assert torch.equal(fixed.classifier.bias, learned.classifier.bias)  # type: ignore[arg-type]


def test_sizes_are_those_of_the_papers_table() -> None:
    words = 33_278
    counted = Corpus(tuple(map(str, range(words))), torch.ones(words), *[torch.zeros(0)] * 3, "", "")
    sizes = {
        kind: size_of(build_model(options, counted), options)
        for kind in ("learned", "hadamard")
        for options in (LanguageOptions.create(words=kind),)
    }
    assert sizes["learned"].learned == sizes["hadamard"].parameters == 38_312_446
    assert f"{sizes['hadamard'].share:.2f}" == "88.94"
    assert sizes["hadamard"].learned == 38_312_446 - 2 * words * 512 + 1  # alpha


@pytest.mark.parametrize("opt", ["adam", "asgd"])
def test_a_stopped_run_goes_on_exactly(text: Path, tmp_path: Path, small: LanguageOptions, opt: str) -> None:
    options = small.replace(
        epochs=5,
        opt=opt,
        lr=0.01 if opt == "adam" else 20.0,
        sched="constant",
        patience=1,
        seq_len=14,
        vary_seq_len=True,
        dropout_output=0.3,
        dropout_weights=0.2,
    )
    whole = run_language(str(text), tmp_path / "whole", options)
    assert any(record.averaged for record in whole.history) == (opt == "asgd")

    stops = iter([5, 95])  # the second one after averaging has begun
    at = next(stops)

    def stop(event: LanguageEvent) -> None:
        nonlocal at
        if isinstance(event, LanguageStep):
            stop.updates += 1  # type: ignore[attr-defined]
            if stop.updates == at:  # type: ignore[attr-defined]
                at = next(stops, -1)
                signal.raise_signal(signal.SIGINT)

    stop.updates = 0  # type: ignore[attr-defined]
    for number in range(2):
        with pytest.raises(TrainingInterrupted, match=re.escape(str(tmp_path / "stopped"))):
            run_language(str(text), tmp_path / "stopped", options, resume=number > 0, on_event=stop)
    again = run_language(str(text), tmp_path / "stopped", options, resume=True, on_event=stop)
    assert_same(again.last_path, whole.last_path)
    assert_same(again.best_path, whole.best_path)

    def without_time(result_history: tuple[object, ...]) -> list[dict[str, object]]:
        timed = {"seconds": 0.0, "words_per_second": 0.0}
        return [dataclasses.replace(record, **timed).to_dict() for record in result_history]  # type: ignore[type-var, attr-defined]

    assert without_time(again.history) == without_time(whole.history)


def test_a_damaged_state_falls_back_to_the_one_before(
    done: Any, text: Path, tmp_path: Path, small: LanguageOptions
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done[0].folder, folder)
    (folder / "state.pt").write_bytes(b"damaged")
    events: list[LanguageEvent] = []
    again = run_language(str(text), folder, small, resume=True, on_event=events.append)
    (warned,) = [event for event in events if isinstance(event, Warned)]
    assert "state.pt" in warned.text and "state-previous.pt" in warned.text
    assert_same(again.last_path, done[0].last_path)
    with pytest.raises(TrainingError, match="hidden"):  # a state of images
        write_sealed(folder, {"version": 1, "facts": {}})
        run_language(str(text), folder, small, resume=True)


def test_averaging_begins_when_validation_has_not_got_better(
    text: Path, tmp_path: Path, small: LanguageOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merity et al. (2017), algorithm 1: worse than the best of all but the last n."""
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.4, 3.6, 3.3, 3.2, 3.2, 3.2])
    monkeypatch.setattr("fixify.language.run.predict", lambda *given: Prediction(next(losses), 1))
    options = small.replace(epochs=8, seq_len=35, opt="asgd", lr=1.0, sched="constant", patience=2)
    history = run_language(str(text), tmp_path / "run", options).history
    assert [record.averaged for record in history] == [False] * 6 + [
        True
    ] * 2  # at 3.6 the best of the first three is 3


def test_resuming_with_other_options_or_text_is_refused(
    done: Any, text: Path, tmp_path: Path, small: LanguageOptions
) -> None:
    folder = done[0].folder
    with pytest.raises(TrainingError, match=r"lr was 0\.01 and is 0\.5"):
        run_language(str(text), folder, small.replace(lr=0.5), resume=True)
    other = tmp_path / "other"
    other.mkdir()
    for path in text.iterdir():
        (other / path.name).write_text(path.read_text() + "w1 and w1\n")
    with pytest.raises(TrainingError, match="another text"):
        run_language(str(other), folder, small, resume=True)
    with pytest.raises(OutputExistsError):
        run_language(str(text), folder, small)


def test_the_recipe_of_a_run_repeats_it_and_refuses_another_text(done: Any, text: Path, tmp_path: Path) -> None:
    first, _ = done
    recipe = read_recipe(first.folder / "recipe.yaml")
    assert recipe.language is not None
    again = train(recipe, tmp_path / "again", recipe.language.replace(device="cpu"))
    assert_same(again.last_path, first.last_path)
    with (text / "wiki.test.tokens").open("a") as file:
        file.write("w1\n")
    try:
        with pytest.raises(TrainingError, match=r"text .*SHA-256"):
            train(recipe, tmp_path / "changed")
    finally:
        lines = (text / "wiki.test.tokens").read_text().removesuffix("w1\n")
        (text / "wiki.test.tokens").write_text(lines)


def test_a_loss_that_is_not_finite_stops_before_anything_is_written(
    text: Path, tmp_path: Path, small: LanguageOptions
) -> None:
    options = small.with_learned_words().replace(opt="sgd", lr=1e30, clip_grad=None, sched="constant")
    with pytest.raises(TrainingError, match=r"The (validation )?loss is"):
        run_language(str(text), tmp_path / "run", options)
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_signs_are_stored_as_bits(
    done: Any, text: Path, tmp_path: Path, small: LanguageOptions, corpus: Corpus
) -> None:
    result = run_language(str(text), tmp_path / "run", small.replace(head_signs=True, epochs=1))
    vectors = load_language(result.best_path).model.embedding.weight
    assert torch.equal(vectors.abs(), torch.full_like(vectors, 0.25))
    assert torch.equal(vectors, build_model(small.replace(head_signs=True), corpus).embedding.weight)
    saved = done[0].best_path.stat().st_size - result.best_path.stat().st_size
    assert saved > len(corpus.words) * 16 * 4 * 0.9


def test_metrics_are_written_line_by_line(done: Any) -> None:
    result, seen = done
    ended = [event.record for event in seen if isinstance(event, LanguageEpochEnded)]
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [record.to_dict() for record in result.history] == [record.to_dict() for record in ended]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"words": "glove"}, "words: must be "),
        ({"words": "learned", "head_rank": 4}, "head_rank belong to fixed vectors"),
        ({"words": "pmi", "opt": "asgd"}, "averages weights at a constant rate"),
        ({"words": "pmi", "epochs": 2, "warmup_epochs": 2}, "must be less than epochs"),
        ({"words": "pmi", "epoch": 2}, "did you mean 'epochs'"),
    ],
)
def test_mistakes_in_options_are_explained(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LanguageOptions.create(**given)


def test_nothing_to_resume_begins_anew_and_a_folder_in_use_is_refused(
    done: Any, text: Path, tmp_path: Path, small: LanguageOptions
) -> None:
    events, refused = list[LanguageEvent](), list[str]()

    def listen(event: LanguageEvent) -> None:
        events.append(event)
        if isinstance(event, LanguageEpochEnded):
            with pytest.raises(OutputError) as caught:
                run_language(str(text), tmp_path / "run", small, force=True)
            refused.append(caught.value.message)

    run_language(str(text), tmp_path / "run", small, resume=True, on_event=listen)
    assert isinstance(events[0], Warned) and str(tmp_path / "run") in events[0].text
    assert len(refused) == 2
    for name in ("best.safetensors", "last.safetensors"):  # equal runs leave equal bytes
        assert (tmp_path / "run" / name).read_bytes() == (done[0].folder / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"val_perplexity": "low"}'),
        ("metrics.jsonl", '{"val_perplexity": NaN}'),
        ("metrics.jsonl", "[" * 100_000),
        ("run.json", {"num_words": -1}),
        ("run.json", {"size": {"parameters": 0, "fixed": 0, "learned": 0}}),
        ("run.json", {"size": 3}),
        ("run.json", {"result": {"test_perplexity": 1e300}}),
        ("run.json", {"options": {"words": "none"}}),
        ("run.json", {"options": 3}),
        ("run.json", {"text": [1]}),
    ],
)
def test_damaged_files_are_named(done: Any, tmp_path: Path, name: str, content: Any) -> None:
    shutil.copytree(done[0].folder, tmp_path / "run")
    path = tmp_path / "run" / name
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    with pytest.raises(FormatError, match=re.escape(str(tmp_path / "run"))) as caught:
        read_language_runs([tmp_path / "run"])
    assert name in str(caught.value) or content == ""
