"""Observe a fixed model for a round trip, in this process or in a second one that sees only slim files.

Run as a script, this is the second process: it reads lines of JSON (path, pixels, seed) and answers each with one line.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from architecture_variants import UNSUITED, images
from torch import Tensor, nn

import fixify
from fixify.errors import FixifyError
from fixify.heads import FixedClassifier


def observe(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return the logits of a fixed model, digests of its heads' inputs, and outputs of heads that did not run."""
    heads = fixed_heads(model)
    with watched(heads) as seen:
        logits = model(x)
    idle = {}
    for path, head in heads.items():
        if path not in seen:  # auxiliary classifiers run in training only
            generator = torch.Generator().manual_seed(1)
            shape = (2, head.in_features, 1, 1) if head.channel_dim == 1 else (2, head.in_features)
            idle[path] = digest(head(torch.randn(shape, generator=generator)))
    return {
        "logits": [value.flatten().tolist() for value in tensors(logits)],
        "features": {path: digest(value) for path, value in seen.items()},
        "idle": idle,
    }


@contextmanager
def watched(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the input of each layer that runs, by its name."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0].clone()))
        for path, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def fixed_heads(model: nn.Module) -> dict[str, FixedClassifier]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FixedClassifier)}


def digest(values: Any) -> str:
    """Compute a digest of the bits of all tensors in an output."""
    found = hashlib.sha256()
    for value in tensors(values):
        found.update(str(tuple(value.shape)).encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


class Reader:
    """A second process that sees only slim files."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def read(self, slim: Path, pixels: int, seed: int) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, __file__]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"path": str(slim), "pixels": pixels, "seed": seed}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that loads died")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"loading: {answer['error']}")
        return answer

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def read_forever() -> None:
    """Answer each line of JSON with one line, as the second process."""
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            start = time.perf_counter()
            model: Any = fixify.load(asked["path"])
            seconds = time.perf_counter() - start
            with torch.inference_mode():
                answer = observe(model, images(model.fixify_info.architecture, asked["pixels"], asked["seed"]))
            answer["seconds"] = round(seconds, 2)
            del model
        except (FixifyError, *UNSUITED) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    read_forever()
