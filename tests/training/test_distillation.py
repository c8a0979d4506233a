"""Learning from a teacher, with labels and without."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixify.data import OpenedData, make_loader
from fixify.data.idx import ArrayImages
from fixify.errors import TrainingError, UsageError
from fixify.training import FinetuneOptions, FinetuneResult, ReferenceModel, api
from fixify.training.losses import distillation_loss
from fixify.training.teacher import Teacher

Run = Callable[..., FinetuneResult]
CPU = torch.device("cpu")
OPTIONS = FinetuneOptions.create(epochs=2, batch_size=8, lr=0.05, workers=0, device="cpu", distill_temperature=2.0)


def weights(out: Path) -> dict[str, Tensor]:
    return torch.load(io.BytesIO((out / "state.pt").read_bytes()), weights_only=True)["model"]


def same(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_labels(data: OpenedData) -> OpenedData:
    """The same images, every label 0."""
    images = data.images
    assert isinstance(images, ArrayImages)
    return replace(data, images=ArrayImages(images.pixels, 0 * images.labels), labelled=False)


class TestLoss:
    def test_it_is_the_divergence_times_the_squared_temperature(self) -> None:
        ours, theirs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).split([3, 3])
        p, q = (theirs / 3).softmax(dim=-1), (ours / 3).softmax(dim=-1)
        expected = 9 * (p * (p / q).log()).sum(dim=-1).mean()
        assert distillation_loss(ours, theirs, 3.0).item() == pytest.approx(expected.item(), rel=1e-5)
        assert distillation_loss(theirs, theirs, 3.0).item() == pytest.approx(0, abs=1e-6)

    def test_the_gradient_hardly_depends_on_a_high_temperature(self) -> None:
        """Hinton et al. (2015), section 2: at a high temperature it is that of matching the logits."""
        logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
        sizes = []
        for temperature in (30.0, 300.0):
            ours = logits.clone().requires_grad_()
            distillation_loss(ours, logits.flip(0), temperature).backward()
            assert ours.grad is not None
            sizes.append(ours.grad.norm().item())
        assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


class TestTeacher:
    def test_images_are_normalised_and_resized_anew_for_it(self, teacher: ReferenceModel, stripes: Any) -> None:
        theirs = {**teacher.preprocessing, "input_size": (1, 20, 20)}
        ours = {**theirs, "mean": (0.1,), "std": (0.7,)}
        expected, given = (
            next(iter(make_loader(stripes[1], cfg, training=False, batch_size=20)))[0] for cfg in (theirs, ours)
        )
        assert not torch.allclose(given, expected, atol=0.1)
        seen: list[Tensor] = []
        hook = teacher.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        Teacher(ReferenceModel("", "", teacher.model, theirs), ours, device=CPU)(given)
        Teacher(ReferenceModel("", "", teacher.model, {**theirs, "input_size": (1, 16, 16)}), theirs, device=CPU)(
            expected
        )
        hook.remove()
        assert torch.allclose(seen[0], expected, atol=1e-5)
        assert seen[1].shape == (20, 1, 16, 16)

    def test_one_for_other_channels_is_refused(self, run: Run, tmp_path: Path, teacher: ReferenceModel) -> None:
        colour = {**teacher.preprocessing, "input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        with pytest.raises(UsageError, match=r"rgb\.pth .*3 channels.* 1"):
            run(tmp_path / "run", OPTIONS, teacher=ReferenceModel("rgb.pth", "0" * 64, teacher.model, colour))
        assert not (tmp_path / "run").exists()


class TestRun:
    def test_the_teacher_is_frozen_and_recorded(self, run: Run, tmp_path: Path, teacher: ReferenceModel) -> None:
        before = {key: tensor.clone() for key, tensor in teacher.model.state_dict().items()}
        modes: list[bool] = []
        hook = teacher.model.register_forward_pre_hook(
            lambda module, _inputs: modes.append(module.training or torch.is_grad_enabled())
        )
        result = run(tmp_path, OPTIONS, teacher=teacher)
        hook.remove()
        assert len(modes) == 10 and not any(modes)
        assert all(torch.equal(before[key], tensor) for key, tensor in teacher.model.state_dict().items())
        assert json.loads((tmp_path / "run.json").read_text())["teacher"] == {"name": "learned.pth", "sha256": "0" * 64}
        record = torch.load(io.BytesIO(result.last_path.read_bytes()), weights_only=True)["record"]
        assert record["teacher"]["sha256"] == "0" * 64

    def test_it_sees_the_mixed_and_augmented_images(
        self, run: Run, tmp_path: Path, teacher: ReferenceModel, new_model: Any
    ) -> None:
        model, pairs = new_model(), ([], [])  # type: ignore[var-annotated]
        hooks = [
            model.register_forward_pre_hook(
                lambda module, inputs: pairs[0].append(inputs[0]) if module.training else None
            ),
            teacher.model.register_forward_pre_hook(lambda _module, inputs: pairs[1].append(inputs[0])),
        ]
        run(tmp_path, OPTIONS.replace(mixup=0.5, reprob=0.5), model, teacher=teacher)
        for hook in hooks:
            hook.remove()
        assert len(pairs[0]) == len(pairs[1]) == 10
        assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))

    def test_resuming_in_mid_epoch_is_exact_and_wants_the_same_teacher(
        self, run: Run, crash_at: Any, tmp_path: Path, teacher: ReferenceModel
    ) -> None:
        options = OPTIONS.replace(mixup=0.2, val_every=3, grad_accum=2)
        run(tmp_path / "whole", options, teacher=teacher)
        with pytest.raises(crash_at.error):
            run(tmp_path / "stopped", options, teacher=teacher, on_event=crash_at(1, 4))
        for other in (None, ReferenceModel("learned.pth", "1" * 64, teacher.model, teacher.preprocessing)):
            with pytest.raises(TrainingError, match=r"teacher was .*learned\.pth"):
                run(tmp_path / "stopped", options, teacher=other, resume=True)
        run(tmp_path / "stopped", options, teacher=teacher, resume=True)
        assert same(tmp_path / "whole", tmp_path / "stopped")

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    @pytest.mark.filterwarnings("ignore:.*GradScaler.*:UserWarning")
    def test_lower_precision(self, run: Run, tmp_path: Path, teacher: ReferenceModel, amp: str) -> None:
        full = run(tmp_path / "full", OPTIONS.replace(epochs=1), teacher=teacher)
        half = run(tmp_path / "half", OPTIONS.replace(epochs=1, amp=amp, channels_last=True), teacher=teacher)
        assert half.history[0].train_loss == pytest.approx(full.history[0].train_loss, rel=0.1)

    def test_the_weight_divides_the_loss(self, run: Run, tmp_path: Path, teacher: ReferenceModel) -> None:
        def loss(name: str, teacher: ReferenceModel | None, **given: Any) -> float:
            options = OPTIONS.replace(epochs=1, lr=1e-9, warmup_epochs=0, **given)
            found = run(tmp_path / name, options, teacher=teacher).history[0].train_loss
            assert found is not None
            return found

        labels, teacher_logits = loss("labels", None), loss("teacher_logits", teacher, distill_weight=1.0)
        assert loss("both", teacher, distill_weight=0.25) == pytest.approx(
            0.75 * labels + 0.25 * teacher_logits, rel=1e-4
        )

    def test_auxiliary_classifiers_are_taught_too(
        self, run: Run, tmp_path: Path, teacher: ReferenceModel, new_model: Any
    ) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.main, self.aux = new_model(fixed=False), new_model(fixed=False)

            def forward(self, images: Tensor) -> Any:
                return (self.main(images), self.aux(images)) if self.training else self.main(images)

        options = OPTIONS.replace(epochs=1, lr=1e-9, warmup_epochs=0, unlabelled=True)
        one = run(tmp_path / "one", options, new_model(fixed=False), teacher=teacher).history[0].train_loss
        two = run(tmp_path / "two", options, Two(), teacher=teacher).history[0].train_loss
        assert one is not None and two == pytest.approx(1.3 * one, rel=0.05)


class TestUnlabelled:
    def test_labels_are_not_used(self, run: Run, tmp_path: Path, teacher: ReferenceModel, stripes: Any) -> None:
        options = OPTIONS.replace(unlabelled=True, mixup=0.2)
        run(tmp_path / "labels", options, teacher=teacher)
        run(tmp_path / "none", options, teacher=teacher, train=without_labels(stripes[0]))
        run(tmp_path / "weight", OPTIONS.replace(distill_weight=1.0, mixup=0.2), teacher=teacher)
        assert same(tmp_path / "labels", tmp_path / "none")
        assert same(tmp_path / "labels", tmp_path / "weight")

    def test_it_learns_from_the_teacher_alone(
        self, run: Run, tmp_path: Path, teacher: ReferenceModel, stripes: Any
    ) -> None:
        """Against the labels of the validation images, which the teacher never gave."""
        options = OPTIONS.replace(unlabelled=True, epochs=16, lr=0.1, no_aug=True)
        result = run(tmp_path, options, teacher=teacher, train=without_labels(stripes[0]))
        assert result.after.val_top1 >= 90 > result.before.top1

    def test_without_validation_labels_it_is_agreement_that_is_measured(
        self, run: Run, tmp_path: Path, teacher: ReferenceModel, stripes: Any, preprocessing: Any, new_model: Any
    ) -> None:
        train, val = (without_labels(data) for data in stripes)
        options = OPTIONS.replace(unlabelled=True, max_drop=100 / 20 * 19)
        said: list[Any] = []
        result = run(tmp_path, options, teacher=teacher, original=teacher, train=train, val=val, on_event=said.append)
        assert result.original_top1 == 100.0  # it agrees with itself
        model = new_model()
        saved = torch.load(io.BytesIO(result.last_path.read_bytes()), weights_only=True)
        model.load_state_dict(saved["weights"])
        images, _ = next(iter(make_loader(val, preprocessing, training=False, batch_size=20)))
        with torch.no_grad():
            agree = (model.eval()(images).argmax(dim=-1) == teacher.model.eval()(images).argmax(dim=-1)).float().mean()
        assert result.history[-1].val_top1 == pytest.approx(100 * agree.item(), abs=1e-4)
        assert saved["record"]["val_labels"] == "the teacher's answers"
        assert any("agreement with the teacher" in event.val for event in said if type(event).__name__ == "RunStarted")
        # The answers are asked for again when the run is resumed.
        assert run(tmp_path, options, teacher=teacher, original=teacher, train=train, val=val, resume=True).reached

    def test_there_has_to_be_a_teacher(self, run: Run, tmp_path: Path, stripes: Any) -> None:
        for options, val in ((OPTIONS.replace(unlabelled=True), stripes[1]), (OPTIONS, without_labels(stripes[1]))):
            with pytest.raises(UsageError, match="teacher") as caught:
                run(tmp_path / "run", options, val=val)
            assert "--distill ORIGINAL" in str(caught.value)

    def test_images_without_labels_have_to_be_said_to_be(
        self, run: Run, tmp_path: Path, teacher: ReferenceModel, stripes: Any
    ) -> None:
        with pytest.raises(UsageError, match=r"training .*no labels"):
            run(tmp_path / "run", OPTIONS, teacher=teacher, train=without_labels(stripes[0]))


def test_what_the_files_of_teacher_and_original_hold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(ref: str, *_: Any) -> ReferenceModel:
        return ReferenceModel(ref, "0" * 64, torch.nn.Identity(), {}, ("Read.", f"Besides the weights of {ref}: ..."))

    monkeypatch.setattr(api, "open_reference", opened)
    told: list[Any] = []
    api._open_references(SimpleNamespace(distill="a.pth", against="b.pth"), None, None, told.append)  # type: ignore[arg-type]
    said = [event.text for event in told]
    assert said == ["Read.", "Besides the weights of a.pth: ...", "Besides the weights of b.pth: ..."]
