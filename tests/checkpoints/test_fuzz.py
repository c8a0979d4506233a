"""Opening a damaged file gives a source or a SourceError, nothing else, and never runs code."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixify.checkpoints import Source, open_source
from fixify.checkpoints.metadata import facts_of_config, facts_of_metadata, facts_of_training
from fixify.errors import SourceError


def _valid(format: str) -> bytes:
    state = OrderedDict(
        [("module.conv.weight", torch.ones(2, 3, 1, 1)), ("module.bn.num_batches_tracked", torch.tensor(3))]
    )
    buffer = io.BytesIO()
    if format == "safetensors":
        return safetensors.torch.save(dict(state), metadata={"architecture": "resnet18"})
    tree = {"state_dict": state, "epoch": 3, "state_dict_ema": state, "metric": 0.5}
    torch.save(tree, buffer, _use_new_zipfile_serialization=format == "zip")
    return buffer.getvalue()


VALID = {format: _valid(format) for format in ("zip", "legacy", "safetensors")}


@st.composite
def damaged(draw: st.DrawFn, format: str) -> bytes:
    """A valid file with bits or bytes changed, and pieces removed, doubled, inserted or cut off."""
    content = bytearray(VALID[format])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        change = draw(st.sampled_from(["bit", "byte", "cut", "remove", "double", "insert"]))
        if not content:
            break
        if change == "bit":
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "byte":
            content[place] = draw(st.integers(0, 255))
        elif change == "cut":
            del content[place:]
        elif change == "remove":
            del content[place : place + draw(st.integers(1, 64))]
        elif change == "double":
            content[place:place] = content[place : place + draw(st.integers(1, 64))]
        else:
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
    return bytes(content)


def _source_or_refusal(path: Path, content: bytes, *, meta: bool, ema: bool) -> None:
    path.write_bytes(content)
    try:
        source = open_source(path, meta=meta, ema=ema)
    except SourceError as error:
        assert error.message
    else:
        assert isinstance(source, Source) and source.tensors
        for tensor in source.tensors.values():
            if not meta:
                assert tensor.numel() * tensor.element_size() <= 4 * len(content) + (1 << 20)
                tensor.sum()


@pytest.mark.parametrize("format", sorted(VALID))
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data(), meta=st.booleans(), ema=st.booleans())
def test_damage(tmp_path_factory: Any, format: str, data: st.DataObject, meta: bool, ema: bool) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged-{format}"
    _source_or_refusal(path, data.draw(damaged(format)), meta=meta, ema=ema)


@pytest.mark.parametrize("format", sorted(VALID))
def test_every_truncation(tmp_path: Path, format: str) -> None:
    content = VALID[format]
    for length in range(0, len(content), 1 if format != "zip" else 7):
        _source_or_refusal(tmp_path / "short", content[:length], meta=True, ema=False)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(content=st.binary(max_size=200), start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\0" * 8 + b"{"]))
def test_noise(tmp_path_factory: Any, content: bytes, start: bytes) -> None:
    _source_or_refusal(tmp_path_factory.getbasetemp() / "noise", start + content, meta=False, ema=False)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["resnet18", "a.b"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
_KEYS = (
    "architecture", "arch", "model", "num_classes", "label_names", "label_descriptions", "labels", "id2label",
    "pretrained_cfg", "model_args", "model_kwargs", "input_size", "mean", "std", "interpolation", "crop_pct", "tag",
    "in_chans", "img_size", "gp", "lr_scheduler", "best_acc1", "args",
)  # fmt: skip
_CONFIGS = st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=8)


def test_hints_nested_deeply() -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    facts = facts_of_config({"architecture": "test_vit", "model_args": {"a": deep}, "label_names": deep})
    assert facts.architecture_kwargs == {} and facts.labels is None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(config=_CONFIGS, nested=_CONFIGS)
def test_hints_of_any_shape(config: dict[str, Any], nested: dict[str, Any]) -> None:
    """A file may say anything about itself; the facts made from it have the declared types."""
    metadata = {key: str(value) for key, value in config.items()}
    for facts in (
        facts_of_config(config),
        facts_of_config({**config, "architecture": "test_vit", "pretrained_cfg": nested, "model_args": nested}),
        facts_of_training({**config, "args": argparse.Namespace(**nested, vit=1)}),
        facts_of_training({**config, "arch": "test_vit", "args": nested}),
        facts_of_metadata(metadata),
    ):
        assert facts.architecture is None or facts.architecture.startswith(("timm/", "torchvision/"))
        assert facts.num_classes is None or facts.num_classes > 0
        assert facts.labels is None or all(isinstance(label, str) for label in facts.labels)
        cfg = facts.pretrained_cfg or {}
        assert all(math.isfinite(value) for key in ("mean", "std") for value in cfg.get(key, []))
        json.dumps([cfg, facts.architecture_kwargs], allow_nan=False)
