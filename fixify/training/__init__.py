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
from fixify.training.scratch import run_train
from fixify.training.slim import run_finetune
from fixify.training.train_options import TrainOptions

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
