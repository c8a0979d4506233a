"""Count the gradients that data-parallel training sends per step, with a learned and a fixed classifier.

The hook of `fixify.training.parallel` counts them while real processes train on random images (paper, section 4.1).

    torchrun --nproc-per-node 2 tests/benchmarks/sync_bytes.py resnet50 mobilenetv3_large_100:11221
"""

from __future__ import annotations

import sys

import timm
import torch
from torch import nn

from fixify import fix_classifier_
from fixify.training import FinetuneOptions, distributed
from fixify.training.parallel import ReplicatedModel

STEPS, IMAGES, SIDE = 2, 2, 64
CPU = torch.device("cpu")


def bytes_per_step(model: nn.Module, num_classes: int) -> tuple[float, float]:
    """Return the bytes of gradients and of running statistics."""
    options = FinetuneOptions(device="cpu")
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    replicas = ReplicatedModel(model.train(), options, CPU)
    for _ in range(STEPS):
        images, labels = torch.rand(IMAGES, 3, SIDE, SIDE), torch.randint(num_classes, (IMAGES,))
        nn.functional.cross_entropy(replicas(images), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
        replicas.after_update()
    gradients, statistics = replicas.bytes_per_update()
    assert gradients is not None and statistics is not None
    return gradients, statistics


def main(names: list[str]) -> None:
    with distributed.process_group(CPU):
        for name in names:
            architecture, _, classes = name.partition(":")
            num_classes = int(classes or 1000)
            learned = timm.create_model(architecture, num_classes=num_classes)
            before, _ = bytes_per_step(learned, num_classes)
            fix_classifier_(learned, "hadamard")
            after, statistics = bytes_per_step(learned, num_classes)
            if distributed.is_rank_zero():
                print(
                    f"{name}: learned {before:,.0f} bytes of gradients per step, fixed {after:,.0f} "
                    f"({after / before:.1%}); statistics of the head and the batch norms: {statistics:,.0f}"
                )


if __name__ == "__main__":
    main(sys.argv[1:])
