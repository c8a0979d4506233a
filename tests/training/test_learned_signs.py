"""`learn_signs`: signs change and are stored, and a run with them resumes exactly and in several processes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fixify import convert, load
from fixify.checkpoints.slim import read_info
from fixify.errors import UsageError
from fixify.heads import FixedClassifier
from fixify.training import FinetuneOptions, TrainOptions, finetune
from fixify.training.optimisers import (
    clip_gradients,
    learn_signs_,
    make_sign_optimiser,
    parameter_groups,
    schedule_signs,
)

QUICK = {"epochs": 8, "batch_size": 8, "lr": 0.05, "no_aug": True, "workers": 0, "device": "cpu", "warmup_epochs": 0}


def options(**given: Any) -> FinetuneOptions:
    return FinetuneOptions.create(**{**QUICK, "learn_signs": 0.1, **given})


def read(path: Path) -> Any:
    return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)


@pytest.fixture
def model(new_model: Any) -> nn.Module:
    """The tiny network with a binary head of 16 signs per class."""
    found: nn.Module = new_model(signs=16)
    return found


@pytest.mark.parametrize("more", [{}, {"opt": "adamw", "clip_grad": 1.0, "grad_accum": 2}, {"last_block_epochs": 1}])
def test_signs_change_and_are_stored(run: Any, model: Any, tmp_path: Path, more: dict[str, Any]) -> None:
    before, spec = model.fc.codes.clone(), model.fc.spec
    result = run(tmp_path, options(**more), model)
    assert model.fc.latent is None and model.fc.spec != spec
    assert not torch.equal(model.fc.codes, before)
    weights = read(result.last_path)["weights"]
    assert torch.equal(weights["fc.codes"], model.fc.codes) and "fc.latent" not in weights


def test_without_it_they_stay(run: Any, model: Any, tmp_path: Path) -> None:
    before = model.fc.codes.clone()
    run(tmp_path, options(learn_signs=None), model)
    assert torch.equal(model.fc.codes, before)


@pytest.mark.parametrize("where", [(1, 3), (6, 2)])
def test_a_resumed_run_is_the_whole_one(
    run: Any, new_model: Any, crash_at: Any, tmp_path: Path, where: tuple[int, int]
) -> None:
    run(tmp_path / "whole", options(), new_model(signs=16))
    with pytest.raises(crash_at.error):
        run(tmp_path / "parts", options(save_minutes=1e-9), new_model(signs=16), on_event=crash_at(*where))
    resumed = new_model(signs=16)
    run(tmp_path / "parts", options(save_minutes=1e-9), resumed, resume=True)
    whole, parts = (read(tmp_path / name / "last.fixed.safetensors")["weights"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and whole.keys() == parts.keys()
    resumed.fc.check_codes()


def test_latent_weights_have_an_optimiser_of_their_own(model: Any) -> None:
    learn_signs_(model)
    latent = model.fc.latent
    groups = parameter_groups(model, options(weight_decay=0.1))
    assert not any(parameter is latent for group in groups for parameter in group["params"])
    moves = []
    for factor, rate in ((1e-4, 0.2), (1e3, 0.2), (1.0, 0.1)):
        before = latent.detach().clone()
        signs = make_sign_optimiser(model, 1.0)
        schedule_signs(signs, rate)
        latent.grad = factor * torch.ones_like(latent)
        signs.step()
        moves.append(float((before - latent.detach()).abs().max()))
    assert moves[0] == pytest.approx(moves[1], rel=1e-2) == pytest.approx(2 * moves[2], rel=1e-2)


def test_signs_that_are_learned_follow_the_networks_schedule(run: Any, new_model: Any, tmp_path: Path) -> None:
    model = new_model(signs=16)
    run(tmp_path, options(sched="linear"), model)
    (group,) = read(tmp_path / "state.pt")["signs"]["param_groups"]
    assert 0 < group["lr"] < 0.01


def test_their_gradients_do_not_count_in_clipping(model: Any) -> None:
    learn_signs_(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    model.fc.latent.grad.fill_(1e6)
    clip_gradients(model, options(clip_grad=1.0))
    assert bool((model.fc.bias.grad == 1e-6).all()) and bool((model.fc.latent.grad == 1e6).all())


def test_heads_without_signs_are_refused(run: Any, new_model: Any, tmp_path: Path) -> None:
    for number, other in enumerate((new_model(), new_model(fixed=False))):
        with pytest.raises(UsageError, match="learn-signs"):
            run(tmp_path / str(number), options(), other)


@pytest.mark.parametrize("other", [{"ema_decay": 0.9}, {"shard": True}, {"share_classes": True}, {"compile": True}])
def test_what_excludes_it(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(other))):
        options(**other)


def test_several_processes_learn_the_same_signs(processes: Any, run: Any, new_model: Any, tmp_path: Path) -> None:
    plain = {"batch_norm": False, "dropout": 0.0}
    given = {**QUICK, "batch_size": 4, "learn_signs": 0.3, "model": {**plain, "signs": 16}}
    told = processes.together(tmp_path, {"two": given})["two"]
    assert [each["result"] for each in told] == ["done", "done"]
    first, second = (each["state"] for each in told)
    assert torch.equal(first["fc.codes"], second["fc.codes"])
    one = new_model(**plain, signs=16)
    run(tmp_path / "one", options(learn_signs=0.3), one)
    same = (first["fc.codes"] == one.fc.codes).float().mean()
    assert float(same) > 0.9 and not torch.equal(one.fc.codes, new_model(**plain, signs=16).fc.codes)


def test_from_files(tiny: Path, tmp_path: Path) -> None:
    convert(tiny / "learned.pth", tmp_path / "tiny.fixed.safetensors", head="binary", bits_per_class=16)
    given = options(img_size=32, batch_size=4, learn_signs=1.0)  # few steps
    result = finetune(tmp_path / "tiny.fixed.safetensors", str(tiny / "data"), tmp_path / "run", given, distill=False)
    before, after = read_info(tmp_path / "tiny.fixed.safetensors"), read_info(result.last_path)
    assert after.heads[0].spec.digest != before.heads[0].spec.digest
    assert (after.savings, after.architecture) == (before.savings, before.architecture)
    assert isinstance(load(result.last_path).get_classifier(), FixedClassifier)


def test_from_scratch_there_are_no_signs_to_begin_with() -> None:
    with pytest.raises(UsageError, match="learn_signs"):
        TrainOptions.create(model="resnet18", learn_signs=0.1)
