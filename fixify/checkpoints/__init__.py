"""Open any checkpoint safely: a file, a folder or a model name becomes tensors and facts about the model."""

from __future__ import annotations

from fixify.checkpoints.labels import imagenet_labels, read_class_map, read_labels
from fixify.checkpoints.resolve import named_model, open_source
from fixify.checkpoints.source import Source, check_finite

__all__ = ["Source", "check_finite", "imagenet_labels", "named_model", "open_source", "read_class_map", "read_labels"]
