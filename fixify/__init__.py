"""Replace the learned classifier of a pretrained image model with a fixed one that is rebuilt from a few bytes.

The method is Hoffer, Hubara & Soudry, "Fix your classifier" (ICLR 2018).

    import fixify

    fixify.convert("model.pth")                            # writes model.fixed.safetensors
    fixify.finetune("model.fixed.safetensors", "data")     # recovers the accuracy; data/ has train/ and val/
    fixify.evaluate("model.fixed.safetensors", "data")     # top-1, top-5, loss, calibration error
    fixify.export("model.fixed.safetensors", to="onnx")    # a file that ONNX Runtime runs without fixify
    model = fixify.load("model.fixed.safetensors")         # an ordinary nn.Module in eval mode
    fixify.push("organisation/name", "model.fixed.safetensors")  # then: fixify.load("hf-hub:organisation/name")
    fixify.fix_classifier_(timm_model, "hadamard")         # surgery in place, to train as you like
    fixify.report("resnet50").removable                    # 2_048_000 weights that a fixed head makes superfluous

Every command of the command line is a function of its name here (`fixify eval` is `fixify.evaluate`). The names are
imported when they are first used, so `import fixify` needs neither torch nor timm. timm knows the paper's own networks
(`timm.create_model("resnet56_cifar")`) once `fixify.models` is imported, by yourself or by any use of an architecture.
Slim checkpoints in a folder or on the hub (`fixify push`) it knows at once, whether timm was imported before or after:
`timm.create_model("hf-hub:organisation/name", pretrained=True)`.
"""

from typing import TYPE_CHECKING

from fixify._lazy import lazy
from fixify._timm import register_with_timm
from fixify._version import __version__

_EXPORTS = {
    "FixedClassifier": "fixify.heads",
    "FixifyError": "fixify.errors",
    "HeadSpec": "fixify.heads",
    "add_classes": "fixify.classes",
    "codebook": "fixify.heads",
    "compare": "fixify.comparing.compare",
    "convert": "fixify.conversion",
    "evaluate": "fixify.evaluation",
    "export": "fixify.exporting.export",
    "finetune": "fixify.training.api",
    "fix_classifier_": "fixify.surgery",
    "identify": "fixify.identification",
    "inspect": "fixify.inspection",
    "keep_classes": "fixify.classes",
    "load": "fixify.checkpoints.slim",
    "merge_classes": "fixify.classes",
    "plan": "fixify.reporting.costs",
    "predict": "fixify.prediction",
    "push": "fixify.publishing.push",
    "rename_classes": "fixify.classes",
    "report": "fixify.reporting.costs",
    "save": "fixify.checkpoints.slim",
    "train": "fixify.recipes.running",
    "verify": "fixify.verification",
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604, RUF100
__getattr__, __dir__ = lazy(__name__, _EXPORTS)
register_with_timm()

if TYPE_CHECKING:
    from fixify.checkpoints.slim import load as load
    from fixify.checkpoints.slim import save as save
    from fixify.classes import add_classes as add_classes
    from fixify.classes import keep_classes as keep_classes
    from fixify.classes import merge_classes as merge_classes
    from fixify.classes import rename_classes as rename_classes
    from fixify.comparing.compare import compare as compare
    from fixify.conversion import convert as convert
    from fixify.errors import FixifyError as FixifyError
    from fixify.evaluation import evaluate as evaluate
    from fixify.exporting.export import export as export
    from fixify.heads import FixedClassifier as FixedClassifier
    from fixify.heads import HeadSpec as HeadSpec
    from fixify.heads import codebook as codebook
    from fixify.identification import identify as identify
    from fixify.inspection import inspect as inspect
    from fixify.prediction import predict as predict
    from fixify.publishing.push import push as push
    from fixify.recipes.running import train as train
    from fixify.reporting.costs import plan as plan
    from fixify.reporting.costs import report as report
    from fixify.surgery import fix_classifier_ as fix_classifier_
    from fixify.training.api import finetune as finetune
    from fixify.verification import verify as verify
