"""A stand-in for the Hugging Face hub: as much of its HTTP interface as its client needs to publish and to download.

Repositories are kept in memory. Large files are those ending in .safetensors; they go through the LFS interface, as
with the real hub and a client without Xet.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"
"""A token that may write, and one that may only read."""


@dataclass
class Repository:
    """A repository: branch -> its commits, each a dictionary of files."""

    private: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        commits = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(f"{branch}{len(self.messages)}".encode()).hexdigest()  # noqa: S324
        commits.append((oid, files))
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for commits in self.branches.values() for commit in commits if commit[0] == revision), None)


@dataclass
class StandInHub:
    """The state of the server."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    before_commit: Any = None
    """Called before a commit is made, for what others do meanwhile."""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repo].at(revision)
        assert found is not None
        return found[1]


class _Refusal(Exception):
    """An answer with an error: status, the hub's code, and a message."""


@contextlib.contextmanager
def running_hub() -> Iterator[StandInHub]:
    """A server on this machine."""
    hub = StandInHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers: dict[str, str] = {}
        try:
            for pattern, method in _ROUTES:
                found = re.fullmatch(pattern, f"{self.command} {path}")
                if found:
                    status, content = 200, method(self, *found.groups())
                    break
            else:
                raise _Refusal(404, "", f"no such address: {self.command} {path}")
        except _Refusal as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            content = {"error": message}
        if isinstance(content, tuple):
            content, headers = content
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and for what.

    def _token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, WRITER, READER):
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        return token

    def _must_write(self) -> None:
        token = self._token()
        if token is None:
            raise _Refusal(401, "", "Invalid username or password.")
        if token != WRITER:
            raise _Refusal(403, "", "You don't have the rights to create a model under this namespace")

    def _repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self._token() is None):
            raise _Refusal(401 if self._token() is None else 404, "RepoNotFound", "Repository not found")
        return found

    # The addresses.

    def _info(self, repo: str, revision: str | None = None) -> Any:
        self._token()
        repository = self._repository(repo)
        found = repository.at(revision or "main")
        if found is None:
            raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": name} for name in (".gitattributes", *found[1])]
        return {"id": repo, "private": repository.private, "sha": found[0], "siblings": siblings, "tags": []}

    def _create(self) -> Any:
        self._must_write()
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repositories:
            raise _Refusal(409, "", "You already created this model repo")
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[repo] = Repository(private)
        self.hub.repositories[repo].commit("main", {}, "initial commit")
        return {"url": f"{self.hub.address}/{repo}", "name": repo}

    def _branch(self, repo: str, branch: str) -> Any:
        self._must_write()
        repository = self._repository(repo)
        repository.branches[branch] = list(repository.branches["main"])
        return {}

    def _validate(self) -> Any:
        text = json.loads(self.body)["content"]
        assert text.startswith("---\n")
        front = yaml.safe_load(text.split("---\n")[1])
        licences = ("apache-2.0", "mit", "other", None)
        if front.get("license") not in licences:
            self.hub.requests.append("a licence that the hub does not know")
        return {"errors": [], "warnings": []}

    def _preupload(self, repo: str, revision: str) -> Any:
        self._must_write()
        if self._repository(repo).at(revision) is None:
            raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
        files = json.loads(self.body)["files"]
        modes = {True: "lfs", False: "regular"}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
        }

    def _lfs_batch(self, repo: str) -> Any:
        self._must_write()
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{entry['oid']}"}}}
            for entry in json.loads(self.body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, oid: str) -> Any:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        return {}

    def _commit(self, repo: str, revision: str) -> Any:
        self._must_write()
        if self.hub.before_commit is not None:
            self.hub.before_commit(self.hub)
        repository = self._repository(repo)
        oid, files = repository.at(revision) or ("", {})
        files, message = dict(files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, oid):
                    raise _Refusal(412, "", "A commit has happened since.")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = repository.commit(revision, files, message)
        return {"commitUrl": f"{self.hub.address}/{repo}/commit/{oid}", "commitOid": oid}

    def _resolve(self, repo: str, revision: str, file: str) -> Any:
        found = self._repository(repo).at(revision)
        if found is None:
            raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
        if file not in found[1]:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        content = found[1][file]
        return content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": found[0]}


_REPO = "([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, Any], ...] = (
    (f"GET /api/models/{_REPO}", _Handler._info),
    (f"GET /api/models/{_REPO}/revision/(.+)", _Handler._info),
    ("POST /api/repos/create", _Handler._create),
    (f"POST /api/models/{_REPO}/branch/(.+)", _Handler._branch),
    ("POST /api/validate-yaml", _Handler._validate),
    (f"POST /api/models/{_REPO}/preupload/(.+)", _Handler._preupload),
    (f"POST /{_REPO}.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT /lfs/([0-9a-f]+)", _Handler._lfs_put),
    (f"POST /api/models/{_REPO}/commit/(.+)", _Handler._commit),
    (f"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler._resolve),
)
