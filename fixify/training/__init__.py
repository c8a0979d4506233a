"""The engine that trains and retrofits: `finetune` on files and names, `train_model` on a model and opened data."""

from fixify.training.api import finetune, train_from_scratch
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
from fixify.training.run import FinetuneResult, train_model
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
    "train_model",
    "finetune",
    "train_from_scratch",
    "stored_options",
]
