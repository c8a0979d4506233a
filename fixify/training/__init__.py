"""The engine that trains and retrofits: `run_finetune` on files and names, `finetune` on a model and opened data."""

from fixify.training.api import run_finetune, run_train
from fixify.training.checkpointing import SaveModel
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
from fixify.training.interrupt import TrainingInterrupted
from fixify.training.options import FinetuneOptions, TrainOptions
from fixify.training.run import FinetuneResult, finetune
from fixify.training.run_folder import BEST_FILE, LAST_FILE, stored_options
from fixify.training.teacher import OtherModel

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
    "TrainOptions",
    "TrainingInterrupted",
    "Validated",
    "Warned",
    "finetune",
    "run_finetune",
    "run_train",
    "stored_options",
]
