"""Train and retrofit classifiers: `finetune` takes files and names, `train_model` a model and opened data.

The names are imported when they are first used: the command line reads the option classes without torch.
"""

from typing import TYPE_CHECKING

from fixify._lazy import lazy

_EXPORTS = {
    "BEST_FILE": "fixify.training.run_folder",
    "LAST_FILE": "fixify.training.run_folder",
    "Calibrated": "fixify.training.events",
    "ClassifierConverted": "fixify.training.events",
    "EpochEnded": "fixify.training.events",
    "EpochRecord": "fixify.training.events",
    "EpochStarted": "fixify.training.events",
    "Evaluated": "fixify.training.events",
    "Evaluating": "fixify.training.events",
    "Event": "fixify.training.events",
    "FinetuneOptions": "fixify.training.options",
    "FinetuneResult": "fixify.training.run",
    "Inputs": "fixify.training.facts",
    "LastBlockEpoch": "fixify.training.events",
    "Listener": "fixify.training.events",
    "Machine": "fixify.training.facts",
    "OpenedInputs": "fixify.training.facts",
    "OriginalEvaluated": "fixify.training.events",
    "Recorded": "fixify.training.facts",
    "ReferenceModel": "fixify.training.teacher",
    "RunFacts": "fixify.training.facts",
    "RunOutput": "fixify.training.facts",
    "RateChosen": "fixify.training.events",
    "RunStarted": "fixify.training.events",
    "SaveModel": "fixify.training.facts",
    "Step": "fixify.training.events",
    "TrainOptions": "fixify.training.options",
    "TrainingInterrupted": "fixify.training.interrupt",
    "Validated": "fixify.training.events",
    "Warned": "fixify.training.events",
    "finetune": "fixify.training.api",
    "finetune_folder": "fixify.training.api",
    "stored_options": "fixify.training.run_folder",
    "train_from_scratch": "fixify.training.api",
    "train_model": "fixify.training.run",
}

__all__ = [*_EXPORTS]  # noqa: PLE0604, RUF100
__getattr__, __dir__ = lazy(__name__, _EXPORTS)

if TYPE_CHECKING:
    from fixify.training.api import finetune as finetune
    from fixify.training.api import finetune_folder as finetune_folder
    from fixify.training.api import train_from_scratch as train_from_scratch
    from fixify.training.events import Calibrated as Calibrated
    from fixify.training.events import ClassifierConverted as ClassifierConverted
    from fixify.training.events import EpochEnded as EpochEnded
    from fixify.training.events import EpochRecord as EpochRecord
    from fixify.training.events import EpochStarted as EpochStarted
    from fixify.training.events import Evaluated as Evaluated
    from fixify.training.events import Evaluating as Evaluating
    from fixify.training.events import Event as Event
    from fixify.training.events import LastBlockEpoch as LastBlockEpoch
    from fixify.training.events import Listener as Listener
    from fixify.training.events import OriginalEvaluated as OriginalEvaluated
    from fixify.training.events import RateChosen as RateChosen
    from fixify.training.events import RunStarted as RunStarted
    from fixify.training.events import Step as Step
    from fixify.training.events import Validated as Validated
    from fixify.training.events import Warned as Warned
    from fixify.training.facts import Inputs as Inputs
    from fixify.training.facts import Machine as Machine
    from fixify.training.facts import OpenedInputs as OpenedInputs
    from fixify.training.facts import Recorded as Recorded
    from fixify.training.facts import RunFacts as RunFacts
    from fixify.training.facts import RunOutput as RunOutput
    from fixify.training.facts import SaveModel as SaveModel
    from fixify.training.interrupt import TrainingInterrupted as TrainingInterrupted
    from fixify.training.options import FinetuneOptions as FinetuneOptions
    from fixify.training.options import TrainOptions as TrainOptions
    from fixify.training.run import FinetuneResult as FinetuneResult
    from fixify.training.run import train_model as train_model
    from fixify.training.run_folder import BEST_FILE as BEST_FILE
    from fixify.training.run_folder import LAST_FILE as LAST_FILE
    from fixify.training.run_folder import stored_options as stored_options
    from fixify.training.teacher import ReferenceModel as ReferenceModel
