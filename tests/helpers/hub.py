"""A stand-in for the Hugging Face Hub: its HTTP API for making repositories and commits, and for reading data sets."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_standin"
COMMIT = "1" * 40  # the only one of a data set
_LFS = (".safetensors", ".png", ".gguf", ".pt")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their messages


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        url: Where it answers.
        repositories: By their ids.
        datasets: Files by their names, by the ids of public data sets.
        refused: The start of paths that are answered by an error of the server.
        asked: The method and path of each request.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)  # large files by their SHA-256, before their commit
    refused: str | None = None
    asked: list[str] = field(default_factory=list)


@contextmanager
def running() -> Iterator[Hub]:
    """A server on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, **more: str) -> None:
        super().__init__(message)
        self.status = status
        self.answer = {"error": message, "errors": [{"message": message}], **more}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        try:
            if self.hub.refused is not None and path.startswith(self.hub.refused):
                raise _RefusedError(403, "You do not have the rights for this.")
            status, answer = 200, self._route(path, body)
        except _RefusedError as refusal:
            status, answer = refusal.status, refusal.answer
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
        elif isinstance(answer, bytes):
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET = do_POST = do_PUT = _answer

    def log_message(self, *args: Any) -> None:
        pass

    def _route(self, path: str, body: bytes) -> Any:
        if self.command == "PUT" and (match := re.fullmatch(r"/lfs/(\w+)", path)):
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise _RefusedError(400, "These are not the bytes that were announced.")
            self.hub.uploaded[match[1]] = body
            return {}
        if match := re.match(r"/(?:api/)?datasets/([^/]+/[^/]+)", path):
            return self._dataset(match[1], path.partition(match[1])[2], body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _RefusedError(401, "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(**json.loads(body))
        if path == "/api/validate-yaml":
            return _validated(json.loads(body)["content"])
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._repository(match[1])
            return {"transfer": "basic", "objects": [self._place(each) for each in json.loads(body)["objects"]]}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/preupload/main|/commit/main)?", path):
            repository = self._repository(match[1])
            if match[2] is None:
                names = [{"rfilename": name} for name in repository.files]
                return {"id": match[1], "private": repository.private, "siblings": names}
            if match[2].startswith("/preupload"):
                return {"files": [_mode(each["path"]) for each in json.loads(body)["files"]]}
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        raise _RefusedError(404, f"Nothing answers {self.command} {path}.")

    def _repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise _RefusedError(404, "Repository not found")
        return self.hub.repositories[name]

    def _dataset(self, name: str, asked: str, body: bytes) -> Any:
        if name not in self.hub.datasets:
            raise _RefusedError(404, "Repository not found")
        files = self.hub.datasets[name]
        if match := re.fullmatch(r"/resolve/[^/]+/(.+)", asked):
            if match[1] not in files:
                raise _RefusedError(404, "Entry not found")
            return files[match[1]]
        entries = [{"type": "file", "path": path, "size": len(files[path]), "oid": COMMIT} for path in files]
        if asked.startswith("/tree/"):
            return entries
        if asked.startswith("/paths-info/"):
            wanted = json.loads(body)["paths"]
            return [entry for entry in entries if entry["path"] in wanted]
        return {"id": name, "sha": COMMIT, "private": False, "siblings": [{"rfilename": path} for path in files]}

    def _create(self, name: str, organization: str | None, **given: Any) -> Any:
        repo_id = f"{organization or 'me'}/{name}"
        exists = repo_id in self.hub.repositories
        if not exists:
            private = given.get("private", given.get("visibility") == "private")
            self.hub.repositories[repo_id] = Repository(bool(private))
        url = f"{self.hub.url}/{repo_id}"
        if exists:
            raise _RefusedError(409, "You already created this model repo", url=url)
        return {"url": url}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> Any:
        repository = self._repository(name)
        files, message = dict(repository.files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.uploaded:
                    raise _RefusedError(400, f"{value['path']} was not uploaded.")
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _RefusedError(400, f"Unknown: {line['key']}")
        repository.files = files
        repository.commits.append(message)
        oid = f"{len(repository.commits):040x}"
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}


def _validated(card: str) -> Any:
    """As the Hub looks at a card: its base model must be named by an id."""
    header = yaml.safe_load(card.split("---\n")[1])
    base = header.get("base_model")
    if base is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is None:
        raise _RefusedError(400, f'"base_model" with value "{base}" is not valid. Use a model id from the Hub.')
    return {"errors": [], "warnings": []}


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(_LFS) else "regular", "shouldIgnore": False}
