"""fixify.checkpoints.extras: what a file holds besides the network is applied exactly, refused by name, or listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fixify.checkpoints import open_source
from fixify.checkpoints.learned import read_original
from fixify.checkpoints.open import open_model
from fixify.checkpoints.slim import read_info
from fixify.conversion import convert
from fixify.errors import SourceError
from fixify.identification import identify

State = dict[str, Tensor]
ARCH = "test_resnet"


def network(seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(ARCH, num_classes=10).eval()


def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def save(tree: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({key: value.clone() for key, value in tree.items()}, path)
    else:
        torch.save(tree, path)
    return path


def wrapped(model: nn.Module, **extra: Tensor) -> State:
    return {f"model.{key}": value for key, value in model.state_dict().items()} | extra


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("place", ["temperature", "scaler.temperature", "T"])
def test_a_temperature_divides_the_logits(tmp_path: Path, suffix: str, place: str) -> None:
    model = network()
    path = save(wrapped(model, **{place: torch.tensor([4.0])}), tmp_path / f"w{suffix}")
    with torch.no_grad():
        torch.testing.assert_close(open_model(path).model(images()), model(images()) / 4)
    assert any(place in text for text in read_original(path, meta=True).source.extras.applied)


@pytest.mark.parametrize("temperature", [2.5, torch.tensor(2.5), torch.tensor([2.5])])
def test_a_temperature_beside_the_state_dict(tmp_path: Path, temperature: Any) -> None:
    model = network()
    opened = open_model(save({"state_dict": model.state_dict(), "temperature": temperature}, tmp_path / "w.pth"))
    with torch.no_grad():
        torch.testing.assert_close(opened.model(images()), model(images()) / 2.5)
    assert any("2.5" in note for note in opened.notes)


def test_a_temperature_beside_names_without_a_wrapper(tmp_path: Path) -> None:
    path = save(network().state_dict() | {"temperature": torch.tensor(2.0)}, tmp_path / "w.pth")
    assert read_original(path).source.extras.temperature == 2


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_means_nothing(tmp_path: Path, bad: float) -> None:
    with pytest.raises(SourceError, match="temperature"):
        open_source(save(wrapped(network(), temperature=torch.tensor(bad)), tmp_path / "w.pth"))


def test_a_temperature_inside_an_attention_layer_is_the_networks_own(tmp_path: Path) -> None:
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=3)
    source = open_source(save(wrapped(model), tmp_path / "w.pth"))
    assert set(source.tensors) == set(model.state_dict()) and not source.extras.applied


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize(
    ("prefix", "mean", "std"),
    [
        ("model.", "normalize.mean", "normalize.std"),
        ("model.", "mean", "std"),
        ("model.", "mu", "sigma"),
        ("model.", "normalizer.new_mean", "normalizer.new_std"),
        ("module.model.", "module.pixel_mean", "module.pixel_std"),
        ("1.", "0.mean", "0.std"),
        ("", "norm_layer.mean", "norm_layer.std"),
    ],
)
def test_an_input_normalisation_is_the_preprocessing(
    tmp_path: Path, prefix: str, mean: str, std: str, scale: int
) -> None:
    state = {prefix + key: value for key, value in network().state_dict().items()}
    values = {key: scale * torch.tensor(numbers).view(1, 3, 1, 1) for key, numbers in ((mean, MEAN), (std, STD))}
    original = read_original(save(values | state, tmp_path / "w.pth"))
    assert original.architecture.ref == f"timm/{ARCH}"
    assert original.preprocessing["mean"] == pytest.approx(MEAN)
    assert original.preprocessing["std"] == pytest.approx(STD)
    assert any(mean in note and std in note for note in original.notes)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_an_input_normalisation_beside_the_state_dict(tmp_path: Path, kind: Any) -> None:
    tree = {"state_dict": network().state_dict(), "mean": kind(MEAN), "std": kind(STD)}
    original = read_original(save(tree, tmp_path / "w.pth"))
    assert original.preprocessing["mean"] == pytest.approx(MEAN)


@pytest.mark.parametrize("kind", [list, torch.tensor])
@pytest.mark.parametrize("key", ["mean", "std"])
def test_half_an_input_normalisation_is_refused(tmp_path: Path, key: str, kind: Any) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": network().state_dict(), key: kind(STD)}, path)
    with pytest.raises(SourceError, match=f"holds {key} "):
        read_original(path, meta=True)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.0), (0.5, -1.0), (0.5, 4.37), (1e6, 1.0), (float("nan"), 1.0)])
def test_an_input_normalisation_that_means_nothing(tmp_path: Path, mean: float, std: float) -> None:
    extra = {"normalize.mean": torch.full((3,), mean), "normalize.std": torch.full((3,), std)}
    with pytest.raises(SourceError, match=r"normalize\.mean"):
        open_source(save(wrapped(network(), **extra), tmp_path / "w.pth"))


@pytest.mark.parametrize("key", ["log_vars", "head_scale.alpha", "prior"])
def test_numbers_that_nobody_knows_are_refused_by_name(tmp_path: Path, key: str) -> None:
    path = save(wrapped(network(), **{key: torch.ones(10)}), tmp_path / "w.pth")
    with pytest.raises(SourceError, match=key) as caught:
        open_source(path)
    assert "torch.save" in (caught.value.hint or "")


def test_losses_metrics_and_counters_are_listed(tmp_path: Path) -> None:
    names = {
        "criterion.weight": torch.ones(10),
        "train_acc.correct": torch.tensor(3),
        "val_f1.tp": torch.ones(10),
        "epoch": torch.tensor(7),
    }
    path = save(wrapped(network(), **names), tmp_path / "w.pth")
    assert sorted(open_source(path).dropped) == sorted(names)
    for notes in (read_original(path, meta=True).notes, open_model(path).notes, identify(path).notes):
        assert any(all(name in note for name in names) for note in notes)
    slim = convert(path, tmp_path / "slim.fixed.safetensors").path
    assert sorted(read_info(slim).source["left_out"]) == sorted(names)


def test_a_loss_with_a_matrix_can_be_the_classifier(tmp_path: Path) -> None:
    path = save(wrapped(network(), **{"criterion.weight": torch.ones(10, 96)}), tmp_path / "w.pth")
    with pytest.raises(SourceError, match=r"criterion\.weight"):
        open_source(path)


@pytest.mark.parametrize("key", ["classifier", "fc", "linear", "arcface"])
def test_a_classifier_beside_the_state_dict_is_not_thrown_away(tmp_path: Path, key: str) -> None:
    tree = {"model": network().state_dict(), key: nn.Linear(96, 5).state_dict(), "optimizer": {"state": {}}}
    with pytest.raises(SourceError, match=key) as caught:
        open_source(save(tree, tmp_path / "w.pth"))
    assert key in (caught.value.hint or "")


def test_other_weights_in_the_file_are_listed(tmp_path: Path) -> None:
    plain, other = network().state_dict(), network(1).state_dict()
    tree = {"state_dict": plain, "best_state_dict": other, "ema_state_dict": other, "teacher": wrapped(network(), x=0)}
    source = open_source(save(tree, tmp_path / "w.pth"))
    assert torch.equal(source.tensors["fc.weight"], plain["fc.weight"]) and source.has_ema
    assert {text.split()[0] for text in source.beside} == {"best_state_dict", "ema_state_dict", "teacher"}
    assert any("--ema" in text for text in source.beside)


def test_an_average_of_mmengine_is_stored_in_place_of_the_weights(tmp_path: Path) -> None:
    average, plain = network().state_dict(), network(1).state_dict()
    inner = {f"module.{key}": value for key, value in plain.items()} | {"steps": torch.tensor(3)}
    tree = {"meta": {"mmengine_version": "0.10"}, "state_dict": average, "ema_state_dict": inner}
    path = save(tree, tmp_path / "w.pth")
    for ema in (False, True):
        source = open_source(path, ema=ema)
        assert torch.equal(source.tensors["fc.weight"], average["fc.weight"])
        assert source.used_ema == ema and any("ema_state_dict" in text for text in source.beside)


def test_copies_of_mmcvs_ema_hook_are_left_out(tmp_path: Path) -> None:
    state = network().state_dict()
    copies = {"ema_" + key.replace(".", "_"): value + 1 for key, value in state.items()}
    source = open_source(save({"state_dict": state | copies}, tmp_path / "w.pth"))
    assert set(source.tensors) == set(state) and set(source.dropped) == set(copies)


@pytest.mark.parametrize("tree", [{"module": 1}, {"module": 1, "ds_version": "0.14", "optimizer": None}])
def test_deepspeed(tmp_path: Path, tree: dict[str, Any]) -> None:
    state = network().state_dict()
    assert set(open_source(save(tree | {"module": state}, tmp_path / "w.pth")).tensors) == set(state)


def test_weights_at_an_unusual_place(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(save({"student": network().state_dict(), "epoch": 1}, tmp_path / "w.pth"))
    assert "['student']" in (caught.value.hint or "")


def _old_weight_norm(model: Any) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.fc)


def _trained_spectral_norm(model: Any) -> None:
    parametrizations.spectral_norm(model.fc)
    model.train()(torch.rand(4, 3, 64, 64))


def _old_spectral_norm(model: Any) -> None:
    nn.utils.spectral_norm(model.fc)
    model.train()(torch.rand(4, 3, 64, 64))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: parametrizations.weight_norm(model.fc),
        lambda model: parametrizations.weight_norm(model.fc, dim=1),
        lambda model: parametrizations.weight_norm(model.fc, dim=None),
        lambda model: parametrizations.weight_norm(model.conv1[0]),
        _old_weight_norm,
        _trained_spectral_norm,
        _old_spectral_norm,
        lambda model: prune.l1_unstructured(model.fc, "weight", amount=0.5),
    ],
)
def test_parametrized_weights_are_computed_as_torch_does(tmp_path: Path, change: Any, suffix: str) -> None:
    model = network()
    change(model)
    model.eval()
    with torch.no_grad():
        for parameter in model.fc.parameters():
            parameter.add_(0.1)  # the original weights are no longer normalised
    path = save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / f"w{suffix}")
    opened = open_model(path)
    with torch.no_grad():
        assert torch.equal(opened.model(images()), model(images()))
    assert opened.architecture.ref == f"timm/{ARCH}"
    assert set(read_original(path, meta=True).tensors) == set(opened.model.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: parametrizations.orthogonal(model.fc),
        lambda model: nn.utils.parametrize.register_parametrization(model.fc, "weight", nn.Identity()),
    ],
)
def test_parametrizations_of_other_kinds_are_refused_by_name(tmp_path: Path, change: Any) -> None:
    model = network()
    change(model)
    path = save(model.state_dict(), tmp_path / "w.pth")
    for use in (open_source, open_model, lambda path: convert(path, tmp_path / "x.fixed.safetensors", head="hadamard")):
        with pytest.raises(SourceError, match=r"fc\.weight") as caught:
            use(path)
        assert 'remove_parametrizations(model.fc, "weight")' in (caught.value.hint or "")


@pytest.mark.parametrize(
    "names",
    [
        ["base_model.model.fc.base_layer.weight", "base_model.model.fc.lora_A.default.weight"],
        ["fc.lora_A", "fc.lora_B"],
        ["base_model.model.fc.modules_to_save.default.weight", "base_model.model.fc.original_module.weight"],
        ["layer1.hada_w1_a", "layer1.hada_w2_b"],
        ["blocks.0.adapter.down.weight"],
    ],
)
def test_adapters_are_refused(tmp_path: Path, names: list[str]) -> None:
    state = network().state_dict() | {name: torch.ones(2, 2) for name in names}
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(SourceError) as caught:
            open_source(save(state, tmp_path / f"w{suffix}"))
        assert "merge_and_unload()" in (caught.value.hint or "")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("key", ["fc.weight", "fc.bias", "bn1.running_var"])
def test_integers_where_the_architecture_has_floats(tmp_path: Path, dtype: torch.dtype, key: str) -> None:
    model = network()
    state = model.state_dict()
    key = key if key in state else next(name for name in state if name.endswith("running_var"))
    for tree in (state, {"arch": ARCH, "state_dict": state}):
        state[key] = state[key].to(dtype)
        with pytest.raises(SourceError, match=key):
            read_original(save(tree, tmp_path / "w.pth"))


@pytest.mark.parametrize(("key", "value"), [("fc.weight", 1e20), ("fc.bias", -3e37), ("running_var", -1.0)])
def test_values_that_no_weight_has(tmp_path: Path, key: str, value: float) -> None:
    state = network().state_dict()
    name = next(name for name in state if name.endswith(key))
    state[name].view(-1)[0] = value
    path = save(state, tmp_path / "w.pth")
    with pytest.raises(SourceError, match=name):
        open_model(path)
    with pytest.raises(SourceError, match=name):
        convert(path, tmp_path / "x.fixed.safetensors")


@pytest.mark.parametrize("scale", ["fc.weight_scale", "fc.SCB", "fc.zero_point"])
def test_quantised_weights_with_their_scales(tmp_path: Path, scale: str) -> None:
    state = network().state_dict() | {"fc.weight": torch.zeros(10, 96, dtype=torch.int8), scale: torch.ones(10)}
    with pytest.raises(SourceError, match=r"fc\.weight"):
        open_source(save(state, tmp_path / "w.safetensors"))


@pytest.mark.parametrize("extra", [{"temperature": torch.ones(10)}, {"temperature": [1.0, 2.0]}])
def test_a_temperature_of_several_numbers_is_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="temperature"):
        open_source(save({"state_dict": network().state_dict(), **extra}, tmp_path / "w.pth"))


def test_numbers_without_bounds(tmp_path: Path) -> None:
    for extra in ({"temperature": 10**400}, {"mean": [10**400] * 3, "std": [1, 1, 1]}):
        with pytest.raises(SourceError):
            open_source(save({"state_dict": network().state_dict(), **extra}, tmp_path / "w.pth"))


def test_a_mean_without_a_standard_deviation_is_refused(tmp_path: Path) -> None:
    mean = torch.full((3,), 0.5)
    with pytest.raises(SourceError, match=r"normalize\.mean"):
        open_source(save(wrapped(network(), **{"normalize.mean": mean}), tmp_path / "w.pth"))
