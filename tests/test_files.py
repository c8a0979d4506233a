"""fixify._files: files are written whole, or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fixify._files import atomic_path, refuse_existing, sha256_of, write_atomic
from fixify.errors import OutputError, OutputExistsError


def test_written_whole_and_nothing_else_left(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.txt", "text")
    write_atomic(tmp_path / "b.bin", b"\0\1")
    assert (tmp_path / "a.txt").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_failure_keeps_the_old_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError("halfway")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_follows_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    target = tmp_path / "a.txt"
    target.write_text("old")
    with (
        pytest.raises(OutputError, match=r"a\.txt.*No space left on device"),
        atomic_path(target),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_existing_files_and_missing_folders_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    refuse_existing(target, force=False)
    target.write_text("old")
    with pytest.raises(OutputExistsError, match="--force"):
        refuse_existing(target, force=False)
    refuse_existing(target, force=True)
    with pytest.raises(OutputError, match="missing") as caught:
        refuse_existing(tmp_path / "missing" / "a.txt", force=False)
    assert f"mkdir -p {tmp_path / 'missing'}" in (caught.value.hint or "")
    with pytest.raises(OutputError, match="missing"), atomic_path(tmp_path / "missing" / "a.txt"):
        pass


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(data)
    seen: list[int] = []
    assert sha256_of(tmp_path / "a", seen.append) == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data)
