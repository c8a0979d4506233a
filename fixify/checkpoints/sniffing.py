"""Tell what a file is from its first bytes. The content decides, not the extension."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NoReturn

from fixify._files import require_regular
from fixify.errors import SourceError

Kind = Literal["zip", "safetensors", "pickle"]

_HEAD = 512
_DOWNLOAD_AGAIN = "Download it again, and check that the link leads to the file itself."

# (first bytes, what the file is, what to do), for files that people really give to a checkpoint reader.
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer: a few lines of text in place of the weights",
        "Fetch the file itself: git lfs pull (in the repository), or download it from the web page of the repository.",
    ),
    (b"\x1f\x8b", "compressed with gzip", "Unpack it first: gunzip, or tar -xzf."),
    (b"\xfd7zXZ\x00", "compressed with xz", "Unpack it first: xz -d, or tar -xJf."),
    (b"BZh", "compressed with bzip2", "Unpack it first: bunzip2."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Unpack it first: zstd -d."),
    (b"\x89HDF\r\n", "an HDF5 file (Keras)", "fixify reads PyTorch and safetensors checkpoints."),
    (b"GGUF", "a GGUF file", "fixify reads PyTorch and safetensors checkpoints."),
    (b"\x93NUMPY", "a NumPy array", "If it is a matrix of class vectors: fixify convert FILE, or --classifier FILE."),
    (b"\x89PNG", "a PNG image", "Give the checkpoint; images go to fixify predict."),
    (b"\xff\xd8\xff", "a JPEG image", "Give the checkpoint; images go to fixify predict."),
    (b"%PDF", "a PDF document", "Give the checkpoint."),
)


def kind_of(path: Path) -> Kind:
    """Tell which reader a file needs.

    Returns:
        `zip` (what `torch.save` writes today), `safetensors`, or `pickle` (what `torch.save` wrote before PyTorch 1.6).

    Raises:
        SourceError: the file cannot be read, is empty, or is recognisably something else.
    """
    head, size = _head_of(path)
    if size == 0:
        raise SourceError(f"{path} is empty (0 bytes).", hint="The download or copy did not finish. Download it again.")
    for magic, what, hint in _FOREIGN:
        if head.startswith(magic):
            raise SourceError(f"{path} is not a checkpoint: it is {what}.", hint=hint)
    if head[257:262] == b"ustar":
        _refuse_tar(path)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if len(head) >= 9 and head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    text = _as_text(head)
    if text is not None:
        _refuse_text(path, text)
    if path.suffix == ".safetensors":
        return "safetensors"  # its reader reports what is wrong with the header
    return "pickle"  # old protocols have no magic number; torch's restricted reader decides


def _head_of(path: Path) -> tuple[bytes, int]:
    require_regular(path, SourceError)
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD), path.stat().st_size
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def _as_text(head: bytes) -> str | None:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # the invalid bytes are not just a character that was cut off at the end
            return None
        text = head[: error.start].decode("utf-8")
    return text if all(character.isprintable() or character.isspace() for character in text) else None


def _refuse_text(path: Path, text: str) -> None:
    start = text.lstrip().lower()
    if start.startswith(("<!doctype", "<html", "<?xml", "<head")):
        raise SourceError(
            f"{path} is not a checkpoint: it is a web page, probably an error page that was saved instead.",
            hint=_DOWNLOAD_AGAIN,
        )
    if start.startswith(("{", "[")):
        raise SourceError(
            f"{path} is not a checkpoint: it is JSON.",
            hint="For a Hugging Face model, give its folder. config.json is read from there.",
        )
    if not _could_be_pickle(text):
        line = text.strip().splitlines()[0][:60] if text.strip() else ""
        raise SourceError(f"{path} is not a checkpoint: it is text, starting {line!r}.", hint=_DOWNLOAD_AGAIN)


def _could_be_pickle(text: str) -> bool:
    # Protocol 0 is text: "(dp0\n", "cos\nsystem\n". The restricted reader names the globals that it asks for.
    first = text.split("\n", 1)[0]
    return text.startswith(("(", "c", "}", "]")) and len(first) < _HEAD and " " not in first and "\n" in text


def _refuse_tar(path: Path) -> NoReturn:
    raise SourceError(
        f"{path} is a tar archive. It holds either several files or a checkpoint of PyTorch before 0.1.10, which "
        "PyTorch's safe reader does not support.",
        hint=f"If it holds a checkpoint file, unpack it first: tar -xf {path.name}",
    )
