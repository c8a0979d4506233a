"""MobileNet: Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision applications".

arXiv 1704.04861, Table 1, at width 0.5: N = 512 features for 1,000 classes, as in section 4.2
of *Fix your classifier*.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from fixify.models.networks.convnet import ConvNet, imagenet_cfg

# Output channels of the separable convolutions at each resolution, for width 1.
_STAGES = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))


def _conv_bn_act(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), act=nn.ReLU(inplace=True)))


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            depthwise=_conv_bn_act(in_channels, in_channels, 3, stride, groups=in_channels),
            pointwise=_conv_bn_act(in_channels, out_channels, 1),
        )
    )


class MobileNet(ConvNet):
    """A sequence of depthwise separable convolutions.

    Args:
        width: Factor for the number of channels of every layer.
        num_classes, in_chans, options: See `ConvNet`.
    """

    def __init__(self, width: float, *, num_classes: int, in_chans: int = 3, **options: Any) -> None:
        channels = int(32 * width)
        stem = _conv_bn_act(in_chans, channels, 3, stride=2)
        stages, widths = [], []
        for index, outputs in enumerate(_STAGES):
            blocks = []
            for position, full in enumerate(outputs):
                blocks.append(_separable(channels, int(full * width), 2 if index and position == 0 else 1))
                channels = int(full * width)
            stages.append(nn.Sequential(*blocks))
            widths.append(channels)
        super().__init__(
            stem=stem,
            stages=stages,
            widths=widths,
            strides=(2, 4, 8, 16, 32),
            num_classes=num_classes,
            in_chans=in_chans,
            **options,
        )


default_cfgs = generate_default_cfgs({"mobilenet_v1_050": imagenet_cfg()})


@register_model
def mobilenet_v1_050(pretrained: bool = False, **kwargs: Any) -> MobileNet:
    """MobileNet with half its channels for ImageNet, N = 512 < C."""
    return build_model_with_cfg(
        MobileNet, "mobilenet_v1_050", pretrained, feature_cfg={"flatten_sequential": True}, width=0.5, **kwargs
    )
