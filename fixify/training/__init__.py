"""Train and retrofit classifiers: `finetune` takes files and names, `train_model` a model and opened data."""

from fixify.training.api import finetune, finetune_folder, train_from_scratch
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
from fixify.training.facts import Inputs, Machine, OpenedInputs, Recorded, RunFacts, RunOutput, SaveModel
from fixify.training.interrupt import TrainingInterrupted
from fixify.training.options import FinetuneOptions, TrainOptions
from fixify.training.run import FinetuneResult, train_model
from fixify.training.run_folder import BEST_FILE, LAST_FILE, stored_options
from fixify.training.teacher import ReferenceModel

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
    "Inputs",
    "LastBlockEpoch",
    "Listener",
    "Machine",
    "OpenedInputs",
    "OriginalEvaluated",
    "Recorded",
    "ReferenceModel",
    "RunFacts",
    "RunOutput",
    "RunStarted",
    "SaveModel",
    "Step",
    "TrainOptions",
    "TrainingInterrupted",
    "Validated",
    "Warned",
    "finetune",
    "finetune_folder",
    "stored_options",
    "train_from_scratch",
    "train_model",
]
