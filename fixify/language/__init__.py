"""Language models with fixed word vectors (Hoffer et al., section 3.3).

Nothing here knows of images. A text becomes numbers (`corpus`), words get vectors (`vectors`), these are the embedding
and the classifier of an LSTM (`network`, `model`), which is trained (`loop`, `run`) and saved (`checkpoint`).
"""

from fixify.language.checkpoint import load_language
from fixify.language.corpus import Corpus, read_corpus
from fixify.language.options import LanguageOptions
from fixify.language.run import LanguageResult, run_language
from fixify.language.vectors import word_vectors

__all__ = [
    "Corpus",
    "LanguageOptions",
    "LanguageResult",
    "load_language",
    "read_corpus",
    "run_language",
    "word_vectors",
]
