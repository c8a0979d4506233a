"""Train on very many synthetic identities, for a given time, on this machine.

    python tests/benchmarks/identities.py --classes 1000000 --seconds 150
    python tests/benchmarks/identities.py --classes 100000 --seconds 75
    python tests/benchmarks/identities.py --classes 100000 --seconds 75 --head learned

An identity is a point on the sphere in 512 dimensions. Its picture of 768 numbers is a fixed random nonlinear function
of the point, with noise, brightness and contrast that differ from picture to picture. Nothing is stored: pictures are
made from the class number and the seed. A network of two layers has to undo the picture.

The points are those of the Hadamard codes, so a fixed head knows where identities are that training never showed. This
measures the loss, its memory and its time, and is no comparison of accuracy on real faces: there, codes have to be
matched to the classes first. The learned head starts from random weights and has to see each class.

Prints one line of JSON: steps, top-1 over all classes on new pictures of random identities, chance, peak memory above
the interpreter, bytes of the trained model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.heads import FixedClassifier, HeadSpec
from fixify.heads.constructions import factorise
from fixify.heads.matrices import block_signs, rows

FEATURES, PIXELS, BATCH = 512, 768, 64
VALIDATED = 1024


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Pictures:
    """Makes pictures of identities, always the same for a seed."""

    def __init__(self, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.classes, construction = classes, factorise(FEATURES)
        blocks = torch.arange(-(-classes // (2 * FEATURES))).numpy()
        self.rows = torch.from_numpy(rows(construction, torch.arange(FEATURES).numpy()))
        self.signs = torch.from_numpy(block_signs(construction, 0, blocks)).to(torch.int8)
        self.render = torch.randn(FEATURES, PIXELS, generator=generator) * FEATURES**-0.5

    def batch(self, seed: int, size: int) -> tuple[Tensor, Tensor]:
        """Draw identities, [size], and a picture of each, [size, 768]."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(self.classes, (size,), generator=generator)
        block, index = labels // (2 * FEATURES), labels % (2 * FEATURES)
        points = (self.rows[index % FEATURES] * self.signs[block]).float() * (1 - 2 * (index // FEATURES))[:, None]
        contrast = 0.7 + 0.6 * torch.rand(size, 1, generator=generator)
        brightness = 0.2 * torch.randn(size, 1, generator=generator)
        noise = 0.3 * torch.randn(size, PIXELS, generator=generator)
        return torch.tanh(points @ self.render) * contrast + brightness + noise, labels


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(PIXELS, 1024), nn.LayerNorm(1024), nn.GELU(), nn.Linear(1024, FEATURES))


@torch.no_grad()
def top1(body: nn.Module, head: nn.Module, pictures: Pictures) -> float:
    right = 0
    for part in range(VALIDATED // BATCH):
        images, labels = pictures.batch(1_000_000_000 + part, BATCH)
        features = body(images)
        if isinstance(head, FixedClassifier):
            predicted = head.eval().top_k(features, 1).classes[:, 0]
        else:
            predicted = head(features).argmax(dim=1)
        right += int((predicted == labels).sum())
    return 100 * right / VALIDATED


def train(kind: str, classes: int, seconds: float, lr: float) -> dict[str, Any]:
    torch.manual_seed(0)
    before = status("VmRSS")
    body, pictures = network(), Pictures(classes)
    fixed = kind == "fixed"
    head: Any = FixedClassifier(HeadSpec("hadamard", FEATURES, classes)) if fixed else nn.Linear(FEATURES, classes)
    parameters = [{"params": body.parameters()}, {"params": head.parameters(), "lr": 10 * lr if fixed else lr}]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    started, step = time.perf_counter(), 0
    losses: list[float] = []
    while (elapsed := time.perf_counter() - started) < seconds:
        for group in optimiser.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * (1 - elapsed / seconds)
        images, labels = pictures.batch(step, BATCH)
        features = body(images)
        loss = head.train().loss(features, labels) if fixed else F.cross_entropy(head(features), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        step += 1
    trained = time.perf_counter() - started
    model = nn.ModuleList([body, head])
    return {
        "head": kind,
        "classes": classes,
        "steps": step,
        "seconds": round(trained, 1),
        "first_loss": round(losses[0], 3),
        "last_loss": round(sum(losses[-20:]) / len(losses[-20:]), 3),
        "top1": top1(body, head, pictures),
        "chance": 100 / classes,
        "peak_bytes": status("VmHWM") - before,
        "checkpoint_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "head_bytes": sum(tensor.nbytes for tensor in head.state_dict().values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--head", choices=["fixed", "learned"], default="fixed")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(train(given.head, given.classes, given.seconds, given.lr)))


if __name__ == "__main__":
    main()
