"""Fixed classifiers: codebooks that are rebuilt from a few bytes, and the layer that multiplies with them fast.

This package knows nothing of files, model libraries or the command line. Imports point downwards: `streams`,
`hadamard`, `codes`, `kinds`, `spec` and `product`, `statistics`, `layer`, `coherence`, `matching` and `encoding`,
`fitting`.
"""

from fixify.heads.coherence import Coherence, coherence, rankin_bound, welch_bound
from fixify.heads.encoding import BinaryCodes, encode
from fixify.heads.fitting import (
    FeatureStatistics,
    Fit,
    Replacement,
    feature_statistics,
    fit_,
    replacement,
)
from fixify.heads.hadamard import hadamard, is_constructible
from fixify.heads.kinds import KINDS, REFERENCE_CONSTRUCTION, Kind, StoredTensor, codebook, default_blocks, kind_of
from fixify.heads.layer import FixedClassifier, initial_scale
from fixify.heads.matching import Matching, match
from fixify.heads.product import unpack_signs
from fixify.heads.spec import HeadSpec, choose_kind

__all__ = [
    "KINDS",
    "REFERENCE_CONSTRUCTION",
    "BinaryCodes",
    "Coherence",
    "FeatureStatistics",
    "Fit",
    "FixedClassifier",
    "HeadSpec",
    "Kind",
    "Matching",
    "Replacement",
    "StoredTensor",
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
]
