import pytest
import torch
from torch import nn

from fixify import prediction
from fixify.heads import FixedClassifier, HeadSpec
from fixify.prediction import most_probable


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("after", [nn.Identity(), nn.Flatten(), Doubled()], ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("shape", [(3, 64), (3, 64, 1, 1)], ids=str)
def test_most_probable_classes_are_those_of_the_logits(after, shape, draw_features, monkeypatch):
    """With and without the logits of all classes; a head whose logits are changed afterwards needs them."""
    monkeypatch.setattr(prediction, "_MANY_CLASSES", 100)
    channel_dim = 1 if len(shape) == 4 else -1
    head = FixedClassifier(HeadSpec("hadamard", 64, 300), channel_dim=channel_dim)
    model = nn.Sequential(nn.ReLU(), head, after, nn.Flatten()).eval()
    x = draw_features(shape)
    with torch.inference_mode():
        expected = model(x).softmax(1).topk(5)
        calls = []
        monkeypatch.setattr(
            head, "top_k", lambda *args, **options: calls.append(1) or type(head).top_k(head, *args, **options)
        )
        found = most_probable(model, x, 5)
        assert len(calls) == (not isinstance(after, Doubled))
        torch.testing.assert_close(found.values, expected.values)
        assert torch.equal(found.classes, expected.indices)
        torch.testing.assert_close(model(x).softmax(1).topk(5).values, expected.values)


def test_few_classes_need_no_second_way(draw_features, monkeypatch):
    head = FixedClassifier(HeadSpec("hadamard", 64, 300)).eval()
    monkeypatch.setattr(head, "top_k", None)
    x = draw_features((3, 64))
    assert torch.equal(most_probable(head, x, 2).classes, head(x).topk(2).indices)


@pytest.fixture
def draw_features():
    return lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(0))
