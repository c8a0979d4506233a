"""Read the names that OpenMMLab's mmpretrain (mmcls before) gives to networks which timm has under other names.

Only networks that compute what timm's do are renamed: ConvNeXt, ViT and DeiT, and Swin. ResNet, RegNet and others
keep torchvision's names inside `backbone.`, and need no rule. Source: the networks of mmpretrain 1.2, models/backbones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# A tensor that shows the family: an attention in windows, and its second version.
_SWIN = re.compile(r"backbone\.stages\.0\.blocks\.0\.attn\.w_msa\.relative_position_bias_table")
_SWIN_V2 = re.compile(r"backbone\.stages\.\d+\.blocks\.\d+\.attn\.w_msa\.(?:logit_scale|cpb_mlp\..*)")
_CONVNEXT = re.compile(r"backbone\.stages\.0\.0\.depthwise_conv\.weight")
_VIT = re.compile(r"backbone\.layers\.0\.attn\.qkv\.weight")
_INDICES = re.compile(r"\.w_msa\.relative_position_index$")
# The layer that joins four patches: its input has the channels in the order of torch.nn.Unfold.
_UNFOLDED = re.compile(r"\.downsample\.(?:norm\.(?:weight|bias)|reduction\.weight)$")


@dataclass(frozen=True)
class Names:
    """The names of one file, renamed.

    Attributes:
        family: What the network is called, for messages.
        key_map: Name in the file -> name in timm's network. Indices that follow from the architecture are omitted.
        unfolded: Names in timm's network, for tensors whose last axis holds the channels of four patches in the order
            of `torch.nn.Unfold`: channel by channel, where timm has patch by patch.
    """

    family: str
    key_map: dict[str, str]
    unfolded: frozenset[str] = frozenset()


def openmmlab_names(names: Iterable[str]) -> Names | None:
    """Rename the tensors of a network of mmpretrain; None if they are of no family with a rule.

    >>> list(openmmlab_names(["backbone.stages.0.0.depthwise_conv.weight", "head.fc.weight"]).key_map.values())
    ['stages.0.blocks.0.conv_dw.weight', 'head.fc.weight']
    """
    names = list(names)
    if not all(name.startswith(("backbone.", "head.")) for name in names):
        return None
    for family, marker, rename in (
        ("Swin", _SWIN, _swin),
        ("ConvNeXt", _CONVNEXT, _convnext),
        ("ViT", _VIT, _vit),
    ):
        if any(marker.fullmatch(name) for name in names):
            key_map = {name: rename(name) for name in names if not _INDICES.search(name)}
            unfolded = frozenset(new for new in key_map.values() if family == "Swin" and _UNFOLDED.search(new))
            return Names(family, key_map, unfolded)
    return None


def patches_first(tensor: Tensor) -> Tensor:
    """Reorder the last axis of a tensor from `torch.nn.Unfold`'s order of the channels of 2 x 2 patches to timm's.

    Args:
        tensor: [..., 4 C]. Entry 4 c + 2 y + x belongs to channel c of the patch in row y, column x.

    Returns:
        The same shape. Entry (2 x + y) C + c belongs to that channel.

    >>> import torch
    >>> patches_first(torch.arange(8)).tolist()
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    by_patch = tensor.unflatten(-1, (-1, 2, 2)).movedim((-1, -2), (-3, -2))
    return by_patch.reshape(tensor.shape)


def is_swin_v2(names: Iterable[str]) -> bool:
    """Return whether the names are those of mmpretrain's Swin V2, for which there is no rule."""
    return any(_SWIN_V2.fullmatch(name) for name in names)


def _swin(name: str) -> str:
    name = name.removeprefix("backbone.")
    name = name.replace("patch_embed.projection.", "patch_embed.proj.").replace(".attn.w_msa.", ".attn.")
    name = _mlp(re.sub(r"^norm\d\.", "norm.", name))
    # mmpretrain makes an image smaller at the end of a stage, and timm at the start of the next one.
    return re.sub(
        r"^stages\.(\d+)\.(downsample)?",
        lambda found: f"layers.{int(found[1]) + (found[2] is not None)}.{found[2] or ''}",
        name,
    )


def _convnext(name: str) -> str:
    name = name.removeprefix("backbone.")
    name = re.sub(r"^downsample_layers\.0\.", "stem.", name)
    name = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", name)
    name = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
    name = re.sub(r"^norm\d\.", "head.norm.", name).replace(".depthwise_conv.", ".conv_dw.")
    name = name.replace(".pointwise_conv1.", ".mlp.fc1.").replace(".pointwise_conv2.", ".mlp.fc2.")
    return name.replace(".grn.gamma", ".mlp.grn.weight").replace(".grn.beta", ".mlp.grn.bias")


def _vit(name: str) -> str:
    name = name.removeprefix("backbone.")
    name = name.replace("patch_embed.projection.", "patch_embed.proj.")
    name = re.sub(r"^layers\.(\d+)\.", r"blocks.\1.", name)
    name = name.replace(".ln1.", ".norm1.").replace(".ln2.", ".norm2.")
    # After the last block: ln1 norms all tokens, and ln2 the mean of the patches.
    name = re.sub(r"^ln1\.", "norm.", re.sub(r"^ln2\.", "fc_norm.", name))
    name = re.sub(r"^head\.(?:layers\.head|fc)\.", "head.", name)
    return _mlp(name.replace(".attn.gamma1.weight", ".ls1.gamma").replace(".ffn.gamma2.weight", ".ls2.gamma"))


def _mlp(name: str) -> str:
    return name.replace(".ffn.layers.0.0.", ".mlp.fc1.").replace(".ffn.layers.1.", ".mlp.fc2.")
