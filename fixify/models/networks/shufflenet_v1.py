"""ShuffleNet: Zhang et al., "ShuffleNet: an extremely efficient CNN for mobile devices" (arXiv 1707.01083), 3 groups.

As Zhang et al. describe it, with biases only in BatchNorm and a bottleneck of a quarter of a *unit's* output, it has
1,865,728 parameters. *Fix your classifier* prints 1,826,555. Variants differ in the stem (kernel, bias, BatchNorm), in
the bias and BatchNorm of each convolution, in whether the first convolution is grouped, and in the bottleneck's width.
tests/models/test_networks.py enumerates them, and only one gives the printed number:

- every convolution has a bias;
- the first convolution has no BatchNorm;
- the bottleneck is a quarter of the *branch's* output (with stride 2, the branch adds only the channels that the
  shortcut does not have);
- one single parameter is added, such as the scale of the fixed classifier. Every tensor of a ShuffleNet has an even
  number of elements, so an odd total needs it.

This module builds that network without the scale: 1,826,554 parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from fixify.models.networks.convnet import ConvNet, imagenet_cfg


class ShuffleUnit(nn.Module):
    """A branch of grouped 1x1, shuffle, depthwise 3x3 and grouped 1x1 convolutions, joined with a shortcut.

    With stride 1 the shortcut is added. With stride 2 it is average-pooled and concatenated.

    Args:
        in_channels, out_channels: Number of channels of the whole unit.
        groups: Groups of both 1x1 convolutions.
        stride: 1 or 2.
        first_groups: Groups of the first 1x1 convolution; 1 in the very first unit, whose input has few channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, stride: int = 1, first_groups: int | None = None
    ) -> None:
        super().__init__()
        branch = out_channels - in_channels if stride == 2 else out_channels
        middle = branch // 4
        self.reduce = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, middle, 1, groups=first_groups or groups),
                bn=nn.BatchNorm2d(middle),
                act=nn.ReLU(inplace=True),
                shuffle=nn.ChannelShuffle(groups),
            )
        )
        self.depthwise = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(middle, middle, 3, stride=stride, padding=1, groups=middle), bn=nn.BatchNorm2d(middle)
            )
        )
        self.expand = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(middle, branch, 1, groups=groups), bn=nn.BatchNorm2d(branch))
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, out, H / stride, W / stride]."""
        branch = self.expand(self.depthwise(self.reduce(x)))
        shortcut = self.pool(x)
        return self.act(torch.cat((shortcut, branch), dim=1) if self.stride == 2 else shortcut + branch)


class ShuffleNet(ConvNet):
    """Three stages of shuffle units.

    Args:
        groups: Groups of the 1x1 convolutions.
        widths: Number of channels of each stage.
        num_classes, in_chans, options: See `ConvNet`.
    """

    def __init__(
        self, groups: int, widths: tuple[int, int, int], *, num_classes: int, in_chans: int = 3, **options: Any
    ) -> None:
        channels = 24
        stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_chans, channels, 3, stride=2, padding=1), pool=nn.MaxPool2d(3, stride=2, padding=1)
            )
        )
        stages = []
        for index, (width, units) in enumerate(zip(widths, (4, 8, 4), strict=True)):
            first = ShuffleUnit(channels, width, groups, stride=2, first_groups=1 if index == 0 else None)
            stages.append(nn.Sequential(first, *(ShuffleUnit(width, width, groups) for _ in range(units - 1))))
            channels = width
        super().__init__(
            stem=stem,
            stages=stages,
            widths=widths,
            strides=(8, 16, 32),
            num_classes=num_classes,
            in_chans=in_chans,
            **options,
        )


default_cfgs = generate_default_cfgs({"shufflenet_v1_g3": imagenet_cfg()})


@register_model
def shufflenet_v1_g3(pretrained: bool = False, **kwargs: Any) -> ShuffleNet:
    """ShuffleNet 1x with 3 groups for ImageNet, N = 960; more than half of its parameters are the classifier's."""
    cfg = {"flatten_sequential": True, "out_indices": (0, 1, 2)}
    return build_model_with_cfg(
        ShuffleNet, "shufflenet_v1_g3", pretrained, feature_cfg=cfg, groups=3, widths=(240, 480, 960), **kwargs
    )
