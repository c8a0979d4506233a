"""Signs that are learned: by latent weights in training, stored in evaluation, and held afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec, replacement
from fixify.heads.learned_signs import latent_of, packed_signs, signs_of

CLASSES, FEATURES, SIGNS = 40, 16, 12


def binary_head(bits: int = SIGNS, *, channel_dim: int = -1) -> FixedClassifier:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, FEATURES, generator=generator)
    spec = HeadSpec("binary", FEATURES, CLASSES, bits_per_class=bits, gains=True, standardize="center")
    features = torch.randn(200, FEATURES, generator=generator)
    return replacement(spec, weight, torch.zeros(CLASSES), features=features, channel_dim=channel_dim).head


def features(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def moved(head: FixedClassifier) -> FixedClassifier:
    """A head that learns, some of whose signs have changed."""
    head.learn_signs_()
    assert head.latent is not None
    with torch.no_grad():
        head.latent += 1.5 * features(*head.latent.shape)
    return head


def test_gradients_pass_the_sign() -> None:
    latent = torch.tensor([[0.3, -2.0, 0.0]], requires_grad=True)
    signs = signs_of(latent)
    assert signs.tolist() == [[1.0, -1.0, 1.0]]
    (signs * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert latent.grad is not None and latent.grad.tolist() == [[1.0, 2.0, 3.0]]


def test_packing_is_the_inverse_and_leaves_no_equals() -> None:
    latent = torch.where(features(30, 11) < 0, -1.0, 1.0)
    assert torch.equal(latent_of(packed_signs(latent), 11), latent)
    equal = packed_signs(torch.ones(100, 11))
    assert len({row.tobytes() for row in equal}) == 100


def test_nothing_changes_until_signs_do() -> None:
    head, other = binary_head(), binary_head().learn_signs_()
    x = features(7, FEATURES)
    assert torch.equal(head.eval()(x), other.eval()(x))
    torch.testing.assert_close(head.train()(x), other.train()(x))
    assert head.spec == other.eval().spec


@pytest.mark.parametrize("bits", [SIGNS, FEATURES])
def test_training_multiplies_with_the_signs_that_evaluation_stores(bits: int) -> None:
    head = moved(binary_head(bits))
    assert head.latent is not None and head.num_batches_tracked is not None
    before, x = head.spec, features(7, FEATURES)
    in_training = copy.deepcopy(head)(x)
    assert head.spec == before
    assert head.center is not None
    copied = copy.deepcopy(head)
    copied(x)  # updates the mean, as above
    torch.testing.assert_close(copied.eval()(x), in_training.detach())
    assert copied.spec.digest != before.digest
    assert torch.equal(torch.from_numpy(packed_signs(head.latent)), copied.codes)  # type: ignore[arg-type]
    copied.check_codes()


def test_feature_maps() -> None:
    head = moved(binary_head(channel_dim=1))
    assert head.train()(features(3, FEATURES, 2, 2)).shape == (3, CLASSES, 2, 2)


def test_all_parts_learn() -> None:
    head = binary_head().learn_signs_()
    F.cross_entropy(head(features(9, FEATURES)), torch.arange(9)).backward()
    assert {name for name, each in head.named_parameters() if each.grad is not None} == {"scale", "bias", "latent"}
    assert head.latent is not None and head.latent.grad is not None and bool((head.latent.grad != 0).any())


def test_held_signs_are_an_ordinary_head() -> None:
    head = moved(binary_head())
    held = copy.deepcopy(head).hold_signs_()
    assert held.latent is None and set(held.state_dict()) == set(binary_head().state_dict())
    x = features(5, FEATURES)
    assert torch.equal(held.eval()(x), head.eval()(x))
    assert torch.equal(held.codebook(), head.codebook())
    again = FixedClassifier(held.spec)
    again.load_state_dict(held.state_dict())
    assert torch.equal(again.eval()(x), held(x))


def test_a_learning_head_loads_what_another_learned() -> None:
    head = moved(binary_head()).eval()
    again = binary_head().learn_signs_()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.eval()(features(5, FEATURES)), head(features(5, FEATURES)))
    assert again.spec == head.spec
    with pytest.raises(CodebookMismatchError):
        binary_head().load_state_dict(copy.deepcopy(head).hold_signs_().state_dict())


def test_only_forward_knows_signs_that_are_learned() -> None:
    head = moved(binary_head())
    x, labels = features(5, FEATURES), torch.arange(5)
    for call in (lambda: head.loss(x, labels), lambda: head.top_k(x, 2)):
        with pytest.raises(HeadSpecError):
            call()
    head.eval()
    torch.testing.assert_close(head.loss(x, labels), F.cross_entropy(head(x), labels))
    assert torch.equal(head.top_k(x, 1).classes[:, 0], head(x).argmax(dim=1))


@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec("hadamard", FEATURES, CLASSES),
        HeadSpec("binary", FEATURES, CLASSES, bits_per_class=SIGNS),  # not loaded yet
        HeadSpec("binary", FEATURES, CLASSES, bits_per_weight=2, gains=True),
    ],
)
def test_other_heads_are_refused(spec: HeadSpec) -> None:
    with pytest.raises(HeadSpecError):
        FixedClassifier(spec).learn_signs_()


def test_a_reset_takes_the_stored_signs() -> None:
    head = moved(binary_head())
    head.reset_parameters()
    assert torch.equal(head.eval().codebook(), binary_head().codebook())
