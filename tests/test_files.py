"""fixify._files: files are written whole, or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fixify._files import atomic_path, refuse_existing, sha256_of, unchanged, write_atomic
from fixify.errors import OutputError, OutputExistsError, SourceError


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


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes are POSIX's")
def test_outputs_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "pipe", tmp_path / "link", tmp_path):
        for force in (False, True):
            with pytest.raises(OutputError):
                refuse_existing(path, force=force)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(OutputError):
            refuse_existing(path, force=True)
    with pytest.raises(OutputError), atomic_path(tmp_path / ("x" * 250)):
        pass


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's")
def test_a_link_that_leads_nowhere_is_a_file_that_exists(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "missing")
    with pytest.raises(OutputExistsError):
        refuse_existing(link, force=False)
    refuse_existing(link, force=True)
    with pytest.raises(OutputExistsError), atomic_path(link, force=False) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and list(tmp_path.iterdir()) == [link]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    with pytest.raises(OutputError):
        refuse_existing(tmp_path / "closed" / "a", force=True)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "a.txt"
    with pytest.raises(OutputExistsError), atomic_path(target, force=False) as temporary:
        temporary.write_text("mine")
        target.write_text("theirs")
    assert target.read_text() == "theirs" and list(tmp_path.iterdir()) == [target]
    target.unlink()
    with atomic_path(target, force=False) as temporary:
        temporary.write_text("mine")
    assert target.read_text() == "mine" and list(tmp_path.iterdir()) == [target]


def test_a_change_explains_the_failure_that_it_causes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    with unchanged(path, SourceError):
        path.read_text()
    with pytest.raises(SourceError, match="changed"), unchanged(path, SourceError):
        path.write_text("longer")
        raise ValueError("it cannot be parsed")
    with pytest.raises(KeyError), unchanged(path, SourceError):
        raise KeyError
