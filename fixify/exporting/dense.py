"""Write a model for people who cannot change their loader: a folder that stock timm loads, with a learned-style head.

Where a head does not normalise its features it is an `nn.Linear`, exactly: `alpha Q (x - mean) / std + bias` has the
weights `alpha Q / std`. Otherwise the folder holds the backbone, with `num_classes=0`, and a small module beside it.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fixify._files import write_atomic
from fixify.errors import ExportError, OutputError, OutputExistsError
from fixify.exporting.check import EXACT, agreement, recorded
from fixify.exporting.job import Exported, Job, stored_dtype
from fixify.heads import FixedClassifier
from fixify.heads.statistics import floor_std
from fixify.models.architectures import build
from fixify.models.classifiers import find_classifiers
from fixify.surgery import replace_module

WEIGHTS, CONFIG, HEAD, MODULE = "model.safetensors", "config.json", "head.npz", "head.py"

_SOURCE = """# features = timm.create_model("local-dir:FOLDER", pretrained=True).eval()(images)
# logits = Head("FOLDER/head.npz")(features)

import numpy as np
import torch
import torch.nn.functional as F


class Head(torch.nn.Module):
    def __init__(self, file):
        super().__init__()
        for name, array in np.load(file).items():
            self.register_buffer(name, torch.from_numpy(array))

    def forward(self, x):
        x = F.normalize((x - self.mean) / self.std, dim=-1, eps=1e-6)
        return F.linear(x, self.weight, self.bias)
"""


def write_dense(job: Job, target: Path, batches: dict[str, Iterator[Tensor]], *, force: bool) -> Exported:
    """Write a model as a folder for stock timm; see `fixify.exporting.export.export`.

    Raises:
        ExportError: timm does not have the architecture, or the model with `num_classes=0` does not return what the
            head takes.
    """
    if job.info.projection is not None:
        raise ExportError(
            f"{job.opened.name} has a classifier behind its projection {job.info.projection}, which timm cannot build.",
            hint="Write it as ONNX (--to onnx), or for torch.export (--to torch-export).",
        )
    if job.info.architecture.library != "timm":
        raise ExportError(
            f"{job.info.architecture.ref} is not one of timm's models, and --to dense is for timm.",
            hint="Use --to onnx or --to torch-export.",
        )
    if target.exists() and not (force and target.is_dir()):
        raise OutputExistsError(f"{target} exists already.", hint="Choose another name with -o, or add --force.")
    name, images = next(iter(batches.items()))
    inputs = list(images)
    model = job.model
    with torch.inference_mode():
        expected = [model(batch).float() for batch in inputs]
    heads: dict[str, Any] = {record.path: model.get_submodule(record.path) for record in job.info.heads}
    notes = []
    if all(_fits_linear(path, head, job) for path, head in heads.items()):
        for path, head in heads.items():
            replace_module(model, path, _linear(head))
        num_classes, head_tensors = job.info.num_classes, None
        notes.append("The head is an nn.Linear with the same logits; the file no longer keeps the saving.")
    else:
        head_tensors = _head_tensors(heads)
        num_classes = 0
        notes.append(
            "The head normalises its features, which no nn.Linear does. The folder holds the backbone (num_classes=0), "
            f"and {MODULE} with {HEAD} computes the logits from its output."
        )
    tensors = _tensors(model, job, num_classes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_config(job, num_classes), indent=2))
        if head_tensors is not None:
            arrays: dict[str, Any] = {name: tensor.float().numpy() for name, tensor in head_tensors.items()}
            np.savez(folder / HEAD, **arrays)
            (folder / MODULE).write_text(_SOURCE)
        check = agreement(name, inputs, recorded(expected), _loaded(folder), allowed=EXACT)
        files = sorted(folder.iterdir(), key=lambda path: path.name)
        data = {file.name: file.read_bytes() for file in files if file.is_file()}
    try:
        target.mkdir(exist_ok=force)
    except OSError as error:
        raise OutputError(f"Cannot create the folder {target}: {error.strerror}.") from error
    for file_name, content in data.items():
        write_atomic(target / file_name, content)
    head_bytes = sum(head.codebook().nbytes for head in heads.values())
    return Exported((target,), sum(map(len, data.values())), head_bytes, (check,), tuple(notes))


def _fits_linear(path: str, head: FixedClassifier, job: Job) -> bool:
    """Check whether a head is an affine map, and the layer that timm builds there can hold its bias."""
    sites = {site.path: site for site in find_classifiers(build(job.info.architecture, num_classes=2, meta=True))}
    needs_bias = head.bias is not None or head.mean is not None
    return not head.spec.normalize and (sites[path].has_bias or not needs_bias)


def _affine(head: FixedClassifier) -> tuple[Tensor, Tensor]:
    """Compute weight [C, N] and bias [C] of an affine head in float64."""
    weight = head.codebook().double() * head.scale.detach().double()
    if head.std is not None:
        weight = weight / floor_std(head.std.detach()).double()
    bias = torch.zeros(head.out_features, dtype=torch.float64)
    if head.bias is not None:
        bias += head.bias.detach().double()
    if head.mean is not None:
        bias -= weight @ head.mean.detach().double()
    return weight, bias


def _linear(head: FixedClassifier) -> nn.Module:
    weight, bias = _affine(head)
    has_bias = head.bias is not None or head.mean is not None
    made: Any
    if head.channel_dim == 1:
        made = nn.Conv2d(head.in_features, head.out_features, 1, bias=has_bias)
    else:
        made = nn.Linear(head.in_features, head.out_features, bias=has_bias)
    with torch.no_grad():
        made.weight.copy_(weight.reshape(made.weight.shape))
        if has_bias:
            made.bias.copy_(bias)
    return made.eval()


def _head_tensors(heads: dict[str, FixedClassifier]) -> dict[str, Tensor]:
    if len(heads) > 1 or any(head.channel_dim == 1 or not head.spec.normalize for head in heads.values()):
        raise ExportError(
            "This model has several heads, or one on feature maps or without a bias, and none is an nn.Linear.",
            hint="Use --to onnx or --to torch-export.",
        )
    (head,) = heads.values()
    n, c = head.in_features, head.out_features
    return {
        "mean": torch.zeros(n) if head.mean is None else head.mean.detach().clone(),
        "std": torch.ones(n) if head.std is None else floor_std(head.std.detach()).clone(),
        "weight": (head.codebook().double() * head.scale.detach().double()).float(),
        "bias": torch.zeros(c) if head.bias is None else head.bias.detach().clone(),
    }


def _tensors(model: nn.Module, job: Job, num_classes: int) -> dict[str, Tensor]:
    """Return the state dict that timm's own model takes, in the stored type."""
    dtype = stored_dtype(job)
    wanted = build(job.info.architecture, num_classes=num_classes, meta=True).state_dict()
    have = model.state_dict()
    missing = sorted(set(wanted) - set(have))
    if missing:
        raise ExportError(
            f"timm's {job.info.architecture.name} with num_classes={num_classes} has a tensor {missing[0]} that this "
            "model lacks.",
            hint="Use --to onnx or --to torch-export.",
        )
    tensors = {key: have[key].detach().clone().contiguous() for key in wanted}
    heads = tuple(f"{record.path}." for record in job.info.heads)
    return {
        key: value.to(dtype) if value.is_floating_point() and not key.startswith(heads) else value
        for key, value in tensors.items()
    }


def _config(job: Job, num_classes: int) -> dict[str, Any]:
    """Return timm's config.json."""
    own = getattr(build(job.info.architecture, num_classes=num_classes, meta=True), "pretrained_cfg", None) or {}
    kept = {key: own[key] for key in ("first_conv", "classifier", "fixed_input_size") if own.get(key) is not None}
    config = {
        "architecture": job.info.architecture.name,
        "num_classes": num_classes,
        "pretrained_cfg": {**job.info.preprocessing, **kept, "num_classes": num_classes},
    }
    if job.info.architecture.kwargs:
        config["model_args"] = dict(job.info.architecture.kwargs)
    if job.info.labels is not None:
        config["label_names"] = job.info.labels
    return config


def _loaded(folder: Path) -> nn.Module:
    """Load a folder as its user does."""
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if not (folder / MODULE).exists():
        return _without_gradients(backbone)
    spec = importlib.util.spec_from_file_location("exported_head", folder / MODULE)
    if spec is None or spec.loader is None:
        raise ExportError(f"{MODULE} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _without_gradients(nn.Sequential(backbone, module.Head(folder / HEAD)))


def _without_gradients(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
