"""Fixed classifiers: codebooks that are rebuilt from a few bytes, and the layer that multiplies with them fast.

Knows nothing of files, model libraries or the command line.
"""

from fixify.heads.binary import BinaryCodes, encode
from fixify.heads.bounds import Coherence, coherence, rankin_bound, welch_bound
from fixify.heads.calibration import FeatureStatistics, Fit, feature_statistics, fit_
from fixify.heads.codebooks import codebook
from fixify.heads.matching import Matching, match
from fixify.heads.matrices import hadamard, is_constructible
from fixify.heads.module import FixedClassifier, initial_scale
from fixify.heads.replacement import Replacement, replacement
from fixify.heads.spec import KINDS, HeadSpec, choose_kind

__all__ = [
    "KINDS",
    "BinaryCodes",
    "Coherence",
    "FeatureStatistics",
    "Fit",
    "FixedClassifier",
    "HeadSpec",
    "Matching",
    "Replacement",
    "choose_kind",
    "codebook",
    "coherence",
    "encode",
    "feature_statistics",
    "fit_",
    "hadamard",
    "initial_scale",
    "is_constructible",
    "match",
    "rankin_bound",
    "replacement",
    "welch_bound",
]
