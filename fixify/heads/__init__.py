"""Fixed classifiers: codebooks that are rebuilt from a few bytes, and the layer that multiplies with them fast.

This package knows nothing of files, model libraries or the command line. Imports point downwards: `streams`,
`hadamard`, `codes`, `kinds`, `spec` and `signs`, `product`, `statistics`, `normalisation`, `loss`, `prepared`,
`layer`, `timing`, `coherence` and `matching`, `fitting`.
"""

from fixify.heads.coherence import Coherence, coherence, rankin_bound, welch_bound
from fixify.heads.fitting import (
    BinaryCodes,
    FeatureStatistics,
    Fit,
    Replacement,
    encode,
    feature_statistics,
    fit_,
    replacement,
)
from fixify.heads.hadamard import hadamard, is_constructible
from fixify.heads.kinds import (
    KINDS,
    REFERENCE_CONSTRUCTION,
    Kind,
    StoredTensor,
    codebook,
    default_blocks,
    kind_of,
    wide_blocks,
)
from fixify.heads.layer import FixedClassifier, TopK, initial_scale
from fixify.heads.loss import ArcFace, CosFace, Margin, SoftTarget
from fixify.heads.matching import Matching, match
from fixify.heads.signs import unpack_signs
from fixify.heads.spec import HeadSpec, choose_kind

__all__ = [
    "KINDS",
    "REFERENCE_CONSTRUCTION",
    "ArcFace",
    "BinaryCodes",
    "Coherence",
    "CosFace",
    "FeatureStatistics",
    "Fit",
    "FixedClassifier",
    "HeadSpec",
    "Kind",
    "Margin",
    "Matching",
    "Replacement",
    "SoftTarget",
    "StoredTensor",
    "TopK",
    "choose_kind",
    "codebook",
    "coherence",
    "default_blocks",
    "encode",
    "feature_statistics",
    "fit_",
    "hadamard",
    "initial_scale",
    "is_constructible",
    "kind_of",
    "match",
    "rankin_bound",
    "replacement",
    "unpack_signs",
    "welch_bound",
    "wide_blocks",
]
