"""fixify.conversion: what `convert` decides by itself, and says."""

from pathlib import Path

import pytest
import timm
import torch

from fixify.conversion import convert
from fixify.errors import HeadSpecError

WIDE = "vit_tiny_patch16_224,embed_dim=386,num_heads=2,depth=1,img_size=32"


def test_widths_without_a_hadamard_matrix_get_an_orthogonal_head(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=386, num_heads=2, depth=1, img_size=32, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    done = convert(tmp_path / "wide.pth", tmp_path / "out.fixed.safetensors", arch=WIDE)
    assert done.info.heads[0].spec.kind == "orthogonal"
    assert done.notes == ("head: orthogonal head, since no Hadamard matrix of order 386 is known here.",)
    with pytest.raises(HeadSpecError, match="386"):
        convert(tmp_path / "wide.pth", tmp_path / "other.fixed.safetensors", arch=WIDE, head="hadamard")
