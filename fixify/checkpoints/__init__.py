"""Open any checkpoint safely: a file, a folder or a model name becomes tensors and facts about the model.

The names are imported when they are first used: reading a header needs no torch.
"""

from typing import TYPE_CHECKING

from fixify._lazy import lazy

_EXPORTS = {
    "Source": "fixify.checkpoints.source",
    "check_finite": "fixify.checkpoints.source",
    "imagenet_labels": "fixify.checkpoints.labels",
    "named_model": "fixify.checkpoints.resolve",
    "open_source": "fixify.checkpoints.resolve",
    "read_class_map": "fixify.checkpoints.labels",
    "read_labels": "fixify.checkpoints.labels",
}

__all__ = [*_EXPORTS]  # noqa: PLE0604, RUF100
__getattr__, __dir__ = lazy(__name__, _EXPORTS)

if TYPE_CHECKING:
    from fixify.checkpoints.labels import imagenet_labels as imagenet_labels
    from fixify.checkpoints.labels import read_class_map as read_class_map
    from fixify.checkpoints.labels import read_labels as read_labels
    from fixify.checkpoints.resolve import named_model as named_model
    from fixify.checkpoints.resolve import open_source as open_source
    from fixify.checkpoints.source import Source as Source
    from fixify.checkpoints.source import check_finite as check_finite
