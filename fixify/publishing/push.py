"""Publish a slim checkpoint: as a repository of the Hugging Face hub, or as a folder with the same files.

The files are those that timm and the hub expect: model.safetensors, config.json and README.md.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from timm.models import get_pretrained_cfg

from fixify._files import unchanged, write_atomic
from fixify._values import shorten
from fixify._version import __version__
from fixify.checkpoints.files import CONFIG
from fixify.checkpoints.hub import TRANSPORT_ERRORS, first_line, why_unreachable
from fixify.checkpoints.in_timm import config_for_timm
from fixify.checkpoints.locate import HUB_SCHEMES, LOCAL_SCHEME, SLIM_WEIGHTS, locate_slim
from fixify.checkpoints.slim import SlimInfo, load
from fixify.description import LIBRARIES
from fixify.errors import FormatError, OutputError, OutputExistsError, UsageError
from fixify.publishing.card import check_licence, model_card

CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """The result of `push`.

    Attributes:
        name: How to open it: "hf-hub:organisation/name" or "local-dir:FOLDER".
        url: The address of the commit; None for a folder.
        commit: The commit; None for a folder.
        files: File name -> bytes.
        base_model: The repository of the model that was converted, if it has one.
        licence: The licence, if it is known.
        is_bare: Whether the checkpoint is a classifier without a network.
    """

    name: str
    url: str | None
    commit: str | None
    files: Mapping[str, int]
    base_model: str | None
    licence: str | None
    is_bare: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify push --json` prints."""
        return {
            "name": self.name,
            "url": self.url,
            "commit": self.commit,
            "files": dict(self.files),
            "base_model": self.base_model,
            "license": self.licence,
        }


@dataclass(frozen=True)
class _Target:
    """Where to publish: a repository, or a folder."""

    repo: str | None
    revision: str | None
    folder: Path | None

    @property
    def shown(self) -> str:
        """The name for the model card."""
        return self.repo or (self.folder or Path()).resolve().name


def push(
    target: str,
    checkpoint: str | Path,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    licence: str | None = None,
    force: bool = False,
) -> Pushed:
    """Publish a slim checkpoint on the Hugging Face hub, or write the same files to a folder.

    The checkpoint is checked first: its digest, its codebook, and that its tensors are those of its architecture. All
    files are sent in one commit. The token is the one of `hf auth login`, or HF_TOKEN.

    Args:
        target: "organisation/name", which is created if it does not exist, or "local-dir:FOLDER".
        checkpoint: A slim checkpoint.
        private: Create a private repository.
        revision: A branch other than main, which is created if it does not exist.
        message: Message of the commit; default: "Upload with fixify VERSION".
        licence: An identifier of the hub ("apache-2.0"); default: the licence of timm's weights that were converted.
        force: Replace these three files in a repository or folder that holds files already.

    Raises:
        FormatError, CodebookMismatchError: The checkpoint is not a slim one, or is damaged.
        UsageError: The name is not that of a repository, options do not go together, or there is no such licence.
        OutputExistsError: The repository or folder holds files already.
        OutputError: There is no token, it may not write there, or the hub cannot be reached.
    """
    where = _parse(target, revision)
    if where.folder is not None and (private or revision is not None or message is not None):
        raise UsageError("A folder has no --private, --revision and --message.", hint=f"Leave them out: {target}")
    given = None if licence is None else check_licence(licence)
    path = locate_slim(checkpoint)
    with unchanged(path, FormatError):
        info: SlimInfo = load(path, check=True).fixify_info  # type: ignore[assignment]
        base, known = _base_of(info)
        licence = given or known
        texts = {
            CONFIG: json.dumps(config_for_timm(info, licence=licence), indent=2) + "\n",
            CARD: model_card(info, where.shown, base_model=base, licence=licence),
        }
        if where.repo is not None:
            name, url, commit = _upload(where, path, texts, private=private, message=message, force=force)
        else:
            name, url, commit = _write(where.folder or Path(), path, texts, force=force), None, None
        sizes = {SLIM_WEIGHTS: path.stat().st_size, **{file: len(text.encode()) for file, text in texts.items()}}
    return Pushed(name, url, commit, sizes, base, licence, info.is_bare)


def _parse(target: str, revision: str | None) -> _Target:
    """Read the name of a repository or folder.

    Raises:
        UsageError: it is neither.
    """
    scheme, colon, rest = target.partition(":")
    if colon and scheme == LOCAL_SCHEME and rest:
        return _Target(None, None, Path(rest).expanduser())
    repo, at, branch = (rest if colon and scheme in HUB_SCHEMES else target).partition("@")
    if at and (not branch or revision not in (None, branch)):
        raise UsageError(f"{target!r} and --revision {revision} name two branches.", hint="Give one of them.")
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError
    except HFValidationError as error:
        raise UsageError(
            f"{target!r} is not the name of a repository of the Hugging Face hub.",
            hint="Write organisation/name or user/name; or local-dir:FOLDER for the same files in a folder.",
        ) from error
    return _Target(repo, branch or revision, None)


def _base_of(info: SlimInfo) -> tuple[str | None, str | None]:
    """Return the repository of the model that was converted, and its licence; None for what is not known.

    The name in the header is that of a model or repository only if it has a slash: a file's name has none.
    """
    name = str(info.source.get("name") or "")
    library, slash, rest = name.partition("/")
    if not slash:
        return None, None
    if library == "timm":
        try:
            cfg = get_pretrained_cfg(rest, allow_unregistered=True)
        except RuntimeError:  # no such tag
            return None, None
        return (None, None) if cfg is None else (cfg.hf_hub_id or None, _licence_of(cfg.license))
    if library in LIBRARIES:
        return None, None
    try:
        repo = name.partition("@")[0]
        validate_repo_id(repo)
    except HFValidationError:
        return None, None
    return repo, None


def _licence_of(text: str | None) -> str | None:
    return None if not text else check_licence(text)


def _write(folder: Path, weights: Path, texts: Mapping[str, str], *, force: bool) -> str:
    """Write the files to a folder, which is created if it does not exist."""
    try:
        held = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
        if held and not force:
            raise OutputExistsError(
                f"The folder {folder} holds {shorten(held)}.", hint="Choose another one, or add --force."
            )
        folder.mkdir(parents=True, exist_ok=True)
        data = weights.read_bytes()
    except OSError as error:
        raise OutputError(f"Cannot write to the folder {folder}: {error.strerror}.") from error
    write_atomic(folder / SLIM_WEIGHTS, data)
    for name, text in texts.items():
        write_atomic(folder / name, text)
    return f"{LOCAL_SCHEME}:{folder}"


def _upload(
    where: _Target, weights: Path, texts: Mapping[str, str], *, private: bool, message: str | None, force: bool
) -> tuple[str, str, str]:
    """Send the files in one commit.

    Returns:
        How to open the checkpoint, the address of the commit, and the commit.
    """
    repo, branch = where.repo or "", where.revision
    reason = why_unreachable()
    if reason is not None:
        raise _unreachable(repo, reason)
    if huggingface_hub.get_token() is None:
        raise OutputError(
            f"There is no token for {constants.ENDPOINT}, so nothing can be sent to {repo}.",
            hint="Log in: hf auth login. Or set HF_TOKEN to a token that may write.",
        )
    api = HfApi(library_name="fixify", library_version=__version__)
    with _explained(repo), _bars_on_terminals_only():
        parent = _prepare(api, repo, branch, private=private, force=force)
        operations = [CommitOperationAdd(SLIM_WEIGHTS, str(weights))]
        operations += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
        done = api.create_commit(
            repo,
            operations,
            commit_message=message or f"Upload with fixify {__version__}",
            revision=branch,
            parent_commit=parent,
        )
    name = f"hf-hub:{repo}" + (f"@{branch}" if branch else "")
    return name, str(done.commit_url), str(done.oid)


def _prepare(api: HfApi, repo: str, branch: str | None, *, private: bool, force: bool) -> str | None:
    """Create the repository and the branch, if they do not exist.

    Returns:
        The commit that the new one follows, so that nothing is replaced that somebody sends meanwhile; None if it was
        created here.

    Raises:
        OutputExistsError: it holds files, and `force` is False.
        UsageError: it is public, and `private` was asked for.
    """
    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private or None)
        if branch is not None:
            api.create_branch(repo, branch=branch)
        return None
    if private and not found.private:
        raise UsageError(
            f"{repo} exists and is public, and --private was given.",
            hint=f"Make it private first: {constants.ENDPOINT}/{repo}/settings. Or choose another name.",
        )
    if branch is not None:
        try:
            found = api.model_info(repo, revision=branch)
        except RevisionNotFoundError:
            api.create_branch(repo, branch=branch)  # from main; main stays as it is
            return None
    held = sorted(file.rfilename for file in found.siblings or [] if file.rfilename != ".gitattributes")
    if held and not force:
        raise OutputExistsError(
            f"{repo} exists already and holds {shorten(held)}.",
            hint="Add --force to replace model.safetensors, config.json and README.md, or use --revision BRANCH.",
        )
    return found.sha


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn the errors of the hub's client into one sentence with advice."""
    again = "Log in with a token that may write there: hf auth login"
    try:
        yield
    except RepositoryNotFoundError as error:
        raise OutputError(
            f"The Hugging Face hub has no repository {repo} that you may write to.", hint=again
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise OutputError(
                f"The hub does not accept the token, so nothing was sent to {repo}.", hint=again
            ) from error
        if status == 403:
            raise OutputError(f"Your token may not write to {repo}.", hint=again) from error
        if status in (409, 412):
            raise OutputError(
                f"{repo} was changed by somebody else meanwhile.", hint="Look at it, then push again."
            ) from error
        raise OutputError(f"The hub refused what was sent to {repo}: {first_line(error)}.") from error
    except TRANSPORT_ERRORS as error:
        raise _unreachable(repo, first_line(error.__cause__ or error)) from error
    except RuntimeError as error:  # what the client makes of a failed upload of a large file
        if not isinstance(error.__cause__, TRANSPORT_ERRORS):
            raise
        raise _unreachable(repo, first_line(error.__cause__)) from error


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Leave out the progress bars of the hub's client if stderr is no terminal."""
    if sys.stderr is None or sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _unreachable(repo: str, reason: str) -> OutputError:
    folder = repo.partition("/")[2]
    command = shlex.join(["hf", "upload", repo, folder])
    return OutputError(
        f"{constants.ENDPOINT} cannot be reached, so nothing was sent to {repo} ({reason}).",
        hint=f"Write the files to a folder: fixify push local-dir:{folder}\n"
        f"Then, on a machine with a network connection: {command}",
    )
