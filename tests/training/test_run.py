"""Whole runs on the tiny data set."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import update_summary
from torch import Tensor, nn

from fixify.data import OpenedData, Subset, make_loader
from fixify.data.idx import ArrayImages
from fixify.errors import DataError, FormatError, OutputError, OutputExistsError, TrainingError
from fixify.heads import FixedClassifier
from fixify.metrics import evaluate
from fixify.training import (
    Calibrated,
    EpochEnded,
    Evaluated,
    Event,
    FinetuneOptions,
    FinetuneResult,
    RunStarted,
    Step,
    TrainingInterrupted,
    Warned,
    stored_options,
)
from fixify.training.run_folder import write_sealed

Run = Callable[..., FinetuneResult]
CPU = torch.device("cpu")
# Every source of randomness: augmentation of both stages, dropout; and every kind of state: moments, averages.
EVERYTHING = FinetuneOptions.create(
    epochs=3,
    batch_size=8,
    lr=0.02,
    opt="adamw",
    ema_decay=0.9,
    reprob=0.3,
    mixup=0.2,
    cutmix=0.2,
    smoothing=0.1,
    auto_augment="rand-m3",
    clip_grad=1.0,
    distill_weight=0.5,
    freeze_bn=False,
    last_block_epochs=0,
    workers=0,
    device="cpu",
)
PLAIN = FinetuneOptions.create(epochs=2, batch_size=8, lr=0.05, no_aug=True, workers=0, device="cpu")


def load(path: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)  # whatever its name


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Where two nested states differ, times aside."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return [d for key in ours for d in differences(ours[key], theirs[key], f"{where}.{key}")]
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        return [d for i, pair in enumerate(zip(ours, theirs, strict=True)) for d in differences(*pair, f"{where}.{i}")]
    if isinstance(ours, Tensor):
        return [] if torch.equal(ours, theirs) else [where]
    timing = where.endswith(("seconds", "images_per_second"))
    return [] if timing or ours == theirs else [where]


class Stop(Exception):
    """Stands for a crash."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    run(out, EVERYTHING)
    return out


class TestResume:
    def same_as(self, whole: Path, out: Path) -> None:
        for name in ("state.pt", "best.fixed.safetensors", "last.fixed.safetensors"):
            assert differences(load(whole / name), load(out / name)) == []
        ours, theirs = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, out))
        assert [json.loads(line)["val_loss"] for line in ours] == [json.loads(line)["val_loss"] for line in theirs]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_crash_in_mid_epoch_and_a_resume_are_bit_for_bit_the_whole_run(
        self, run: Run, whole: Path, tmp_path: Path, workers: int
    ) -> None:
        def crash(event: Event) -> None:
            if isinstance(event, Step) and (event.epoch, event.batch) == (1, 3):
                raise Stop

        options = EVERYTHING.replace(workers=workers)
        with pytest.raises(Stop):
            run(tmp_path, options, on_event=crash)
        run(tmp_path, options, resume=True)
        self.same_as(whole, tmp_path)

    @pytest.mark.parametrize(("number", "when"), [(signal.SIGINT, (0, 2)), (signal.SIGTERM, (2, 5))])
    def test_a_signal_stops_at_a_step_and_a_resume_goes_on_there(
        self, run: Run, whole: Path, tmp_path: Path, number: int, when: tuple[int, int]
    ) -> None:
        steps: list[tuple[int, int]] = []

        def interrupt(event: Event) -> None:
            if isinstance(event, Step):
                steps.append((event.epoch, event.batch))
                if steps[-1] == when and len(set(steps)) == len(steps):
                    os.kill(os.getpid(), number)

        before = signal.getsignal(number)
        with pytest.raises(TrainingInterrupted, match=f"epoch {when[0] + 1} of 3 after . of 5 batches") as caught:
            run(tmp_path, EVERYTHING, on_event=interrupt)
        assert "--resume" in str(caught.value) and caught.value.exit_code == 128 + number
        assert signal.getsignal(number) is before
        run(tmp_path, EVERYTHING, resume=True, on_event=interrupt)
        assert len(steps) == len(set(steps)) == 15  # no step was done twice
        self.same_as(whole, tmp_path)

    def test_a_signal_during_validation_loses_no_step(self, run: Run, whole: Path, tmp_path: Path) -> None:
        def interrupt(event: Event) -> None:
            if type(event).__name__ == "Evaluating" and event.phase == "validation" and not sent:  # type: ignore[union-attr]
                sent.append(True)
                os.kill(os.getpid(), signal.SIGINT)

        sent: list[bool] = []
        with pytest.raises(TrainingInterrupted, match="epoch 1 of 3 after 5 of 5 batches"):
            run(tmp_path, EVERYTHING, on_event=interrupt)
        run(tmp_path, EVERYTHING, resume=True)
        self.same_as(whole, tmp_path)

    def test_a_finished_run_may_be_resumed_and_changes_nothing(self, run: Run, whole: Path) -> None:
        before = {path.name: path.read_bytes() for path in whole.iterdir()}
        result = run(whole, EVERYTHING, resume=True)
        assert len(result.history) == 3
        assert {path.name: path.read_bytes() for path in whole.iterdir()} == before

    def test_other_options_or_data_are_refused_and_named(self, run: Run, whole: Path, stripes: Any) -> None:
        with pytest.raises(TrainingError, match=r"epochs was 3 and is 4; lr was 0\.02 and is 0\.1"):
            run(whole, EVERYTHING.replace(epochs=4, lr=0.1), resume=True)
        train, _ = stripes
        fewer = OpenedData(Subset(train.images, list(range(40))), train.class_names, "", "", train.name, "train")
        with pytest.raises(TrainingError, match=r"training images .*44 .*40"):
            run(whole, EVERYTHING, resume=True, train=fewer)
        other = OpenedData(Subset(train.images, list(range(1, 45))), train.class_names, "", "", train.name, "train")
        other.images.indices[-1] = 0
        with pytest.raises(TrainingError, match=r"training images .*44 as before"):
            run(whole, EVERYTHING, resume=True, train=other)

    def test_an_option_that_the_state_is_too_old_to_know_had_its_defaults_effect(
        self, run: Run, whole: Path, tmp_path: Path
    ) -> None:
        state = load(whole / "state.pt")
        del state["recipe"]["val_every"]
        write_sealed(tmp_path, state)
        assert len(run(tmp_path, EVERYTHING, resume=True).history) == 3
        with pytest.raises(TrainingError, match="val_every was None and is 2"):
            run(tmp_path, EVERYTHING.replace(val_every=2), resume=True)

    def test_a_state_of_another_kind_of_run_is_refused(self, run: Run, whole: Path, tmp_path: Path) -> None:
        state = load(whole / "state.pt")
        for changed, word in (({"version": 2}, "version 2"), ({"facts": {}}, "class_names")):
            write_sealed(tmp_path, {**state, **changed})
            with pytest.raises(TrainingError, match=word):
                run(tmp_path, EVERYTHING, resume=True)
        del state["facts"]
        write_sealed(tmp_path, state)
        with pytest.raises(TrainingError, match="facts"):
            run(tmp_path, EVERYTHING, resume=True)

    def test_nothing_to_resume_begins_anew_and_says_so(self, run: Run, whole: Path, tmp_path: Path) -> None:
        events = list[Event]()
        run(tmp_path / "new", EVERYTHING, resume=True, on_event=events.append)
        (text,) = (event.text for event in events if isinstance(event, Warned))
        assert str(tmp_path / "new") in text
        self.same_as(whole, tmp_path / "new")

    @pytest.mark.parametrize("how", [{"resume": True}, {"force": True}, {}])
    def test_a_folder_that_a_run_is_in_is_refused(self, run: Run, tmp_path: Path, how: dict[str, bool]) -> None:
        refused = list[str]()

        def start_another(event: Event) -> None:
            if isinstance(event, EpochEnded):
                with pytest.raises(OutputError, match=str(os.getpid())) as caught:
                    run(tmp_path, PLAIN, **how)
                refused.append(caught.value.message)

        run(tmp_path, PLAIN, on_event=start_another)
        assert len(refused) == 2 and str(tmp_path) in refused[0]
        assert not list(tmp_path.glob("*.lock"))

    def test_checkpoints_without_a_run_are_kept(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "best.fixed.safetensors").write_bytes(b"of value")
        with pytest.raises(TrainingError, match=re.escape(str(tmp_path))):
            run(tmp_path, EVERYTHING, resume=True)
        assert (tmp_path / "best.fixed.safetensors").read_bytes() == b"of value"

    @pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
    def test_a_damaged_state_falls_back_to_the_one_before(
        self, run: Run, whole: Path, tmp_path: Path, damage: str
    ) -> None:
        shutil.copytree(whole, tmp_path / "run")
        newest, events = tmp_path / "run" / "state.pt", list[Event]()
        state = bytearray(newest.read_bytes())
        if damage == "missing":  # killed between the two renames
            newest.unlink()
        else:
            state[bytes(state).index(load(newest)["model"]["fc.bias"].numpy().tobytes())] ^= 1  # one bit of one weight
            newest.write_bytes({"cut": state[: len(state) // 2], "flipped": state}[damage])
        run(tmp_path / "run", EVERYTHING, resume=True, on_event=events.append)
        (text,) = (event.text for event in events if isinstance(event, Warned))
        assert "state.pt is " in text and "state-previous.pt" in text
        assert ("missing" if damage == "missing" else "damaged") in text
        self.same_as(whole, tmp_path / "run")

    def test_a_damaged_state_does_not_push_the_good_one_out(self, run: Run, whole: Path, tmp_path: Path) -> None:
        shutil.copytree(whole, tmp_path / "run")
        (tmp_path / "run" / "state.pt").write_bytes(b"damaged")

        def crash(event: Event) -> None:
            if isinstance(event, EpochEnded):
                raise Stop

        with pytest.raises(Stop):
            run(tmp_path / "run", EVERYTHING, resume=True, on_event=crash)
        (tmp_path / "run" / "state.pt").write_bytes(b"damaged again")
        run(tmp_path / "run", EVERYTHING, resume=True)
        self.same_as(whole, tmp_path / "run")

    def test_two_damaged_states_are_refused(self, run: Run, whole: Path, tmp_path: Path) -> None:
        shutil.copytree(whole, tmp_path / "run")
        (tmp_path / "run" / "state.pt").write_bytes(b"damaged")
        (tmp_path / "run" / "state-previous.pt").write_bytes(b"")
        with pytest.raises(TrainingError, match=r"state\.pt and .* damaged") as caught:
            run(tmp_path / "run", EVERYTHING, resume=True)
        assert "--force" in str(caught.value)

    def test_a_state_with_code_in_it_is_not_run(self, run: Run, tmp_path: Path) -> None:
        class Code:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "ran"),)

        write_sealed(tmp_path, {"version": 1, "model": Code()})
        with pytest.raises(TrainingError, match="damaged"):
            run(tmp_path, EVERYTHING, resume=True)
        assert not (tmp_path / "ran").exists()

    def test_the_state_is_written_every_few_minutes_too(self, run: Run, tmp_path: Path) -> None:
        batches = list[int]()

        def look(event: Event) -> None:
            if isinstance(event, Step) and event.epoch == 1:
                batches.append(load(tmp_path / "state.pt")["progress"]["batch"])

        run(tmp_path, PLAIN.replace(save_minutes=1e-9), on_event=look)
        assert batches == [0, 1, 2, 3, 4]  # a step is told before its state is written

    def test_a_run_that_was_killed_before_it_had_a_state_begins_anew(
        self, run: Run, whole: Path, tmp_path: Path
    ) -> None:
        def crash(event: Event) -> None:
            if isinstance(event, Evaluated):
                raise Stop

        with pytest.raises(Stop):
            run(tmp_path, EVERYTHING, on_event=crash)
        events = list[Event]()
        run(tmp_path, EVERYTHING, resume=True, on_event=events.append)
        assert any(isinstance(event, Warned) and str(tmp_path) in event.text for event in events)
        self.same_as(whole, tmp_path)

    def test_options_are_stored(self, whole: Path, tmp_path: Path) -> None:
        stored = stored_options(whole, FinetuneOptions)
        assert stored is not None and stored.recipe() == EVERYTHING.recipe()
        assert stored_options(tmp_path, FinetuneOptions) is None
        shutil.copy(whole / "state.pt", tmp_path)
        with pytest.raises(TrainingError, match=re.escape(str(tmp_path))):
            stored_options(tmp_path, FinetuneOptions)

    @pytest.mark.parametrize("content", ["", "[]", '{"options": 3}', "[" * 100_000, '{"fixify": "1", "options": null}'])
    def test_a_damaged_run_file_is_named(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(FormatError, match=r"run\.json"):
            stored_options(tmp_path, FinetuneOptions)


class TestRun:
    def test_what_a_run_leaves(
        self, run: Run, tmp_path: Path, new_model: Any, stripes: Any, preprocessing: Any
    ) -> None:
        events: list[Event] = []
        result: FinetuneResult = run(tmp_path / "new" / "run", PLAIN, on_event=events.append)
        out = tmp_path / "new" / "run"
        assert {path.name for path in out.iterdir()} == {
            "best.fixed.safetensors",
            "last.fixed.safetensors",
            "state.pt",
            "state-previous.pt",
            "run.json",
            "recipe.yaml",
            "metrics.jsonl",
            "summary.csv",
            "steps.jsonl",
            "confusions.json",
        }
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines == [record.to_dict() for record in result.history]
        assert [line["step"] for line in lines] == [5, 10]  # 44 images, 8 a batch, the last 4 left out
        assert result.after.val_top1 == max(line["val_top1"] for line in lines)
        # The numbers are those of the files.
        model = new_model()
        saved = load(result.last_path)
        model.load_state_dict(saved["weights"])
        val = make_loader(stripes[1], preprocessing, training=False, batch_size=20)
        assert evaluate(model, val, device=CPU).loss == pytest.approx(lines[-1]["val_loss"], rel=1e-5)
        assert saved["record"]["class_names"] == list(stripes[0].class_names)
        assert saved["record"]["before"]["top1"] == result.before.top1
        kinds = [type(event) for event in events if type(event).__name__ != "Evaluating"]
        assert kinds[:3] == [RunStarted, Evaluated, Calibrated]
        assert kinds.count(EpochEnded) == 2 and kinds.count(Step) == 10

    def test_any_classifier_can_be_trained(self, run: Run, tmp_path: Path, new_model: Any) -> None:
        result = run(tmp_path, PLAIN, new_model(fixed=False))
        assert result.history[0].scale is None

    def test_summary_has_timms_columns(self, run: Run, tmp_path: Path) -> None:
        run(tmp_path / "ours", PLAIN)
        metrics = {"loss": 1.0, "top1": 2.0, "top5": 3.0}
        update_summary(0, {"loss": 1.0}, metrics, tmp_path / "timm.csv", lr=0.1)
        ours, theirs = (
            list(csv.reader(path.read_text().splitlines()))
            for path in (tmp_path / "ours/summary.csv", tmp_path / "timm.csv")
        )
        assert ours[0] == theirs[0]
        assert [row[0] for row in ours[1:]] == ["0", "1"]

    def test_the_callers_random_state_is_untouched(self, run: Run, tmp_path: Path) -> None:
        before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
        run(tmp_path, EVERYTHING.replace(epochs=1))
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002

    def test_an_existing_run_is_kept_unless_forced(self, run: Run, tmp_path: Path) -> None:
        run(tmp_path, PLAIN)
        with pytest.raises(OutputExistsError, match=re.escape(str(tmp_path))) as caught:
            run(tmp_path, PLAIN)
        assert "--resume" in str(caught.value) and "--force" in str(caught.value)
        result = run(tmp_path, PLAIN.replace(epochs=1), force=True)
        assert len(result.history) == len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1

    def test_a_head_without_statistics_is_calibrated_on_training_images(
        self, run: Run, tmp_path: Path, new_model: Any, stripes: Any, preprocessing: Any
    ) -> None:
        model = new_model()
        head = next(m for m in model.modules() if isinstance(m, FixedClassifier))
        features: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))
        loader = make_loader(stripes[0], preprocessing, training=False, batch_size=44)
        evaluate(model, loader, device=CPU)
        hook.remove()
        found: dict[str, Tensor] = {}

        def on_event(event: Event) -> None:
            if isinstance(event, Calibrated):
                assert event.images == 44
                found.update(center=head.center.clone(), spread=head.spread.clone())

        run(tmp_path, PLAIN.replace(epochs=1), model, on_event=on_event)
        assert torch.allclose(found["center"], features[0].mean(dim=0), atol=1e-5)
        assert torch.allclose(found["spread"], features[0].std(dim=0, correction=0), atol=1e-5)

    def test_a_head_with_statistics_keeps_them(self, run: Run, tmp_path: Path, new_model: Any) -> None:
        model = new_model()
        head = next(m for m in model.modules() if isinstance(m, FixedClassifier))
        head.calibrate_([torch.randn(50, head.in_features)])
        events: list[Event] = []
        run(tmp_path, PLAIN.replace(epochs=1), model, on_event=events.append)
        assert not any(isinstance(event, Calibrated) for event in events)

    def test_an_unreadable_image_stops_the_run_with_its_name(self, run: Run, tmp_path: Path, stripes: Any) -> None:
        class Broken(ArrayImages):
            def load(self, index: int) -> Any:
                if index == 7:
                    raise DataError("Cannot read the image seven.png: it is not an image.")
                return super().load(index)

        train, _ = stripes
        broken = OpenedData(
            Broken(train.images.pixels, train.images.labels), train.class_names, "", "", "stripes", "train"
        )
        with pytest.raises(DataError, match=r"seven\.png"):
            run(tmp_path, PLAIN.replace(workers=2), train=broken)


class TestSteps:
    def test_accumulated_gradients_are_those_of_the_larger_batch(
        self, run: Run, tmp_path: Path, new_model: Any
    ) -> None:
        # Without batch statistics and dropout, which see the smaller batches, two small batches make a large one.
        def model() -> nn.Module:
            made = new_model(standardize=False)
            for module in made.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.0
                    module.forward = lambda x: x  # type: ignore[method-assign]
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            return made

        options = PLAIN.replace(epochs=1, warmup_epochs=0, batch_size=20, lr=0.001)
        run(tmp_path / "large", options, model())
        run(tmp_path / "small", options.replace(batch_size=10, grad_accum=2), model())
        large, small = (load(tmp_path / name / "state.pt") for name in ("large", "small"))
        assert (large["progress"]["updates"], small["progress"]["updates"]) == (2, 2)
        for key, weights in large["model"].items():
            assert torch.allclose(weights, small["model"][key], atol=2e-6), key

    @pytest.mark.parametrize("accum", [3, 7])
    def test_the_last_group_of_an_epoch_may_be_smaller(self, run: Run, tmp_path: Path, accum: int) -> None:
        result = run(tmp_path, PLAIN.replace(epochs=1, grad_accum=accum))
        assert result.history[-1].step == math.ceil(5 / accum)

    def test_a_loss_that_is_not_finite_stops_and_names_the_step(self, run: Run, tmp_path: Path, new_model: Any) -> None:
        model = new_model()
        calls = []

        def poison(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
            calls.append(model.training)
            return logits * math.nan if sum(calls) == 8 else logits

        model.register_forward_hook(poison)
        with pytest.raises(TrainingError, match="nan in epoch 2, batch 3 of 5") as caught:
            run(tmp_path, PLAIN, model)
        assert "--lr" in str(caught.value) and "--resume --nan-skip 5" in str(caught.value)
        state = load(tmp_path / "state.pt")
        assert state["progress"]["epoch"] == 1
        assert all(torch.isfinite(t.float()).all() for t in state["model"].values())

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    @pytest.mark.filterwarnings("ignore:.*GradScaler.*:UserWarning")
    def test_lower_precision(self, run: Run, tmp_path: Path, amp: str) -> None:
        result = run(tmp_path, PLAIN.replace(amp=amp, channels_last=True, epochs=1))
        assert math.isfinite(result.history[0].train_loss)
        state = load(tmp_path / "state.pt")
        assert all(t.dtype != torch.bfloat16 for t in state["model"].values())
        assert bool(state["scaler"]) == (amp == "fp16")

    def test_what_is_evaluated_and_saved_is_the_moving_average(
        self, run: Run, tmp_path: Path, new_model: Any, stripes: Any, preprocessing: Any
    ) -> None:
        result = run(tmp_path, PLAIN.replace(ema_decay=0.9))
        state, saved = load(tmp_path / "state.pt"), load(result.last_path)["weights"]
        assert differences(saved, state["ema"]) == []
        assert differences(saved, state["model"]) != []

    def test_auxiliary_classifiers_weigh_less(self, run: Run, tmp_path: Path, new_model: Any) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.main, self.aux = new_model(fixed=False), new_model(fixed=False)

            def forward(self, images: Tensor) -> Any:
                return (self.main(images), self.aux(images)) if self.training else self.main(images)

        options = PLAIN.replace(epochs=1, lr=1e-9, warmup_epochs=0)
        one = run(tmp_path / "one", options, new_model(fixed=False)).history[0].train_loss
        two = run(tmp_path / "two", options, Two()).history[0].train_loss
        assert two == pytest.approx(1.3 * one, rel=0.05)

    def test_a_model_whose_output_is_no_logits_is_refused(self, run: Run, tmp_path: Path, new_model: Any) -> None:
        model = new_model()
        model.register_forward_hook(lambda module, _, out: {"logits": out} if module.training else out)
        with pytest.raises(TrainingError, match="dict"):
            run(tmp_path, PLAIN, model)


def test_stopping_before_training_leaves_nothing_to_resume(run: Run, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if type(event).__name__ == "Evaluating":
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)  # Python's own, or ignored if pytest runs in the background of a shell
    with pytest.raises(TrainingInterrupted, match="before training"):
        run(tmp_path, PLAIN, on_event=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "state.pt").exists()


def test_a_signal_while_calibrating_stops_there_and_resuming_begins_anew(run: Run, whole: Path, tmp_path: Path) -> None:
    events = list[Event]()

    def interrupt(event: Event) -> None:
        events.append(event)
        if isinstance(event, Evaluated):  # what comes next is calibrating
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="before training") as caught:
        run(tmp_path, EVERYTHING, on_event=interrupt)
    assert caught.value.exit_code == 143 and not any(isinstance(event, Calibrated) for event in events)
    run(tmp_path, EVERYTHING, resume=True)
    assert differences(load(whole / "state.pt"), load(tmp_path / "state.pt")) == []


def test_other_versions_are_told_on_resuming(run: Run, tmp_path: Path) -> None:
    run(tmp_path, PLAIN)
    state = load(tmp_path / "state.pt")
    assert set(state["machine"]) == {"fixify", "python", "torch", "torchvision", "timm", "numpy", "device", "processes"}
    assert json.loads((tmp_path / "run.json").read_text())["machine"] == state["machine"]
    state["machine"]["torch"] = "0.1"
    write_sealed(tmp_path, state)
    events = list[Event]()
    run(tmp_path, PLAIN, resume=True, on_event=events.append)
    (text,) = (event.text for event in events if isinstance(event, Warned))
    assert f"torch 0.1 then, {torch.__version__} now" in text
