import pytest
import torch

from fixify.errors import HeadSpecError
from fixify.heads.statistics import MOMENTUM, RELATIVE_FLOOR, exact_statistics, floor_std, update_running_


def state(n):
    return torch.zeros(n), torch.ones(n), torch.zeros((), dtype=torch.int64)


def features(*shape):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 2


def test_first_batches_are_averaged_evenly():
    mean, std, count = state(4)
    x = features(50, 4)
    for batch in x.split(10):
        update_running_(mean, std, count, batch)
    assert count == 5
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(std, x.std(0, correction=0))


def test_batches_of_one_sample_still_give_a_std():
    mean, std, count = state(1)
    x = features(1_000, 1)
    for row in x:
        update_running_(mean, std, count, row[None])
    assert 0.5 < std.item() < 6  # within the noise of an average over about 1 / MOMENTUM samples


def test_old_batches_fade():
    mean, std, count = state(3)
    for _ in range(30):
        update_running_(mean, std, count, features(100, 3))
    for _ in range(60):
        update_running_(mean, std, count, features(100, 3) + 10)
    torch.testing.assert_close(mean, features(100, 3).mean(0) + 10, rtol=10 * (1 - MOMENTUM) ** 60, atol=0)


def test_empty_batch_changes_nothing():
    mean, std, count = state(3)
    update_running_(mean, std, count, torch.empty(0, 3))
    assert count == 0
    assert torch.equal(std, torch.ones(3))


def test_floor_is_relative_to_the_mean_std():
    std = torch.tensor([1.0, 0.0, 2.999, 0.001])  # mean 1
    torch.testing.assert_close(floor_std(std), torch.tensor([1.0, RELATIVE_FLOOR, 2.999, RELATIVE_FLOOR]))
    assert torch.all(floor_std(torch.zeros(3)) > 0)
    assert floor_std(torch.zeros(3, dtype=torch.float16)).dtype == torch.float32
    assert floor_std(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64


def test_exact_is_stable_far_from_zero():
    x = features(999, 5).double() + 1e7
    mean, std, count = exact_statistics(x.split(100), 5)
    assert count == 10
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(std, x.std(0, correction=0), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "No calibration features"),
        ([torch.empty(0, 4)], "No calibration features"),
        ([torch.zeros(3, 5)], "width 4, got 5"),
        ([torch.tensor([[1.0, 2.0, float("nan"), 4.0]])], "not finite"),
        ([torch.full((2, 4), float("inf"))], "not finite"),
    ],
)
def test_bad_calibration_features(batches, message):
    with pytest.raises(HeadSpecError, match=message):
        exact_statistics(batches, 4)
