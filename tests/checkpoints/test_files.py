"""Open what training scripts save: the same tensors come out, under the model's own names."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import sys
import types
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.utils import CheckpointSaver
from torch.optim.swa_utils import AveragedModel

from fixify.checkpoints import Source, check_finite, open_source
from fixify.checkpoints.outline import Outline
from fixify.errors import SourceError

State = dict[str, torch.Tensor]


def same(source: Source, state: State) -> None:
    assert list(source.tensors) == list(state)
    for key, tensor in state.items():
        assert source.tensors[key].dtype == tensor.dtype
        assert torch.equal(source.tensors[key], tensor), key


def save(tree: Any, path: Path, **options: Any) -> Path:
    torch.save(tree, path, **options)
    return path


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_content_decides_not_the_extension(tmp_path: Path, resnet_state: State, name: str, zipped: bool) -> None:
    path = save(resnet_state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    source = open_source(path)
    same(source, resnet_state)
    assert source.name == name
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.num_bytes == path.stat().st_size
    assert not source.dropped and not source.used_ema and not source.has_ema


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_safetensors(tmp_path: Path, resnet_state: State, name: str) -> None:
    path = tmp_path / name
    safetensors.torch.save_file(resnet_state, path)
    source = open_source(path)
    assert set(source.tensors) == set(resnet_state)
    assert all(torch.equal(source.tensors[key], value) for key, value in resnet_state.items())


@pytest.mark.parametrize("format", ["zip", "legacy", "safetensors"])
def test_meta_has_names_shapes_and_dtypes_and_no_data(tmp_path: Path, resnet_state: State, format: str) -> None:
    path = tmp_path / "weights"
    if format == "safetensors":
        safetensors.torch.save_file(resnet_state, path)
    else:
        save(resnet_state, path, _use_new_zipfile_serialization=format == "zip")
    whole, header = open_source(path), open_source(path, meta=True)
    assert header.shapes == whole.shapes
    assert list(header.tensors) == list(whole.tensors)
    assert all(tensor.is_meta for tensor in header.tensors.values())
    assert all(header.tensors[key] == Outline.of(tensor) for key, tensor in whole.tensors.items())
    assert header.sha256 is None and header.num_bytes == whole.num_bytes


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "net.", "timm_model."],
)
def test_wrappers_come_off(tmp_path: Path, resnet_state: State, prefix: str) -> None:
    wrapped = OrderedDict((prefix + key, value) for key, value in resnet_state.items())
    same(open_source(save(wrapped, tmp_path / "w.pth")), resnet_state)


def test_compiled_and_checkpointed_parts_inside_the_model(tmp_path: Path, resnet_state: State) -> None:
    inner = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in resnet_state.items()}
    inner = {key.replace("layer2.0.", "layer2.0._checkpoint_wrapped_module."): v for key, v in inner.items()}
    assert inner.keys() != resnet_state.keys()
    same(open_source(save(inner, tmp_path / "w.pth")), resnet_state)


def test_a_wrapper_beside_a_loss_with_class_weights(tmp_path: Path, resnet_state: State) -> None:
    tree = {f"model.{key}": value for key, value in resnet_state.items()}
    tree["criterion.weight"] = torch.ones(10)
    tree["train_acc.correct"] = torch.tensor(5)
    source = open_source(save(tree, tmp_path / "w.pth"))
    same(source, resnet_state)
    assert source.dropped == ("criterion.weight", "train_acc.correct")


def test_a_classifier_outside_the_wrapper_is_not_thrown_away(tmp_path: Path, resnet_state: State) -> None:
    tree = {f"backbone.{key}": value for key, value in resnet_state.items() if not key.startswith("fc.")}
    tree["fc.weight"], tree["fc.bias"] = resnet_state["fc.weight"], resnet_state["fc.bias"]
    source = open_source(save(tree, tmp_path / "w.pth"))
    assert set(source.tensors) == set(tree)


def test_a_name_inside_and_outside_of_a_wrapper(tmp_path: Path, resnet_state: State) -> None:
    tree = resnet_state | {"_orig_mod.fc.bias": torch.zeros(10)}
    with pytest.raises(SourceError, match=r"fc\.bias"):
        open_source(save(tree, tmp_path / "w.pth"))


def test_timm_training_checkpoint(tmp_path: Path) -> None:
    """Written by timm's own saver."""
    model = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    average.module.fc.bias.data.add_(1.0)
    args = argparse.Namespace(
        model="test_resnet", num_classes=7, in_chans=1, mean=(0.5,), std=(0.25,), crop_pct=0.9, interpolation="",
        input_size=None, img_size=None, gp=None, model_kwargs={}, output=str(tmp_path),
    )  # fmt: skip
    saver = CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        args=args,
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(3, metric=71.5)
    path = tmp_path / "last.pth.tar"
    source = open_source(path)
    same(source, model.state_dict())
    assert source.facts.architecture == "timm/test_resnet"
    assert source.facts.architecture_kwargs == {"in_chans": 1}
    assert source.facts.num_classes == 7
    assert source.facts.pretrained_cfg == {"mean": [0.5], "std": [0.25], "crop_pct": 0.9}
    assert source.has_ema and not source.used_ema
    averaged = open_source(path, ema=True)
    same(averaged, average.module.state_dict())
    assert averaged.used_ema


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "test_vit", "img_size": 128}, {"img_size": 128}),
        ({"model": "test_vit", "input_size": (1, 96, 96)}, {"img_size": 96, "in_chans": 1}),
        ({"model": "test_resnet", "img_size": 128}, {}),
        ({"model": "test_resnet", "input_size": "large", "in_chans": -1}, {}),
        ({"model": "test_resnet", "gp": "max", "model_kwargs": {"drop": [1, 2], "odd": {1: 2}}},
         {"global_pool": "max", "drop": [1, 2]}),
    ],
)  # fmt: skip
def test_arguments_of_timms_training_script(
    tmp_path: Path, resnet_state: State, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    tree = {"arch": options["model"], "state_dict": resnet_state, "args": argparse.Namespace(**options)}
    source = open_source(save(tree, tmp_path / "w.pth"))
    assert source.facts.architecture == f"timm/{options['model']}"
    assert source.facts.architecture_kwargs == expected


def test_timm_checkpoint_without_args_names_a_class_which_is_no_architecture(
    tmp_path: Path, resnet_state: State
) -> None:
    tree = {"epoch": 1, "arch": "resnet", "state_dict": resnet_state, "version": 2, "optimizer": {"state": {}}}
    assert open_source(save(tree, tmp_path / "w.pth")).facts.architecture is None


def test_torchvision_reference_checkpoint(tmp_path: Path, resnet_state: State) -> None:
    model = torch.nn.Linear(2, 3)
    average = AveragedModel(model)
    average.module.weight.data.fill_(5.0)
    tree = {
        "model": {f"module.{key}": value for key, value in model.state_dict().items()},
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict(),
        "lr_scheduler": {"base_lrs": [0.1]},
        "epoch": 4,
        "args": argparse.Namespace(model="resnet18", data_path="/data", lr=0.1),
        "model_ema": average.state_dict(),
        "scaler": None,
    }
    path = save(tree, tmp_path / "model_4.pth")
    source = open_source(path)
    same(source, model.state_dict())
    assert source.facts.architecture == "torchvision/resnet18"
    assert source.facts.num_classes is None
    averaged = open_source(path, ema=True)
    same(averaged, average.module.state_dict())
    assert averaged.dropped == ("n_averaged",)


def test_pytorch_imagenet_example(tmp_path: Path, resnet_state: State) -> None:
    tree = {
        "epoch": 90,
        "arch": "resnet18",
        "state_dict": {f"module.{key}": value for key, value in resnet_state.items()},
        "best_acc1": torch.tensor(69.7),
    }
    source = open_source(save(tree, tmp_path / "model_best.pth.tar"))
    same(source, resnet_state)
    assert source.facts.architecture == "torchvision/resnet18"


def test_lightning_checkpoint(tmp_path: Path, resnet_state: State) -> None:
    tree = {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": value for key, value in resnet_state.items()},
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
    }
    same(open_source(save(tree, tmp_path / "epoch=1.ckpt")), resnet_state)


def test_an_average_beside_the_model_in_one_state_dict(tmp_path: Path, resnet_state: State) -> None:
    tree = {f"model.{key}": value for key, value in resnet_state.items()}
    average = {key: value + 1 for key, value in resnet_state.items()}
    tree |= {f"model_ema.module.{key}": value for key, value in average.items()}
    tree["model_ema.n_averaged"] = torch.tensor(3)
    path = save({"state_dict": tree}, tmp_path / "w.ckpt")
    source = open_source(path)
    same(source, resnet_state)
    assert source.has_ema and not source.used_ema
    same(open_source(path, ema=True), average)


def test_only_an_average(tmp_path: Path, resnet_state: State) -> None:
    source = open_source(save({"state_dict_ema": resnet_state}, tmp_path / "w.pth"))
    same(source, resnet_state)
    assert source.used_ema


def test_no_average(tmp_path: Path, resnet_state: State) -> None:
    path = save({"state_dict": resnet_state}, tmp_path / "w.pth")
    with pytest.raises(SourceError, match=r"w\.pth") as caught:
        open_source(path, ema=True)
    assert "--ema" in (caught.value.hint or "")


def test_what_rides_along_is_read_past(tmp_path: Path, resnet_state: State) -> None:
    tree = {
        "state_dict": resnet_state,
        "metric": np.float64(0.5),
        "counts": defaultdict(list, {"a": [1]}),
        "history": np.arange(3),
        "output": Path("runs/1"),
        "started": datetime.datetime(2025, 1, 1, tzinfo=datetime.timezone.utc).replace(tzinfo=None),
        "took": datetime.timedelta(hours=1),
        "torch": torch.__version__,
        "random": np.random.RandomState(0).get_state(),
        "rng": torch.get_rng_state(),
    }
    same(open_source(save(tree, tmp_path / "w.pth")), resnet_state)


@pytest.mark.parametrize(
    "module",
    ["pytorch_lightning.utilities.parsing", "lightning.fabric.utilities.data", "lightning_fabric.utilities.data"],
)
def test_lightnings_hyper_parameters(
    tmp_path: Path, resnet_state: State, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """They are a dictionary class of Lightning, which need not be installed to read the file."""
    defining = types.ModuleType(module)
    defining.AttributeDict = type("AttributeDict", (dict,), {"__module__": module})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        parts = module.split(".")
        for depth in range(1, len(parts)):
            patch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        patch.setitem(sys.modules, module, defining)
        tree = {"state_dict": resnet_state, "hyper_parameters": defining.AttributeDict(lr=0.1, model={"name": "a"})}
        path = save(tree, tmp_path / "w.ckpt")
    same(open_source(path), resnet_state)


def test_entries_that_are_no_tensors_are_named(tmp_path: Path, resnet_state: State) -> None:
    tree = resnet_state | {"fc._extra_state": {"scale": 1.0}, "steps": 5, "nothing": None}
    source = open_source(save(tree, tmp_path / "w.pth"))
    same(source, resnet_state)
    assert source.dropped == ("fc._extra_state", "steps", "nothing")


def test_parameters_and_shared_and_transposed_tensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {"a": torch.nn.Parameter(shared), "b": shared, "c": shared.t(), "d": torch.arange(10.0)[3:5]}
    source = open_source(save(tree, tmp_path / "w.pth"))
    assert torch.equal(source.tensors["a"], shared) and torch.equal(source.tensors["b"], shared)
    assert torch.equal(source.tensors["c"], shared.t()) and source.tensors["d"].tolist() == [3.0, 4.0]
    assert not any(tensor.requires_grad for tensor in source.tensors.values())


def test_attributes_that_a_file_sets_do_no_harm(tmp_path: Path, resnet_state: State) -> None:
    """The safe reader builds OrderedDicts and Parameters with any attributes; they may hide methods."""

    class Crafted:
        def __reduce__(self) -> Any:
            return OrderedDict, (), {"items": 5, "keys": 5, "get": 5}, None, iter(resnet_state.items())

    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.__dict__.update(detach=5, numel=5)
    tree = {"state_dict": {"state_dict": Crafted()}, "model_ema": {"weight": parameter}}
    path = save(tree, tmp_path / "w.pth")
    same(open_source(path), resnet_state)
    same(open_source(path, ema=True), {"weight": torch.ones(2)})


def test_an_unaligned_archive(tmp_path: Path, resnet_state: State) -> None:
    """Other zip tools do not align the entries; the tensors are still right, at addresses that suit their dtype."""
    import zipfile

    path, packed = save(resnet_state, tmp_path / "w.pth"), tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(packed, "w") as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    source = open_source(packed)
    same(source, resnet_state)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in source.tensors.values())


def test_opening_leaves_the_allow_list_of_the_program_alone(tmp_path: Path, resnet_state: State) -> None:
    path = save({"state_dict": resnet_state, "args": argparse.Namespace(model="resnet18")}, tmp_path / "w.pth")
    before = set(torch.serialization.get_safe_globals())
    open_source(path)
    assert set(torch.serialization.get_safe_globals()) == before
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        open_source(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))


def test_the_real_lite0(lite0: Path) -> None:
    source = open_source(lite0)
    assert source.shapes["_fc.weight"] == (1000, 1280)
    assert source.facts.architecture is None and source.facts.labels is None
    assert sum(t.numel() for t in source.tensors.values() if t.is_floating_point()) > 4_652_008
    check_finite(source.tensors)


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("inf"), torch.bfloat16),
        (-float("inf"), torch.float16),
        (float("nan"), torch.float64),
    ],
)
def test_check_finite_names_the_tensor_and_the_element(bad: float, dtype: torch.dtype) -> None:
    tensors = {"a": torch.ones(3, dtype=dtype), "counter": torch.tensor(1), "b": torch.ones(4, 5, dtype=dtype)}
    check_finite(tensors)
    tensors["b"][1, 2] = bad
    with pytest.raises(SourceError, match=r" b .*\b7\b.*\b20\b"):
        check_finite(tensors)
    with pytest.raises(SourceError, match=r" b .*\b9\b.*\b20\b"):
        check_finite({"b": tensors["b"].t()})


def test_bounds_may_be_infinite() -> None:
    """timm's gemma4_vit clamps activations to scalars that are infinite unless it was trained with bounds."""
    check_finite({"proj.input_max": torch.tensor(float("inf")), "proj.input_min": torch.tensor(-float("inf"))})
    for name, value in (("proj.input_max", float("nan")), ("proj.scale", float("inf"))):
        with pytest.raises(SourceError, match=name):
            check_finite({name: torch.tensor(value)})


def test_check_finite_looks_beyond_the_first_piece() -> None:
    large = torch.zeros((1 << 22) + 5)
    large[-1] = float("nan")
    with pytest.raises(SourceError, match=rf" large .*\b{(1 << 22) + 4}\b"):
        check_finite({"large": large})
