"""Language models with fixed word vectors (Hoffer et al., section 3.3).

Nothing here knows of images. A text becomes word numbers (`corpus`), words get vectors (`vectors`), an LSTM stands
between them as embedding and as classifier (`network`, `model`), and is trained (`loop`, `run`). The names are imported
when they are first used: the command line reads the option class without torch.
"""

from typing import TYPE_CHECKING

from fixify._lazy import lazy

_EXPORTS = {
    "Corpus": "fixify.language.corpus",
    "LanguageOptions": "fixify.language.options",
    "LanguageResult": "fixify.language.run",
    "load_language": "fixify.language.checkpoint",
    "read_corpus": "fixify.language.corpus",
    "run_language": "fixify.language.run",
    "word_vectors": "fixify.language.vectors",
}

__all__ = [*_EXPORTS]  # noqa: PLE0604, RUF100
__getattr__, __dir__ = lazy(__name__, _EXPORTS)

if TYPE_CHECKING:
    from fixify.language.checkpoint import load_language as load_language
    from fixify.language.corpus import Corpus as Corpus
    from fixify.language.corpus import read_corpus as read_corpus
    from fixify.language.options import LanguageOptions as LanguageOptions
    from fixify.language.run import LanguageResult as LanguageResult
    from fixify.language.run import run_language as run_language
    from fixify.language.vectors import word_vectors as word_vectors
