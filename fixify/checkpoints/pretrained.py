"""Open the pretrained weights of timm and torchvision by model name."""

from __future__ import annotations

import re
import sys
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import get_pretrained_cfg

from fixify import _files
from fixify.catalogue.signature import is_counter
from fixify.checkpoints.files import open_file
from fixify.checkpoints.hub import open_repository
from fixify.checkpoints.labels import imagenet_labels
from fixify.checkpoints.outline import AnyTensor, Outline
from fixify.checkpoints.source import Facts, Source
from fixify.errors import SourceError
from fixify.models.architectures import Architecture, build, preprocessing

# torch.hub's convention: "resnet50-0676ba61.pth" carries the start of its own SHA-256.
_HASHED_NAME = re.compile(r"-([0-9a-f]{8,})\.(?:pth|pt)(?:\.tar)?$")


def open_named(architecture: Architecture, *, ema: bool = False, meta: bool = False) -> Source:
    """Open the pretrained weights of an architecture.

    Args:
        architecture: The architecture. Its tag selects the weights; None is the library's default.
        ema: Read the moving average of the weights. The libraries' files hold none, so this raises `SourceError`.
        meta: Read only names, shapes and dtypes.

    Raises:
        SourceError: there are no such weights, or they are not in the library's cache and cannot be downloaded.
    """
    if architecture.library == "torchvision":
        return _open_torchvision(architecture, ema=ema, meta=meta)
    if architecture.library == "fixify":
        raise SourceError(
            f"There are no pretrained weights of {architecture.ref}.",
            hint="Train it (see fixify recipes ls), or give a checkpoint of your own.",
        )
    return _open_timm(architecture, ema=ema, meta=meta)


def facts_of_download(path: Path) -> Facts:
    """Return facts about a file of torchvision that was downloaded by hand, recognised by its name and SHA-256."""
    hashed = _HASHED_NAME.search(path.name)
    if hashed is None:
        return Facts()
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            if _file_name(weights.url) == path.name and _files.sha256_of(path).startswith(hashed[1]):
                return _torchvision_facts(Architecture("torchvision", name, tag=weights.name), weights)
    return Facts()


def _open_torchvision(architecture: Architecture, *, ema: bool, meta: bool) -> Source:
    weights = torchvision.models.get_model_weights(architecture.name)[architecture.tag or "DEFAULT"]
    tagged = Architecture("torchvision", architecture.name, architecture.kwargs, weights.name)
    source = _open_url(weights.url, tagged.ref, ema=ema, meta=meta)
    return replace(source, facts=_torchvision_facts(tagged, weights))


def _torchvision_facts(architecture: Architecture, weights: Any) -> Facts:
    categories = list(weights.meta["categories"])
    return Facts(
        architecture=architecture.ref,
        architecture_kwargs={**_torchvision_kwargs(architecture.name, weights), **architecture.kwargs},
        num_classes=len(categories),
        pretrained_cfg=dict(preprocessing(architecture)),
        labels=categories,
    )


def _torchvision_kwargs(name: str, weights: Any) -> dict[str, Any]:
    """Return the arguments that torchvision's builders set for given weights, besides the number of classes."""
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True}  # trained on images that were normalised differently; the model converts them
    if name.startswith("vit_") and weights.meta["min_size"][0] != 224:
        return {"image_size": weights.meta["min_size"][0]}
    return {}


def _open_timm(architecture: Architecture, *, ema: bool, meta: bool) -> Source:
    full_name = architecture.ref.removeprefix("timm/")
    cfg = get_pretrained_cfg(full_name)
    if cfg is None or not cfg.has_weights:
        others = timm.list_pretrained(f"{architecture.name}.*")
        raise SourceError(
            f"timm has no pretrained weights for {full_name}.",
            hint=f"It has weights for {', '.join(others)}." if others else "Give a checkpoint of your own.",
        )
    tagged = Architecture("timm", architecture.name, architecture.kwargs, cfg.tag or architecture.tag)
    if cfg.hf_hub_id:
        source = open_repository(cfg.hf_hub_id, ema=ema, meta=meta, name=tagged.ref, config=False)
    elif cfg.url.endswith(".npz"):
        raise SourceError(f"The weights of {tagged.ref} exist only as a JAX archive: {cfg.url}")
    else:
        source = _open_url(cfg.url, tagged.ref, ema=ema, meta=meta)
    facts = Facts(
        architecture=tagged.ref,
        architecture_kwargs=dict(architecture.kwargs),
        num_classes=cfg.num_classes,
        pretrained_cfg=dict(preprocessing(tagged)),
        labels=imagenet_labels(cfg.num_classes),
    )
    return replace(source, tensors=_as_timm_names(source, tagged), facts=facts)


def _as_timm_names(source: Source, architecture: Architecture) -> dict[str, AnyTensor]:
    """Return the tensors under timm's names.

    Some files have the names of the original code, which timm translates while loading. Only for those is the model
    built; its state dict is then what timm itself loads.
    """
    skeleton = build(architecture, meta=True)
    expected = {key: tuple(tensor.shape) for key, tensor in skeleton.state_dict().items() if not is_counter(key)}
    if {key: shape for key, shape in source.shapes.items() if not is_counter(key)} == expected:
        return source.tensors
    if next(iter(source.tensors.values())).is_meta:
        return {key: Outline.of(tensor) for key, tensor in skeleton.state_dict().items()}
    try:
        model = timm.create_model(
            architecture.ref.removeprefix("timm/"),
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": dict(source.tensors), "custom_load": False},
            **architecture.kwargs,
        )
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(f"The weights of {architecture.ref} are not what timm expects: {error}") from error
    return dict(model.state_dict())


def _open_url(url: str, name: str, *, ema: bool, meta: bool) -> Source:
    """Open a file from torch.hub's cache ($TORCH_HOME/hub/checkpoints), after downloading it if needed."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / _file_name(url)
    hashed = _HASHED_NAME.search(path.name)
    if not path.exists():
        _download(url, path, hashed[1] if hashed else None, name)
    source = open_file(path, ema=ema, meta=meta, name=name)
    if hashed and source.sha256 is not None and not source.sha256.startswith(hashed[1]):
        raise SourceError(
            f"{path} is damaged: its SHA-256 starts with {source.sha256[:8]}, but its name says {hashed[1]}.",
            hint=f"Remove it, and fixify downloads it again: {url}",
        )
    return source


def _download(url: str, path: Path, hash_prefix: str | None, name: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # no network, no space, another hash
        reason = getattr(error, "reason", None) or error
        raise SourceError(
            f"The weights of {name} are not in {path.parent}, and {url} could not be downloaded ({reason}).",
            hint=f"Download it on a machine with a network connection, and copy it to {path}",
        ) from error


def _file_name(url: str) -> str:
    return Path(urllib.parse.urlsplit(url).path).name
