"""A small model hub on this machine: enough of the real one's HTTP interface for huggingface_hub and datasets to download from.

HF_ENDPOINT is set to its address in the process under test. It can refuse, hide, break off and count.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubRepository:
    """One repository at one commit, `main`. With `token` set, only that token may read it; `gated` says why."""

    files: dict[str, bytes]
    token: str | None = None
    gated: bool = False
    commit: str = COMMIT
    broken: Counter[str] = field(default_factory=Counter)
    """How many times more the transfer of a file ends in the middle."""
    forged: dict[str, bytes] = field(default_factory=dict)
    """What is sent in place of some files, of the same size."""


class Hub:
    """Context manager: `repositories` maps `models/ID` and `datasets/ID`; `requests` counts (method, path).

    writer: the token of the user `owner`, who may make repositories and upload.
    """

    def __init__(self, repositories: dict[str, HubRepository], writer: str | None = None) -> None:
        self.repositories = repositories
        self.writer = writer
        self.uploads: dict[str, bytes] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        hub = self

        class Handler(_HubHandler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()


class _HubHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests[self.command, path] += 1
        self.body = self._received()
        if path in ("api/whoami-v2", "api/repos/create"):
            self.answer_owner(path)
            return
        if path.startswith("api/"):
            kind, *words = path.removeprefix("api/").split("/")
        else:
            kind = "datasets" if path.startswith("datasets/") else "models"
            words = path.removeprefix("datasets/").split("/")
        for length in (2, 1):
            repository = self.hub.repositories.get(f"{kind}/{'/'.join(words[:length]).removesuffix('.git')}")
            if repository is not None:
                self.answer_for(repository, "/".join(words[:length]), words[length:])
                return
        self.refuse(401, "RepoNotFound", "Invalid username or password.")

    def _received(self) -> bytes:
        """The request's body, which may come in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_PUT(self) -> None:
        """An upload of a large file, by its checksum."""
        path = urlsplit(self.path).path
        self.hub.requests[self.command, path.strip("/")] += 1
        content = self._received()
        self.hub.uploads[hashlib.sha256(content).hexdigest()] = content
        self.send_json({})

    def answer_owner(self, path: str) -> None:
        """Who the token belongs to, and a new repository of that owner."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.writer is None or token != self.hub.writer:
            self.refuse(401, "", "Invalid username or password.")
        elif path == "api/whoami-v2":
            self.send_json({"type": "user", "name": "owner", "orgs": []})
        else:
            asked = json.loads(self.body)
            id = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            if f"models/{id}" in self.hub.repositories:
                self.refuse(409, "", "You already created this model repo", url=f"{self.hub.address}/{id}")
                return
            private = asked.get("private") or asked.get("visibility") == "private"  # by version of huggingface_hub
            self.hub.repositories[f"models/{id}"] = HubRepository({}, token=token if private else None)
            self.send_json({"url": f"{self.hub.address}/{id}", "id": id})

    def take_upload(self, repository: HubRepository, action: str) -> None:
        """The three questions of an upload: how to send each file, where large ones go, and the commit of all."""
        if action == "preupload":
            files = [
                {"path": name, "uploadMode": "lfs" if name.endswith(".safetensors") else "regular", "shouldIgnore": False}
                for name in (file["path"] for file in json.loads(self.body)["files"])
            ]
            self.send_json({"files": files})
        elif action == "batch":
            objects = [
                {**thing, "actions": {"upload": {"href": f"{self.hub.address}/upload/{thing['oid']}"}}}
                for thing in json.loads(self.body)["objects"]
            ]
            self.send_json({"transfer": "basic", "objects": objects})
        else:
            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repository.files[value["path"]] = self.hub.uploads[value["oid"]]
            self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.address}/owner/x/commit/{COMMIT}"})

    def answer_for(self, repository: HubRepository, id: str, words: list[str]) -> None:
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            if repository.gated:
                self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo", f"Access to {id} is restricted.")
            else:
                self.refuse(401, "RepoNotFound", "Invalid username or password.")
            return
        action, revision, path = (words[0] if words else "revision"), (words[1:2] or ["main"])[0], "/".join(words[2:])
        upload = "batch" if self.path.endswith("/info/lfs/objects/batch") else action
        if self.command == "POST" and upload in ("preupload", "batch", "commit"):
            self.take_upload(repository, upload)
            return
        if revision not in ("main", repository.commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif action == "revision":
            self.send_json(self.description(repository, id))
        elif action == "tree":
            self.send_json(self.listing(repository, f"{path}/" if path else ""))
        elif action == "paths-info":
            fields = parse_qs(self.body.decode())
            names = fields.get("paths") or json.loads(self.body or b"{}").get("paths", [])
            folders = {name.rpartition("/")[0] for name in repository.files}
            found = [self.entry(repository, name) for name in names if name in repository.files]
            self.send_json(found + [{"type": "directory", "path": name, "oid": "0" * 40} for name in names if name in folders])
        elif action == "resolve" and path in repository.files:
            self.send_file(repository, path)
        else:
            self.refuse(404, "EntryNotFound", "Entry not found")

    def listing(self, repository: HubRepository, prefix: str) -> list[dict[str, Any]]:
        """Files below a folder, or without `recursive` its own files and folders."""
        names = [name for name in repository.files if name.startswith(prefix)]
        if "recursive=true" in self.path.lower():
            return [self.entry(repository, name) for name in names]
        folders = {prefix + name.removeprefix(prefix).split("/")[0] for name in names if "/" in name.removeprefix(prefix)}
        files = [self.entry(repository, name) for name in names if "/" not in name.removeprefix(prefix)]
        return files + [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]

    def description(self, repository: HubRepository, id: str) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [
            {"rfilename": name, "size": len(content)} for name, content in repository.files.items()
        ]
        for sibling in siblings:
            content = repository.files[sibling["rfilename"]]
            if sibling["rfilename"].endswith(".safetensors"):
                checksum = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": checksum, "size": len(content), "pointerSize": 134}
        return {"id": id, "sha": repository.commit, "private": False, "tags": [], "downloads": 0, "siblings": siblings}

    def entry(self, repository: HubRepository, name: str) -> dict[str, Any]:
        content = repository.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, repository: HubRepository, name: str) -> None:
        content = repository.forged.get(name, repository.files[name])
        start = 0
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last or len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            part = content[start : end + 1]
        else:
            self.send_response(200)
            part = content
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if repository.broken[name] > 0:
            repository.broken[name] -= 1
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        self.wfile.write(part)

    def refuse(self, status: int, code: str, message: str, **more: str) -> None:
        body = json.dumps({"error": message, **more}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
