"""fix_classifier_ and a forward pass: it replaces only a layer that produces the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import fixify
from fixify.errors import NoClassifierError
from fixify.heads import FixedClassifier
from fixify.models import find_classifiers
from fixify.models.influence import run_once


class Net(nn.Module):
    """A network of one convolution with two linear layers; `answer` is what it returns."""

    def __init__(self, answer: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)
        self.norm = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 9)
        self.other = nn.Linear(9, 5)
        self.second = nn.Linear(64, 4)
        self.answer = answer

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer(self, self.norm(self.conv(x)).mean((2, 3)))


def fixed(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, FixedClassifier)]


@pytest.mark.parametrize(
    "answer",
    [
        lambda net, f: net.fc(f),
        lambda net, f: net.fc(f).softmax(1),
        lambda net, f: net.fc(f).log_softmax(1),
        lambda net, f: net.fc(f).sigmoid(),
        lambda net, f: 3 * net.fc(f) + 1,
        lambda net, f: {"logits": net.fc(f), "features": f},
        lambda net, f: (net.fc(f), f),
    ],
    ids=["plain", "softmax", "log-softmax", "sigmoid", "scaled", "dictionary", "with features"],
)
def test_layers_that_produce_the_logits(answer: Callable) -> None:
    assert fixed(fixify.fix_classifier_(Net(answer), "orthogonal")) == ["fc"]


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (lambda net, f: net.other(net.fc(f).relu()), "9 values.* 5"),
        (lambda net, f: nn.functional.normalize(net.fc(f)), "changed further on"),
        (lambda net, f: (net.fc(f), net.second(f)), "several heads.*second"),
        (lambda net, f: {"a": net.second(f), "b": net.fc(f)}, "several heads.*second"),
        (lambda net, f: torch.cat([net.fc(f), net.second(f)], 1), "9 values.* 13"),
        (lambda net, f: net.second(f), "not used"),
    ],
    ids=["hidden", "normalised", "tuple of heads", "dictionary of heads", "joined heads", "unused"],
)
def test_layers_that_do_not(answer: Callable, named: str) -> None:
    model = Net(answer)
    with pytest.raises(NoClassifierError, match=f"fc .*{named}"):
        fixify.fix_classifier_(model)
    assert fixed(model) == []


HEADS = {
    "stacked": (lambda m: nn.Sequential(m.fc, nn.ReLU(), nn.Linear(1000, 10)), "fc.2"),
    "mlp": (lambda m: nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)), "fc.2"),
    "linear": (lambda m: nn.Linear(96, 10), "fc"),
    "dropout": (lambda m: nn.Sequential(nn.Dropout(0.5), nn.Linear(96, 1000)), "fc.1"),
    "norm": (lambda m: nn.Sequential(nn.BatchNorm1d(96), nn.Linear(96, 10)), "fc.1"),
    "layer norm": (lambda m: nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 10)), "fc.1"),
    "log-softmax": (lambda m: nn.Sequential(nn.Linear(96, 10), nn.LogSoftmax(1)), "fc.0"),
}


@pytest.mark.parametrize("name", HEADS)
def test_hand_made_heads_of_timm_models(name: str) -> None:
    make, path = HEADS[name]
    model = timm.create_model("test_resnet")
    model.fc = make(model)
    assert fixed(fixify.fix_classifier_(model)) == [path]
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000 if name == "dropout" else 10)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.LayerNorm, lambda n: nn.BatchNorm1d(n, affine=False, eps=1e-6)])
@pytest.mark.parametrize("kind", ["hadamard", "binary"])
def test_a_norm_before_the_classifier_is_kept(make: Callable[[int], nn.Module], kind: str) -> None:
    torch.manual_seed(0)
    norm = make(96)
    for tensor in (*norm.parameters(), *(buffer for buffer in norm.buffers() if buffer.ndim)):
        nn.init.uniform_(tensor, 0.5, 1.5)
    model: Any = timm.create_model("test_resnet").eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        model.fc = nn.Sequential(norm, nn.Linear(96, 10))
        fixify.fix_classifier_(model, kind)
        model.eval()
        assert torch.equal(model(images), model.fc[1](norm(features)))


def test_hand_made_head_of_a_model_that_cannot_be_run() -> None:
    model = timm.create_model("test_resnet").to("meta")
    assert fixed(fixify.fix_classifier_(model)) == ["fc"]
    model = timm.create_model("test_resnet").to("meta")
    model.fc = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)).to("meta")
    with pytest.raises(NoClassifierError, match=r"fc\.2"):
        fixify.fix_classifier_(model)


def test_a_head_that_get_classifier_does_not_understand() -> None:
    model = timm.create_model("convnext_atto")
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 7))
    with pytest.raises(NoClassifierError, match=r"get_classifier\(\)"):
        fixify.fix_classifier_(model)


@pytest.mark.parametrize(
    ("name", "width", "options"),
    [
        ("resnet50_clip.openai", 1024, {}),
        ("vit_pe_core_tiny_patch16_384.fb", 512, {"depth": 1}),
        ("convnext_base.clip_laion2b", 640, {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}),
    ],
)
def test_projections_of_other_towers(name: str, width: int, options: Any) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    with pytest.raises(NoClassifierError, match=f"{width:,} values"):
        fixify.fix_classifier_(model)


def test_projection_of_a_clip_tower() -> None:
    tower = timm.create_model("vit_xsmall_patch16_clip_224.tinyclip_yfcc15m")
    with pytest.raises(NoClassifierError, match=r"head is a projection.*512"):
        fixify.fix_classifier_(tower)
    tuned = timm.create_model("vit_xsmall_patch16_clip_224.tinyclip_yfcc15m", num_classes=10)
    assert fixed(fixify.fix_classifier_(tuned)) == ["head"]


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("timm", "test_vit"),  # one image size only
        ("timm", "levit_128s"),  # the mean of two heads
        ("timm", "efficientvim_m1"),  # four heads
        ("torchvision", "squeezenet1_1"),  # a map of logits, pooled
    ],
)
def test_the_classifiers_of_the_libraries_pass(library: str, name: str) -> None:
    model = (timm.create_model if library == "timm" else torchvision.models.get_model)(name, num_classes=7)
    paths = [site.path for site in find_classifiers(model)]
    found = run_once(model, paths)
    assert found is not None and all(found[path].reason is None for path in paths)


def test_the_forward_pass_changes_nothing() -> None:
    class Counting(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.fc(self.norm(self.conv(x)).mean((2, 3)) + torch.rand(1) * 0)

    model = Counting(lambda net, f: f)
    model.register_buffer("calls", torch.zeros(1))
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert run_once(model, ["fc"])["fc"].reason is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and not model.norm.training
    assert not model.fc._forward_hooks and not model.other._forward_hooks


def test_models_that_are_not_run() -> None:
    assert run_once(Net(lambda net, f: net.fc(f)).to("meta"), ["fc"]) is None
    assert run_once(nn.Module(), []) is None
    assert run_once(Net(lambda net, f: f.no_such_thing), ["fc"]) is None
    video = nn.Sequential(nn.Conv3d(3, 8, 3), nn.Linear(8, 2))
    assert run_once(video, ["1"]) is None
