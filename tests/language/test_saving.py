from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fixify.errors import FormatError
from fixify.heads.packed import unpack
from fixify.language import Corpus, LanguageOptions, load_language
from fixify.language.building import build_model
from fixify.language.saving import KEY, pack_signs, save_language


@pytest.mark.parametrize("words", ["learned", "tied", "orthogonal", "hadamard", "pmi"])
def test_what_is_read_is_what_was_written(corpus: Corpus, small: LanguageOptions, tmp_path: Path, words: str) -> None:
    options = LanguageOptions.create(**{**small.model_dump(), "words": words})
    model = build_model(options, corpus).eval()
    save_language(model, tmp_path / "model.safetensors", options, corpus.words, {"epoch": 3})
    loaded = load_language(tmp_path / "model.safetensors")
    assert loaded.words == corpus.words
    assert loaded.training == {"epoch": 3}
    assert loaded.options.recipe() == options.recipe()
    text = corpus.val[:20, None]
    assert torch.equal(loaded.model(text, loaded.model.start(1))[0], model(text, model.start(1))[0])
    shared = loaded.model.embedding.weight.data_ptr()
    assert (words == "learned") or any(
        parameter.data_ptr() == shared for parameter in loaded.model.classifier.parameters()
    )


@pytest.mark.parametrize("width", [8, 13])
def test_signs_are_bits(width: int) -> None:
    vectors = torch.randn(5, width)
    assert torch.equal(unpack(pack_signs(vectors), width, torch.float32), torch.where(vectors < 0, -1.0, 1.0))


def test_other_and_damaged_files_are_refused(corpus: Corpus, small: LanguageOptions, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be read"):
        load_language(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="not a language model"):
        load_language(path)
    save_language(build_model(small, corpus), path, small, corpus.words, {})
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[KEY])
    changes: list[tuple[dict[str, object], str, str]] = [
        ({"version": 2}, "", "of version 2"),
        ({"options": {"words": "glove"}}, "", "is damaged: words: must be"),
        ({}, "embedding.weight", "vectors of pmi are missing"),
        ({}, "layers.0.bias_ih_l0", "is damaged"),
    ]
    for change, gone, message in changes:
        kept = {name: tensor for name, tensor in tensors.items() if name != gone}
        safetensors.torch.save_file(kept, path, metadata={KEY: json.dumps({**about, **change})})
        with pytest.raises(FormatError, match=message):
            load_language(path)
