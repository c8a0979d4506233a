"""The common base of the networks in this package: stem, stages, global average pooling, one linear classifier.

It also holds timm's records of how images are prepared for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from torch import Tensor, nn

# Per channel, over the 50,000 training images.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class ConvNet(nn.Module):
    """A convolutional classifier with timm's interface.

    `logits = fc(drop(pool(norm(stages(stem(images))))))`, images [B, in_chans, H, W], logits [B, num_classes].

    Args:
        stem: First layers.
        stages: One sequence of blocks for each resolution.
        widths: Output channels of each stage; the last is `num_features`.
        strides: Total stride of each stage's output, in pixels of the image.
        norm: Layer after the last stage; None for no layer.
        num_classes: Number of classes. With 0 there is no classifier, and `forward` returns the pooled features.
        in_chans: Channels of the images (the stem must match).
        global_pool: timm's pooling type; "" for no pooling.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        *,
        stem: nn.Sequential,
        stages: Sequence[nn.Sequential],
        widths: Sequence[int],
        strides: Sequence[int],
        norm: nn.Module | None = None,
        num_classes: int,
        in_chans: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = widths[-1]
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"stages.{index}"}
            for index, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity() if norm is None else norm
        self.global_pool, self.drop, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise convolutions as He et al. (2015) and their biases with 0; other layers keep torch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group the layers in their order, for layer-wise learning rates (timm's interface)."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, or remove it (0)."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, in_chans, H, W] to feature maps [B, num_features, H / stride, W / stride]."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map feature maps to logits [B, num_classes], or with `pre_logits` to pooled features [B, num_features]."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def cifar_cfg(num_classes: int, **changes: Any) -> dict[str, Any]:
    """Make timm's record for unscaled 32 x 32 images: CIFAR-10's statistics for 10 classes, else CIFAR-100's."""
    small = num_classes == 10
    return {
        "num_classes": num_classes,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR10_MEAN if small else CIFAR100_MEAN,
        "std": CIFAR10_STD if small else CIFAR100_STD,
        "first_conv": "stem.conv",
        "classifier": "fc",
    } | changes


def imagenet_cfg(**changes: Any) -> dict[str, Any]:
    """Make timm's record for the central 224 x 224 pixels of 256 x 256 images, with ImageNet's statistics."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "fc",
    } | changes
