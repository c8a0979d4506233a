"""Open repositories of the Hugging Face hub, from its cache or by downloading them."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fixify.checkpoints.files import CONFIG, WEIGHTS, open_with_config, shards_of
from fixify.checkpoints.header import SLIM_KEY, has_metadata
from fixify.checkpoints.source import Source
from fixify.errors import SourceError

# The errors of the HTTP library that the client uses: requests before its version 1, httpx since.
TRANSPORT_ERRORS: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)


def open_repository(
    repo: str, *, ema: bool = False, meta: bool = False, name: str | None = None, config: bool = True
) -> Source:
    """Open the weights of a repository, and its config.json.

    Files in the cache are used without asking the hub; only missing files are downloaded into it.

    Args:
        repo: "organisation/name", or "organisation/name@revision" for a revision other than the main branch.
        ema: Read the moving average of the weights.
        meta: Read only names, shapes and dtypes.
        name: The name for messages and records; `repo` if None.
        config: Also fetch the config.json, if there is one.

    Raises:
        SourceError: the repository does not exist, holds no weights or needs permission, or the hub cannot be reached.
    """
    repo_id, _, revision = repo.partition("@")
    get = partial(_get, repo_id, revision or None)
    weights = _first_cached(repo_id, revision or None) or next((path for file in WEIGHTS if (path := get(file))), None)
    if weights is None:
        raise SourceError(
            f"The repository {repo_id} holds no weights that fixify reads.",
            hint=f"fixify looks for {', '.join(WEIGHTS)}. The model may belong to another library.",
        )
    if config:
        get(CONFIG)  # the cache keeps the files of a revision in one folder, so it is found beside the weights
    if weights.name.endswith(".index.json"):
        for shard in shards_of(weights):
            if get(shard) is None:
                raise SourceError(
                    f"{weights.name} of the repository {repo_id} names {shard}, which is not in the repository."
                )
    return open_with_config(weights, ema=ema, meta=meta, name=name or repo)


def slim_in_repository(repo: str) -> Path | None:
    """Return the slim checkpoint of a repository in its newest version; None if it holds none.

    The cached file is used if the hub is out of reach.

    Args:
        repo: See `open_repository`.

    Raises:
        SourceError: the repository does not exist or needs permission, or the hub cannot be reached.
    """
    repo_id, _, revision = repo.partition("@")
    if why_unreachable() is None:
        path = _newest(repo_id, revision or None, WEIGHTS[0])
    else:
        path = _get(repo_id, revision or None, WEIGHTS[0])
    return path if path is not None and has_metadata(path, SLIM_KEY) else None


def download(repo: str, file: str, *, cache_dir: str | Path | None = None) -> Path:
    """Return the newest version of a file of a repository, as timm gets it; the cached one if the hub is out of reach.

    Args:
        repo: See `open_repository`.
        file: Its name.
        cache_dir: Where to keep it; None for the hub's cache.

    Raises:
        SourceError: see `slim_in_repository`; or there is no such file.
    """
    repo_id, _, revision = repo.partition("@")
    found = _newest(repo_id, revision or None, file, cache_dir)
    if found is None:
        raise SourceError(f"The repository {repo_id} has no file {file}.")
    return found


def _newest(repo_id: str, revision: str | None, file: str, cache_dir: str | Path | None = None) -> Path | None:
    """Return the path of a file in the cache, after asking the hub for a newer one; None if the repository lacks it."""
    with explained(repo_id, revision):
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repo_id, file, revision=revision, cache_dir=cache_dir, library_name="fixify"
                )
            )
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return None


def _first_cached(repo_id: str, revision: str | None) -> Path | None:
    with explained(repo_id, revision):
        found = (huggingface_hub.try_to_load_from_cache(repo_id, file, revision=revision) for file in WEIGHTS)
        return next((Path(path) for path in found if isinstance(path, str)), None)


def _get(repo_id: str, revision: str | None, file: str) -> Path | None:
    """Return the path of a file in the cache, after downloading it if needed; None if the repository lacks it."""
    with explained(repo_id, revision):
        cached = huggingface_hub.try_to_load_from_cache(repo_id, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None:
            return None  # the cache has recorded that there is no such file
        _refuse_unreachable(repo_id, revision)
        try:
            return Path(huggingface_hub.hf_hub_download(repo_id, file, revision=revision, library_name="fixify"))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return None


@contextlib.contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of the hub's client into one sentence with advice."""
    try:
        yield
    except HFValidationError as error:
        raise SourceError(
            f"{repo_id!r} is not the name of a repository of the Hugging Face hub.",
            hint="Write it as hf-hub:organisation/name.",
        ) from error
    except GatedRepoError as error:
        raise SourceError(
            f"The repository {repo_id} requires accepting a licence first.",
            hint=f"Accept it at {constants.ENDPOINT}/{repo_id}, then: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"The repository {repo_id} has no revision {revision}.") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"The Hugging Face hub has no repository {repo_id}, or it is private.",
            hint="Check the name. For a private repository, log in: hf auth login",
        ) from error
    except TRANSPORT_ERRORS as error:
        raise _unreachable(repo_id, revision, first_line(error.__cause__ or error)) from error


def _refuse_unreachable(repo_id: str, revision: str | None) -> None:
    """Fail at once if there is no network. The hub's own client retries for 23 seconds."""
    reason = why_unreachable()
    if reason is not None:
        raise _unreachable(repo_id, revision, reason)


def why_unreachable() -> str | None:
    """Say why the hub cannot be reached; None if that is not known before trying."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if urllib.request.getproxies():
        return None  # the proxy resolves host names
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    return None


def _unreachable(repo_id: str, revision: str | None, reason: str) -> SourceError:
    folder = repo_id.rpartition("/")[2]
    command = ["hf", "download", repo_id, *(["--revision", revision] if revision else []), "--local-dir", folder]
    cached = f"models--{repo_id.replace('/', '--')}"
    return SourceError(
        f"{repo_id} is not complete in {constants.HF_HUB_CACHE}, and the Hugging Face hub cannot be reached "
        f"({reason}).",
        hint=f"On a machine with a network connection: {shlex.join(command)}\n"
        f"Then copy that folder here and give it as local-dir:{folder}, or copy the cache folder {cached} "
        f"into {constants.HF_HUB_CACHE}{os.sep}",
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
