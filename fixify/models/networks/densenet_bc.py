"""DenseNet-BC for CIFAR: Huang et al., "Densely connected convolutional networks" (CVPR 2017).

Depth 100, growth rate k = 12: three blocks of (100 - 4) / 6 = 16 bottleneck layers, transitions that halve the
channels, and 342 features. With 100 classes it has 800,032 parameters, as in Table 1 of *Fix your
classifier*.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from fixify.models.networks.convnet import ConvNet, cifar_cfg


def _norm_act_conv(in_channels: int, out_channels: int, kernel: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        bn=nn.BatchNorm2d(in_channels),
        act=nn.ReLU(inplace=True),
        conv=nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
    )


class DenseLayer(nn.Module):
    """A bottleneck of 4k channels, then k new feature maps, concatenated to the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(_norm_act_conv(in_channels, 4 * growth, 1))
        self.grow = nn.Sequential(_norm_act_conv(4 * growth, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, in + k, H, W]."""
        return torch.cat((x, self.grow(self.reduce(x))), dim=1)


class DenseNetBC(ConvNet):
    """Three dense blocks with transitions between them.

    Args:
        depth: 6n + 4 for n layers per block.
        growth: Number of new feature maps per layer, k.
        num_classes, in_chans, options: See `ConvNet`.
    """

    def __init__(self, depth: int, growth: int, *, num_classes: int, in_chans: int = 3, **options: Any) -> None:
        channels = 2 * growth
        stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)))
        stages, widths = [], []
        for index in range(3):
            layers: list[nn.Module] = []
            if index:
                layers.append(nn.Sequential(_norm_act_conv(channels, channels // 2, 1) | {"pool": nn.AvgPool2d(2)}))
                channels //= 2
            for _ in range((depth - 4) // 6):
                layers.append(DenseLayer(channels, growth))
                channels += growth
            stages.append(nn.Sequential(*layers))
            widths.append(channels)
        super().__init__(
            stem=stem,
            stages=stages,
            widths=widths,
            strides=(1, 2, 4),
            norm=nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(channels), act=nn.ReLU(inplace=True))),
            num_classes=num_classes,
            in_chans=in_chans,
            **options,
        )


default_cfgs = generate_default_cfgs({"densenet100_bc_cifar": cifar_cfg(100)})


@register_model
def densenet100_bc_cifar(pretrained: bool = False, **kwargs: Any) -> DenseNetBC:
    """DenseNet-BC (L = 100, k = 12) for 32 x 32 images, N = 342."""
    cfg = {"flatten_sequential": True, "out_indices": (0, 1, 2)}
    return build_model_with_cfg(
        DenseNetBC, "densenet100_bc_cifar", pretrained, feature_cfg=cfg, depth=100, growth=12, **kwargs
    )
