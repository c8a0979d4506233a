from __future__ import annotations

from pathlib import Path

import pytest

from fixify.errors import DataError
from fixify.language import read_corpus


def layout(folder: Path, train: str, val: str = "a\n", test: str = "a\n") -> str:
    for split, content in (("train", train), ("valid", val), ("test", test)):
        (folder / f"wiki.{split}.tokens").write_text(content)
    return str(folder)


def decoded(words: tuple[str, ...], numbers: object) -> list[str]:
    return [words[number] for number in numbers]  # type: ignore[attr-defined]


def test_wikitext_layout_is_cut_at_blanks_and_every_line_ends(tmp_path: Path) -> None:
    corpus = read_corpus(layout(tmp_path, " a b , a <unk>\n\n = c = \n", "a c\n", "b\n"))
    wanted = ["a", "b", ",", "a", "<unk>", "<eos>", "<eos>", "=", "c", "=", "<eos>"]
    assert decoded(corpus.words, corpus.train) == wanted
    assert decoded(corpus.words, corpus.val) == ["a", "c", "<eos>"]
    assert corpus.words[0] == "<eos>"  # the most frequent first
    assert dict(zip(corpus.words, corpus.counts.tolist(), strict=True)) == {
        "<eos>": 3, "=": 2, "a": 2, "<unk>": 1, ",": 1, "b": 1, "c": 1
    }  # fmt: skip


def test_words_of_validation_that_training_lacks_are_unknown_or_refused(tmp_path: Path) -> None:
    name = layout(tmp_path, "a b\n", "a z\n")
    with pytest.raises(DataError, match=r"val text .*'z'"):
        read_corpus(name)
    corpus = read_corpus(layout(tmp_path, "a b a <unk>\n", "a z\n"))
    assert decoded(corpus.words, corpus.val) == ["a", "<unk>", "<eos>"]


def test_rare_words_become_unknown_and_keep_their_count(tmp_path: Path) -> None:
    corpus = read_corpus(layout(tmp_path, "A a b c a\n", "b a\n"), min_count=2, lowercase=True)
    assert decoded(corpus.words, corpus.train) == ["a", "a", "<unk>", "<unk>", "a", "<unk>"]
    assert corpus.counts.sum() == len(corpus.train) == 6


def test_a_folder_of_text_holds_out_the_end_of_each_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("".join(f"It's line {name} {number}.\n\n" for number in range(20)))
    corpus = read_corpus(str(tmp_path), min_count=3)
    assert decoded(corpus.words, corpus.train)[:6] == ["It's", "line", "one", "<unk>", ".", "<eos>"]
    assert [len(part) for part in (corpus.train, corpus.val, corpus.test)] == [2 * 18 * 6, 2 * 6, 2 * 6]


def test_the_digest_is_of_the_words_and_of_each_part(tmp_path: Path) -> None:
    first = read_corpus(layout(tmp_path, "a b\n", "a\n", "b\n"))
    assert read_corpus(str(tmp_path)).digest == first.digest
    assert read_corpus(layout(tmp_path, "a b\n", "b\n", "b\n")).digest != first.digest
    assert read_corpus(layout(tmp_path, "a c\n", "a\n", "c\n")).digest != first.digest


def test_named_text_is_looked_for_in_the_data_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIXIFY_DATA", str(tmp_path))
    with pytest.raises(DataError, match="wikitext-2"):
        read_corpus("wikitext-2")
    (tmp_path / "wikitext-2").mkdir()
    layout(tmp_path / "wikitext-2", "a b\n")
    assert len(read_corpus("wikitext-2").words) == 3


@pytest.mark.parametrize(("files", "message"), [({}, "no text"), ({"a.txt": b"caf\xe9\n"}, "UTF-8 .* byte 3")])
def test_refusals(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_corpus(str(tmp_path))


def test_an_empty_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line\n")
    with pytest.raises(DataError, match="train"):
        read_corpus(str(tmp_path))
