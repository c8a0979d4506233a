"""Residual networks with two-layer blocks: He et al., "Deep residual learning for image recognition" (CVPR 2016).

For CIFAR (section 4.2 there): a 3x3 convolution with 16 channels, then three stages of n blocks with 16, 32 and 64
channels; the depth is 6n + 2. The networks of He et al. have parameter-free shortcuts (option A: 853,018 parameters at
depth 56). The 855,770 parameters in *Fix your classifier* match projection shortcuts (option B) in the two blocks that
change the width.

`resnet18_050` stands for the "reduced version of ResNet where N = 256" of that paper's section 4.2. The paper does not
define it; here it is ResNet-18 with half its channels.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from fixify.models.networks.convnet import ConvNet, cifar_cfg, imagenet_cfg


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, with a projection where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, out, H / stride, W / stride]."""
        shortcut = self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)) + shortcut)


class ResNet(ConvNet):
    """Stages of basic blocks; every stage except the first halves the resolution.

    Args:
        depths: Number of blocks of each stage.
        widths: Number of channels of each stage; the stem has as many as the first stage.
        small_images: Use a 3x3 stem at full resolution (CIFAR) instead of 7x7 with stride 2 and max pooling.
        num_classes, in_chans, options: See `ConvNet`.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        small_images: bool,
        num_classes: int,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        kernel, stride = (3, 1) if small_images else (7, 2)
        stem: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(in_chans, widths[0], kernel, stride=stride, padding=kernel // 2, bias=False),
            bn=nn.BatchNorm2d(widths[0]),
            act=nn.ReLU(inplace=True),
        )
        if not small_images:
            stem["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
        stages, channels = [], widths[0]
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            first = BasicBlock(channels, width, stride=1 if index == 0 else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(width, width) for _ in range(depth - 1))))
            channels = width
        start = 1 if small_images else 4
        super().__init__(
            stem=nn.Sequential(stem),
            stages=stages,
            widths=widths,
            strides=[start * 2**index for index in range(len(widths))],
            num_classes=num_classes,
            in_chans=in_chans,
            **options,
        )


default_cfgs = generate_default_cfgs(
    {f"resnet{depth}_cifar": cifar_cfg(10) for depth in (20, 44, 56)} | {"resnet18_050": imagenet_cfg()}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ResNet:
    indices = tuple(range(len(kwargs["depths"])))
    cfg = {"flatten_sequential": True, "out_indices": indices}
    return build_model_with_cfg(ResNet, variant, pretrained, feature_cfg=cfg, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-20 for 32 x 32 images, N = 64: small enough to train on a CPU."""
    return _create("resnet20_cifar", pretrained, depths=(3, 3, 3), widths=(16, 32, 64), small_images=True, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-44 for 32 x 32 images, N = 64: the default depth of the paper's reference code."""
    return _create("resnet44_cifar", pretrained, depths=(7, 7, 7), widths=(16, 32, 64), small_images=True, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-56 for 32 x 32 images, N = 64: 855,770 parameters with 10 classes, as in the paper's Table 1."""
    return _create("resnet56_cifar", pretrained, depths=(9, 9, 9), widths=(16, 32, 64), small_images=True, **kwargs)


@register_model
def resnet18_050(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with half its channels for ImageNet, N = 256 < C."""
    widths = (32, 64, 128, 256)
    return _create("resnet18_050", pretrained, depths=(2, 2, 2, 2), widths=widths, small_images=False, **kwargs)
