"""The paper's own networks that neither timm nor torchvision has, registered with timm.

`import fixify.models` (or anything of fixify that knows architectures) is enough for `timm.create_model("resnet56_cifar")`
and for `timm.list_models()`; `import fixify` alone imports neither torch nor timm, and so registers nothing. No
pretrained weights exist. ResNet-50 and DenseNet-169 of the paper's Table 1 are timm's own.
"""

from __future__ import annotations

from fixify.models.networks import densenet_bc, mobilenet_v1, residual, shufflenet_v1

NETWORKS: tuple[str, ...] = tuple(
    sorted(name for module in (densenet_bc, mobilenet_v1, residual, shufflenet_v1) for name in module.default_cfgs)
)
"""Their names, as timm knows them."""

__all__ = ["NETWORKS"]
