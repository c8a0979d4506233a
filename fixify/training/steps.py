"""The thin log of steps: the loss and the head's scale, on a logarithmic axis (the paper's figure 1)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

_PER_DECADE = 32


@dataclass(frozen=True)
class StepRecord:
    """One line of steps.jsonl.

    Attributes:
        step: Updates of the weights since the start of the run.
        epochs: Epochs since the start of the run.
        loss: Mean training loss of the images since the record before it.
        lr: Learning rate of this update.
        scale: The head's learned scale alpha after it; None for other heads.
    """

    step: int
    epochs: float
    loss: float
    lr: float
    scale: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_logged(step: int) -> bool:
    """Whether a step is in the log: each of the first 14, then 32 a decade, so a million steps make 164 lines.

    Depends on nothing but the step: a run that was resumed logs what one that was never stopped does.
    """
    return step == 1 or (step > 1 and _slot(step) > _slot(step - 1))


def _slot(step: int) -> int:
    return math.floor(_PER_DECADE * math.log10(step) + 1e-9)
