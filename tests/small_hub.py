"""A hub on this machine: an HTTP server with as much of the Hugging Face hub's interface as its own client needs to fetch a model.

A repository of data is named `datasets/owner/name`.

`serving(hub)` starts it. A process that starts afterwards is pointed at it by HF_ENDPOINT, and this one by `use`. Faults are
attributes of the hub: a cut connection, gated repositories, a server that is down.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

MODEL = re.compile(r"/api/(?:models/)?(?P<name>(?:datasets/)?[^/]+/[^/]+?)(?:/revision/(?P<revision>.+))?")
TREE = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/.*)?")
FILE = re.compile(r"/(?P<name>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
RANGE = re.compile(r"bytes=(\d+)-")


@dataclass
class Repository:
    """A model's commits, each a table of files; branches name commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def add(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit these files to a branch; its id, 40 hex digits."""
        commit = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit


@dataclass
class Hub:
    """Repositories by owner/name; what was asked of the server; and how it misbehaves."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "GET /path", with the range where one was asked for
    tokens: tuple[str, ...] = ()  # those that are known
    members: tuple[str, ...] | None = None  # those that open gated repositories; None: all that are known
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes after which its connection ends, once; then it is `broken`
    broken: set[str] = field(default_factory=set)  # files whose content is answered by 503; and "tree", the list of them, by 501
    is_down: bool = False  # every answer is 503
    is_portal: bool = False  # every answer is a page, as of a network that wants a login
    endpoint: str = ""

    def add(self, name: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit files to a repository, made where it is not there yet; the commit's id."""
        return self.repositories.setdefault(name, Repository()).add(files, branch)

    def fetched(self) -> set[str]:
        """Paths of the files whose content was asked for."""
        return {match["path"] for one in self.requests if one.startswith("GET ") and (match := FILE.match(one[4:].split(" ")[0]))}


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder, for `Hub.add`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.endpoint`, until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `huggingface_hub` in this process fetch from the hub into `cache`, without a login (it reads its environment once)."""
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}
    for key, value in {**values, "HF_TOKEN_PATH": str(cache / "token")}.items():
        monkeypatch.setattr(constants, key, value)
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(key, raising=False)


class _Refusal(Exception):
    """An answer that is an error, as the hub words it: status, X-Error-Code, X-Error-Message."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *values: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        wanted = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {self.path}" + (f" {wanted}" if wanted else ""))
        path = unquote(urlsplit(self.path).path)
        try:
            if self.hub.is_down:
                raise _Refusal(503, "", "")
            if self.hub.is_portal:
                self._send("text/html", b"<html>", with_body)
            elif match := TREE.fullmatch(path):
                self._send_json(self._tree(match), with_body)
            elif match := MODEL.fullmatch(path):
                self._send_json(self._info(match), with_body)
            elif match := FILE.fullmatch(path):
                self._send_file(match, with_body)
            else:
                raise _Refusal(404, "", f"no such page: {path}")
        except _Refusal as refusal:
            self._refuse(*refusal.args)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _commit(self, match: re.Match[str]) -> tuple[Repository, str]:
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if sent and sent not in self.hub.tokens:
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(match["name"])
        if repository is None:
            raise _Refusal(404 if sent else 401, "RepoNotFound" if sent else "", "Repository not found")
        members = self.hub.tokens if self.hub.members is None else self.hub.members
        if repository.gated and "path" in match.groupdict() and sent not in members:  # a gated model's list of files is open to all
            raise _Refusal(403 if sent else 401, "GatedRepo", "Access to this model is restricted")
        revision = match["revision"] or "main"
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _info(self, match: re.Match[str]) -> object:
        repository, commit = self._commit(match)
        names = sorted(repository.commits[commit])
        return {"id": match["name"], "modelId": match["name"], "sha": commit, "siblings": [{"rfilename": name} for name in names]}

    def _tree(self, match: re.Match[str]) -> object:
        repository, commit = self._commit(match)
        if "tree" in self.hub.broken:
            raise _Refusal(501, "", "")
        files = repository.commits[commit].items()
        return [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in files]

    def _send_json(self, values: object, with_body: bool) -> None:
        self._send("application/json", json.dumps(values).encode(), with_body)

    def _send(self, kind: str, body: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _send_file(self, match: re.Match[str], with_body: bool) -> None:
        repository, commit = self._commit(match)
        data = repository.commits[commit].get(match["path"])
        if data is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        if with_body and match["path"] in self.hub.broken:
            raise _Refusal(503, "", "")
        asked = RANGE.fullmatch(self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if with_body:
            self._send_body(match["path"], data[start:])

    def _send_body(self, path: str, data: bytes) -> None:
        after = self.hub.cut.pop(path, None)
        if after is not None:
            self.hub.broken.add(path)
        self.wfile.write(data[:after])
        self.close_connection = True
