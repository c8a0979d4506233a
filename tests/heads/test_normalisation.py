import pytest
import torch
import torch.nn.functional as F

from fixify.heads.normalisation import NORM_EPSILON, ScaledDirections


def one_by_one(x, scale, mean, std):
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    z = z if mean is None else z - mean
    z = z if std is None else z / std
    return (F.normalize(z, dim=-1, eps=NORM_EPSILON) * scale).to(x.dtype)


@pytest.fixture(params=["plain", "mean", "mean-std"])
def statistics(request, draw):
    def made(n, dtype=torch.float32):
        mean = draw(n, seed=5).to(dtype) if "mean" in request.param else None
        std = draw(n, seed=6).to(dtype).abs() + 0.5 if "std" in request.param else None
        return mean, std

    return made


@pytest.mark.parametrize("lead", [(), (0,), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_are_equal_and_gradients_close(dtype, lead, statistics, draw):
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = statistics(24, wide)
    results = []
    for function in (ScaledDirections.apply, one_by_one):
        x = draw(*lead, 24).to(dtype).requires_grad_()
        scale = torch.tensor(3.5, dtype=wide, requires_grad=True)
        values = function(x, scale, mean, std)
        grads = torch.autograd.grad((values.to(wide) * draw(*lead, 24, seed=9).to(wide)).sum(), (x, scale))
        results.append((values, *grads))
    (values, of_x, of_scale), (expected, x_expected, scale_expected) = results
    assert torch.equal(values, expected)
    assert of_x.dtype == dtype and of_scale.dtype == wide
    torch.testing.assert_close(of_x, x_expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(of_scale, scale_expected, rtol=1e-5, atol=1e-5)


def test_gradients_and_their_gradients(statistics, draw):
    mean, std = statistics(6, torch.float64)
    x = draw(3, 6, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: ScaledDirections.apply(x, s, mean, std), (x, scale))
    assert torch.autograd.gradgradcheck(lambda x, s: ScaledDirections.apply(x, s, mean, std), (x, scale))


def test_features_shorter_than_the_smallest_norm(draw):
    """They are divided by that norm, so their gradient has no part removed."""
    for function in (ScaledDirections.apply, one_by_one):
        for x in (torch.zeros(2, 8), draw(2, 8) * 1e-9):
            x.requires_grad_()
            (grad,) = torch.autograd.grad(function(x, torch.tensor(2.0), None, None)[:, 0].sum(), x)
            torch.testing.assert_close(grad[:, 0], torch.full((2,), 2.0 / NORM_EPSILON))
            assert not grad[:, 1:].any()


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_needed(needs, draw):
    x, scale = draw(3, 8).requires_grad_(needs[0]), torch.tensor(2.0).requires_grad_(needs[1])
    ScaledDirections.apply(x, scale, None, None).sum().backward()
    assert (x.grad is not None, scale.grad is not None) == needs
