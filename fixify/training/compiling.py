"""torch.compile, whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fixify.errors import TrainingError


def compile_(model: nn.Module) -> None:
    """Compile a model in place: its type, modules and state dict stay as they are.

    Whatever changes the model's modules or hooks has to be done before. The work itself happens in the first forward
    passes, inside `compiling`.

    No sizes are left open: with them, what a training step is compiled to would depend on whether validation, whose
    last batch is smaller, came before it, and a resumed run would differ in its last bits.
    """
    model.compile(fullgraph=True, dynamic=False)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Where compiled models are run.

    Raises:
        TrainingError: one cannot be compiled; nothing runs uncompiled instead.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield
    except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(
            f"This model cannot be compiled here: {first}",
            hint="Leave out --compile. On a CPU it needs a C++ compiler (g++, or another one in $CXX).",
        ) from error
