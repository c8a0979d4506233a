"""The paper's cosine loss, and its weight decay of alpha."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fixify.errors import UsageError
from fixify.heads import FixedClassifier, HeadSpec, codebook
from fixify.surgery import fix_classifier_
from fixify.training import FinetuneOptions
from fixify.training.losses import check_cosine_heads, cosine_loss, training_loss
from fixify.training.optimisers import parameter_groups


def _cosines(rows: int, classes: int, seed: int) -> Tensor:
    head = FixedClassifier(HeadSpec("hadamard", 64, classes, bias=False, fixed_scale=True), scale=1.0)
    return head(torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 64), st.integers(0, 2**31))
def test_it_is_the_two_distances(rows: int, classes: int, seed: int) -> None:
    cosines = _cosines(rows, classes, seed)
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    expected = 0.0
    for row, target in zip(cosines.tolist(), targets.tolist(), strict=True):
        others = [abs(cosine + 1) for number, cosine in enumerate(row) if number != target]
        expected += (abs(row[target] - 1) + sum(others) / len(others)) / rows
    assert cosine_loss(cosines, targets).item() == pytest.approx(expected, abs=1e-5)
    assert 0 <= expected <= 4
    one_hot = torch.nn.functional.one_hot(targets, classes).float()
    torch.testing.assert_close(cosine_loss(cosines, one_hot), cosine_loss(cosines, targets))
    # A step against the gradient turns the features to their own code and away from the others.
    moved = cosines.detach().requires_grad_()
    cosine_loss(moved, targets).backward()
    assert bool((moved.grad.gather(1, targets[:, None]) < 0).all())
    assert int((moved.grad > 0).sum()) == rows * (classes - 1)


@pytest.mark.parametrize("classes", [2, 10, 64])
def test_best_features_have_the_cosine_that_is_claimed(classes: int) -> None:
    """Found by descent, not by the formula: sqrt((C - 1) / C) with the own code, and the right class is the largest."""
    codes = torch.from_numpy(codebook(HeadSpec("hadamard", 128, classes)))
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    optimiser = torch.optim.SGD([x], lr=20.0)
    for _ in range(300):
        optimiser.zero_grad()
        cosine_loss(torch.nn.functional.normalize(x, dim=-1) @ codes.T, torch.tensor([1])).backward()
        optimiser.step()
    cosines = (torch.nn.functional.normalize(x, dim=-1) @ codes.T).detach()[0]
    assert cosines[1].item() == pytest.approx(((classes - 1) / classes) ** 0.5, abs=2e-3)
    assert cosines.argmax() == 1


def test_training_uses_it() -> None:
    cosines, targets = _cosines(3, 10, 0), torch.tensor([1, 2, 3])
    options = FinetuneOptions.create(loss="cosine")
    assert torch.equal(training_loss(cosines, targets, None, options), cosine_loss(cosines, targets))
    assert not torch.equal(
        training_loss(cosines, targets, None, FinetuneOptions.create()), cosine_loss(cosines, targets)
    )
    with pytest.raises(UsageError, match="smoothing"):
        FinetuneOptions.create(loss="cosine", smoothing=0.1)
    with pytest.raises(UsageError, match="loss"):
        FinetuneOptions.create(loss="cosin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "bias.*scale"),
        ({"bias": False, "fixed_scale": True}, "scale"),
        ({"bias": False, "fixed_scale": True, "normalize": False}, "norm"),
    ],
)
def test_other_heads_are_refused(new_model: Any, options: dict[str, Any], message: str) -> None:
    spec = HeadSpec("hadamard", 32, 4, **options)
    with pytest.raises(UsageError, match=message) as error:
        check_cosine_heads(fix_classifier_(new_model(fixed=False), spec))
    assert "--alpha 1 --fixed-scale --no-bias" in (error.value.hint or "")


def test_learned_heads_are_refused_and_the_right_one_is_not(new_model: Any) -> None:
    with pytest.raises(UsageError, match="learned"):
        check_cosine_heads(new_model(fixed=False))
    check_cosine_heads(fix_classifier_(new_model(fixed=False), bias=False, fixed_scale=True, alpha=1.0))


def test_a_run_with_it_learns(run: Any, new_model: Any, tmp_path: Path) -> None:
    model = fix_classifier_(
        new_model(fixed=False, dropout=0.0), bias=False, fixed_scale=True, alpha=1.0, standardize=True
    )
    options = FinetuneOptions.create(
        loss="cosine", epochs=6, batch_size=11, lr=0.1, no_aug=True, workers=0, device="cpu", warmup_epochs=0
    )
    result = run(tmp_path / "run", options, model)
    assert result.after.val_top1 > 60  # of 4 classes
    assert float(model.fc.scale) == 1.0


def test_alpha_is_decayed_where_the_papers_way_is_wanted(new_model: Any) -> None:
    model = fix_classifier_(new_model(fixed=False))
    plain, paper = (
        parameter_groups(model, FinetuneOptions.create(weight_decay=0.01, decay_alpha=value)) for value in (False, True)
    )
    decays = [{id(p): group["weight_decay"] for group in groups for p in group["params"]} for groups in (plain, paper)]
    rates = [{id(p): group["lr_scale"] for group in groups for p in group["params"]} for groups in (plain, paper)]
    changed = [key for key in decays[0] if decays[0][key] != decays[1][key]]
    assert changed == [id(model.fc.scale)] and decays[1][changed[0]] == 0.01
    assert decays[1][id(model.fc.bias)] == 0.0
    assert rates[0] == rates[1]
