"""fixify.checkpoints.outline: tensors without values."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from fixify.checkpoints.keys import DTYPES
from fixify.checkpoints.outline import Outline, dtype_name, is_tensor, read_outlines
from fixify.errors import SourceError


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_it_answers_as_the_tensor(tmp_path: Path, dtype: str) -> None:
    tensor = torch.zeros(2, 3, dtype=getattr(torch, dtype))
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": tensor, "b": tensor[0, 0].clone()}, path, {"key": "value"})
    outlines, metadata = read_outlines(path)
    assert metadata == {"key": "value"}
    assert outlines == {"a": Outline.of(tensor), "b": Outline.of(tensor[0, 0])}
    outline = outlines["a"]
    assert (outline.ndim, outline.numel(), outline.element_size()) == (2, 6, tensor.element_size())
    assert (len(outline), dtype_name(outline), outline.is_meta) == (2, dtype, True)
    assert outline.is_floating_point() is tensor.is_floating_point()
    assert outline.reshape([6, 1]).shape == (6, 1)


def test_what_is_a_tensor() -> None:
    assert is_tensor(torch.zeros(1)) and is_tensor(Outline("float32", ()))
    assert not is_tensor([0.0]) and not is_tensor({"a": torch.zeros(1)})


def test_a_type_of_no_image_model(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(SourceError, match="F8_E4M3"):
        read_outlines(path)
