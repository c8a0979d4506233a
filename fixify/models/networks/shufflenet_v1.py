"""ShuffleNet: Zhang et al., "ShuffleNet: an extremely efficient CNN for mobile devices" (arXiv 1707.01083), 3 groups.

As published, with biases only in BatchNorm and a bottleneck of a quarter of a *unit's* output, it has 1,865,728
parameters. The paper prints 1,826,555. Of all combinations of stem (kernel, bias, BatchNorm), biases and BatchNorm of
each convolution, grouped or plain first convolution and width of the bottleneck, one alone gives that number
(enumerated in tests/zoo/test_networks.py): every convolution has a bias, the first one no BatchNorm, the
bottleneck is a quarter of the *branch's* output (the units with stride 2 give only the channels that the shortcut does
not), and one single number more, as is the scale alpha of the fixed classifier, which must have been counted in. Every
tensor of a ShuffleNet has an even number of elements, so an odd total needs such a one. This is that network:
1,826,554 parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from fixify.models.networks.convnet import ConvNet, imagenet_cfg


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1: [B, in, H, W] to [B, out, H / s, W / s].

    With stride 2 the average-pooled input is put beside the branch's output instead of being added.

    Args:
        in_channels, out_channels: Of the whole unit.
        groups: Of both 1x1 convolutions.
        stride: 1 or 2.
        first_groups: Of the first 1x1 convolution: 1 in the very first unit, whose input has few channels.
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
        branch = self.expand(self.depthwise(self.reduce(x)))
        shortcut = self.pool(x)
        return self.act(torch.cat((shortcut, branch), dim=1) if self.stride == 2 else shortcut + branch)


class ShuffleNet(ConvNet):
    """Three stages of shuffle units.

    Args:
        groups: Of the 1x1 convolutions.
        widths: Channels of each stage.
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
    """ShuffleNet 1x with 3 groups for ImageNet, N = 960: more than half of it is classifier."""
    cfg = {"flatten_sequential": True, "out_indices": (0, 1, 2)}
    return build_model_with_cfg(
        ShuffleNet, "shufflenet_v1_g3", pretrained, feature_cfg=cfg, groups=3, widths=(240, 480, 960), **kwargs
    )
