from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fixify.checkpoints.header import LANGUAGE_KEY
from fixify.errors import CodebookMismatchError, FormatError
from fixify.heads import HeadSpec, unpack_signs
from fixify.language import Corpus, LanguageOptions, load_language
from fixify.language.checkpoint import is_language, pack_signs, read_language_info, save_language, verify_language
from fixify.language.model import build_model, size_of


@pytest.mark.parametrize("words", ["learned", "tied", "orthogonal", "hadamard", "pmi"])
def test_what_is_read_is_what_was_written(corpus: Corpus, small: LanguageOptions, tmp_path: Path, words: str) -> None:
    options = LanguageOptions.create(**{**small.model_dump(), "words": words})
    model = build_model(options, corpus).eval()
    save_language(model, tmp_path / "model.safetensors", options, corpus.words, {"epoch": 3})
    loaded = load_language(tmp_path / "model.safetensors")
    assert is_language(tmp_path / "model.safetensors")
    assert loaded.info == read_language_info(tmp_path / "model.safetensors")
    assert loaded.info.words == corpus.words
    assert loaded.info.training == {"epoch": 3}
    assert loaded.info.options.recipe() == options.recipe()
    assert loaded.info.size == size_of(model, options)
    checks = verify_language(tmp_path / "model.safetensors")
    assert all(check.passed for check in checks)
    assert ("codebook" in [check.name for check in checks]) == (words in ("orthogonal", "hadamard"))
    text = corpus.val[:20, None]
    assert torch.equal(loaded.model(text, loaded.model.start(1))[0], model(text, model.start(1))[0])
    shared = loaded.model.embedding.weight.data_ptr()
    assert (words == "learned") or any(
        parameter.data_ptr() == shared for parameter in loaded.model.classifier.parameters()
    )


@pytest.mark.parametrize("width", [8, 13])
def test_signs_are_bits(width: int) -> None:
    vectors = torch.randn(5, width)
    assert torch.equal(unpack_signs(pack_signs(vectors), width, torch.float32), torch.where(vectors < 0, -1.0, 1.0))


def test_other_and_damaged_files_are_refused(corpus: Corpus, small: LanguageOptions, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load_language(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load_language(path)
    save_language(build_model(small, corpus), path, small, corpus.words, {})
    tensors = safetensors.torch.load(path.read_bytes())  # not mapped: the file is written anew
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[LANGUAGE_KEY])
    changes: list[tuple[dict[str, object], str, str]] = [
        ({"version": 2}, "", "version 2"),
        ({"options": {"words": "glove"}}, "", "words: must be"),
        ({"words": [*corpus.words, "more"]}, "", "classifier.bias is float32"),
        ({}, "embedding.weight", "embedding.weight is missing"),
        ({}, "layers.0.bias_ih_l0", "layers.0.bias_ih_l0 is missing"),
    ]
    for change, gone, message in changes:
        kept = {name: tensor for name, tensor in tensors.items() if name != gone}
        safetensors.torch.save_file(kept, path, metadata={LANGUAGE_KEY: json.dumps({**about, **change})})
        with pytest.raises(FormatError, match=message):
            load_language(path)


def test_sizes_that_only_the_header_claims_are_never_made(
    corpus: Corpus, small: LanguageOptions, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_language(build_model(small, corpus), path, small, corpus.words, {})
    tensors = safetensors.torch.load(path.read_bytes())
    claimed = {**small.recipe(), "num_features": 1 << 16, "num_layers": 64}
    about = {"version": 1, "options": claimed, "words": list(corpus.words)}
    safetensors.torch.save_file(tensors, path, metadata={LANGUAGE_KEY: json.dumps(about)})
    with pytest.raises(FormatError, match="should be float32"):  # four terabytes, were they made
        load_language(path)


def test_verify_tells_what_does_not_hold(corpus: Corpus, small: LanguageOptions, tmp_path: Path) -> None:
    options = LanguageOptions.create(**{**small.model_dump(), "words": "hadamard"})
    path = tmp_path / "model.safetensors"
    save_language(build_model(options, corpus), path, options, corpus.words, {})
    tensors = safetensors.torch.load(path.read_bytes())
    assert "embedding.weight" not in tensors and "classifier.codes" not in tensors
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[LANGUAGE_KEY])

    def failed(tensors: dict[str, torch.Tensor], **changed: object) -> list[str]:
        safetensors.torch.save_file(tensors, path, metadata={LANGUAGE_KEY: json.dumps({**about, **changed})})
        return [f"{check.name}: {check.detail}" for check in verify_language(path) if not check.passed]

    other = {**about["codebook"], "digest": f"sha256:{64 * '0'}"}
    assert failed(tensors, codebook=other)[0].startswith("codebook: The codebook is not what this head was")
    with pytest.raises(CodebookMismatchError):
        load_language(path)
    assert "values: classifier.scale holds a NaN" in failed({**tensors, "classifier.scale": torch.tensor(torch.nan)})[0]
    assert "tensors: " in failed({**tensors, "more": torch.zeros(1)})[0]
    with pytest.raises(FormatError, match="codebook"):
        failed(tensors, codebook=HeadSpec("hadamard", 16, 7).to_dict())


def test_vectors_that_lost_their_length_are_told(corpus: Corpus, small: LanguageOptions, tmp_path: Path) -> None:
    model = build_model(small, corpus)
    with torch.no_grad():
        model.embedding.weight[3] *= 2
    save_language(model, tmp_path / "model.safetensors", small, corpus.words, {})
    assert [check.name for check in verify_language(tmp_path / "model.safetensors") if not check.passed] == ["vectors"]


def test_a_flipped_bit_is_noticed(corpus: Corpus, small: LanguageOptions, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_language(build_model(small, corpus), path, small, corpus.words, {})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert [check.name for check in verify_language(path) if not check.passed] == ["digest"]
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key == LANGUAGE_KEY}
    safetensors.torch.save_file(safetensors.torch.load(path.read_bytes()), path, metadata)  # as older versions wrote it
    assert all(check.passed for check in verify_language(path))
