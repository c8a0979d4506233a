"""Language models with words that are not learned (Hoffer et al., section 3.3).

From here downwards nothing knows of images: a text becomes numbers (`corpus`), words get vectors (`vectors`), an LSTM
is put between them as embedding and as classifier (`network`, `building`), and trained (`loop`, `run`).
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
