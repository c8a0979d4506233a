from __future__ import annotations

from pathlib import Path

import pytest

from fixify.language import Corpus, LanguageOptions, read_corpus

SMALL = {"num_features": 16, "epochs": 2, "batch_size": 4, "seq_len": 7, "lr": 0.01, "device": "cpu"}


@pytest.fixture(scope="session")
def corpus(text: Path) -> Corpus:
    return read_corpus(str(text))


@pytest.fixture(scope="session")
def small() -> LanguageOptions:
    return LanguageOptions.create(words="pmi", **SMALL)
