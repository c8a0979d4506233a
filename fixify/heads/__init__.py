"""Fixed classifiers: codebooks that are rebuilt from a few bytes, and the layer that multiplies with them fast.

This package knows nothing of files, model libraries or the command line. Imports point downwards, from `layer`,
`fitting` and `editing` to `codes` and `spec`; tests/heads/test_package.py has the order. The names are imported when
they are first used: `HeadSpec` needs neither torch nor NumPy.
"""

from typing import TYPE_CHECKING

from fixify._lazy import lazy

_EXPORTS = {
    "KINDS": "fixify.heads.kinds",
    "REFERENCE_CONSTRUCTION": "fixify.heads.kinds",
    "ArcFace": "fixify.heads.loss",
    "BinaryCodes": "fixify.heads.encoding",
    "Coherence": "fixify.heads.cosines",
    "CosFace": "fixify.heads.loss",
    "FeatureStatistics": "fixify.heads.fitting",
    "Fit": "fixify.heads.fitting",
    "FixedClassifier": "fixify.heads.layer",
    "HeadSpec": "fixify.heads.spec",
    "Kind": "fixify.heads.base_kind",
    "Margin": "fixify.heads.loss",
    "Matching": "fixify.heads.matching",
    "Replacement": "fixify.heads.fitting",
    "SoftTarget": "fixify.heads.loss",
    "StoredTensor": "fixify.heads.base_kind",
    "TopK": "fixify.heads.top_k",
    "choose_kind": "fixify.heads.spec",
    "codebook": "fixify.heads.kinds",
    "coherence": "fixify.heads.cosines",
    "default_blocks": "fixify.heads.kinds",
    "encode": "fixify.heads.encoding",
    "feature_statistics": "fixify.heads.fitting",
    "fit_": "fixify.heads.fitting",
    "hadamard": "fixify.heads.matrices",
    "initial_scale": "fixify.heads.layer",
    "is_constructible": "fixify.heads.constructions",
    "kind_of": "fixify.heads.kinds",
    "match": "fixify.heads.matching",
    "planned_coherence": "fixify.heads.cosines",
    "rankin_bound": "fixify.heads.cosines",
    "replacement": "fixify.heads.fitting",
    "unpack_signs": "fixify.heads.signs",
    "welch_bound": "fixify.heads.cosines",
    "wide_blocks": "fixify.heads.kinds",
}

__all__ = [*_EXPORTS]  # noqa: PLE0604, RUF100
__getattr__, __dir__ = lazy(__name__, _EXPORTS)

if TYPE_CHECKING:
    from fixify.heads.base_kind import Kind as Kind
    from fixify.heads.base_kind import StoredTensor as StoredTensor
    from fixify.heads.constructions import is_constructible as is_constructible
    from fixify.heads.cosines import Coherence as Coherence
    from fixify.heads.cosines import coherence as coherence
    from fixify.heads.cosines import planned_coherence as planned_coherence
    from fixify.heads.cosines import rankin_bound as rankin_bound
    from fixify.heads.cosines import welch_bound as welch_bound
    from fixify.heads.encoding import BinaryCodes as BinaryCodes
    from fixify.heads.encoding import encode as encode
    from fixify.heads.fitting import FeatureStatistics as FeatureStatistics
    from fixify.heads.fitting import Fit as Fit
    from fixify.heads.fitting import Replacement as Replacement
    from fixify.heads.fitting import feature_statistics as feature_statistics
    from fixify.heads.fitting import fit_ as fit_
    from fixify.heads.fitting import replacement as replacement
    from fixify.heads.kinds import KINDS as KINDS
    from fixify.heads.kinds import REFERENCE_CONSTRUCTION as REFERENCE_CONSTRUCTION
    from fixify.heads.kinds import codebook as codebook
    from fixify.heads.kinds import default_blocks as default_blocks
    from fixify.heads.kinds import kind_of as kind_of
    from fixify.heads.kinds import wide_blocks as wide_blocks
    from fixify.heads.layer import FixedClassifier as FixedClassifier
    from fixify.heads.layer import initial_scale as initial_scale
    from fixify.heads.loss import ArcFace as ArcFace
    from fixify.heads.loss import CosFace as CosFace
    from fixify.heads.loss import Margin as Margin
    from fixify.heads.loss import SoftTarget as SoftTarget
    from fixify.heads.matching import Matching as Matching
    from fixify.heads.matching import match as match
    from fixify.heads.matrices import hadamard as hadamard
    from fixify.heads.signs import unpack_signs as unpack_signs
    from fixify.heads.spec import HeadSpec as HeadSpec
    from fixify.heads.spec import choose_kind as choose_kind
    from fixify.heads.top_k import TopK as TopK
