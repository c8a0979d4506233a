"""The engine that trains and retrofits: `run_finetune` on files and names, `finetune` on a model and opened data."""

from fixify.training.events import (
    Calibrated,
    EpochEnded,
    EpochRecord,
    EpochStarted,
    Evaluated,
    Evaluating,
    Event,
    LastBlockEpoch,
    Listener,
    OriginalEvaluated,
    RunStarted,
    Step,
    Validated,
    Warned,
)
from fixify.training.files import BEST_FILE, LAST_FILE
from fixify.training.interrupt import TrainingInterrupted
from fixify.training.keeping import SaveModel
from fixify.training.logging import stored_options
from fixify.training.options import FinetuneOptions
from fixify.training.others import OtherModel
from fixify.training.run import FinetuneResult, finetune
from fixify.training.slim import run_finetune

__all__ = [
    "BEST_FILE",
    "LAST_FILE",
    "Calibrated",
    "EpochEnded",
    "EpochRecord",
    "EpochStarted",
    "Evaluated",
    "Evaluating",
    "Event",
    "FinetuneOptions",
    "FinetuneResult",
    "LastBlockEpoch",
    "Listener",
    "OriginalEvaluated",
    "OtherModel",
    "RunStarted",
    "SaveModel",
    "Step",
    "TrainingInterrupted",
    "Validated",
    "Warned",
    "finetune",
    "run_finetune",
    "stored_options",
]
