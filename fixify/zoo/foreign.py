"""Naming schemes of other implementations, as far as they settle what shapes alone leave open.

A checkpoint with foreign key names is identified by the order of its shapes, and several architectures can have the
same. Some schemes belong to one implementation that is known to compute in one way; that decides between them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class NamingScheme:
    """Key names that one implementation uses.

    Attributes:
        name: The implementation.
        keys: Names that occur in every state dict of it, and together in no other known one.
        trait: The trait (see `fixify.zoo.traits`) that it settles.
        value: What the trait's value must contain.
        provenance: Where that is to be seen.
    """

    name: str
    keys: frozenset[str]
    trait: str
    value: str
    provenance: str


SCHEMES = (
    NamingScheme(
        name="efficientnet-pytorch",
        keys=frozenset({"_conv_stem.weight", "_bn0.weight", "_blocks.0._depthwise_conv.weight", "_conv_head.weight"}),
        trait="padding",
        value="as TensorFlow",
        # Also the naming of its fork github.com/ml-illustrated/EfficientNet-Lite-PyTorch. Every convolution of both
        # comes from `get_same_padding_conv2d`; their weights are ports of the TensorFlow checkpoints.
        provenance="https://github.com/lukemelas/EfficientNet-PyTorch/blob/master/efficientnet_pytorch/model.py",
    ),
)


def recognise(keys: Collection[str]) -> NamingScheme | None:
    """The naming scheme of these keys, if it is a known one."""
    present = set(keys)
    return next((scheme for scheme in SCHEMES if scheme.keys <= present), None)
