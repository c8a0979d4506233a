"""The networks of the paper that neither timm nor torchvision has, registered with timm.

After `import fixify.models`, `timm.create_model("resnet56_cifar")` and `timm.list_models()` know them. `import fixify`
alone imports neither torch nor timm and registers nothing. No pretrained weights exist. For ResNet-50 and DenseNet-169
of the paper's Table 1, timm's own are used.
"""

from __future__ import annotations

from fixify.models.networks import densenet_bc, mobilenet_v1, residual, shufflenet_v1

# Their names in timm.
NETWORKS: tuple[str, ...] = tuple(
    sorted(name for module in (densenet_bc, mobilenet_v1, residual, shufflenet_v1) for name in module.default_cfgs)
)

__all__ = ["NETWORKS"]
