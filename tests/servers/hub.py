"""A server of the Hugging Face hub's HTTP interface, with repositories in memory and faults on demand.

It answers what ``huggingface_hub`` asks for to download (``hf_hub_download``, ``snapshot_download``), to list and read
(``HfApi``, ``HfFileSystem``) and to upload (``create_repo``, ``upload_folder`` without Xet). As on the hub, large files
are LFS objects, and their downloads are redirected to another host, which refuses the user's token.

Use it by the fixture ``hub`` (tests/conftest.py). Processes started by a test find it by their environment.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading
import time
import types
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from .repositories import DATE, Fault, Files, Hub, Repo, blob_oid, entry, is_lfs


class Refusal(Exception):
    """An answer with an error: status, code as in X-Error-Code ("" for none), message."""

    def __init__(self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None):
        super().__init__(status, code, message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


class Handler(http.server.BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        hub, url = self.hub, urllib.parse.urlsplit(self.path)
        self.parts = [urllib.parse.unquote(part) for part in url.path.split("/")[1:]]
        self.query = dict(urllib.parse.parse_qsl(url.query))
        path = urllib.parse.unquote(url.path)
        hub.requests.append(f"{self.command} {path}")
        self.body = self._read_body()
        self.fault = hub.take_fault(self.command, path)
        if self.fault is not None:
            time.sleep(self.fault.delay)
        try:
            if self.fault is not None and self.fault.status is not None:
                raise Refusal(self.fault.status, message="an injected fault", headers=self.fault.headers)
            for method, pattern, answer in ROUTES:
                if self.command in method and (found := pattern.fullmatch(url.path)):
                    groups = {k: v and urllib.parse.unquote(v) for k, v in found.groupdict().items()}
                    with hub.lock:
                        status, headers, content = answer(self, **groups)
                        if status == 302 and self.fault is not None:  # it is for the object behind the redirection
                            self.fault.times = self.fault.times and self.fault.times + 1
                            self.fault = None
                    return self._send(status, headers, content)
            raise Refusal(404, message=f"no route {self.command} {path}")
        except Refusal as refusal:
            self.fault = None
            headers = dict(refusal.headers)
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            if refusal.message:
                headers["X-Error-Message"] = refusal.message
            self._send(refusal.status, headers, json.dumps({"error": refusal.message}).encode())

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        fault = self.fault or Fault("")
        if fault.content is not None:
            content = fault.content
        if fault.truncate is not None:
            content = content[: fault.truncate]
        headers = {"Content-Length": str(len(content)), **headers}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found and status == 200 and self.command == "GET":
            size, (start, stop) = len(content), found.groups()
            first, last = (int(start), min(int(stop or size), size - 1)) if start else (size - int(stop), size - 1)
            if first >= size:
                status, headers, content = 416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"}, b""
            else:
                status, content = 206, content[first : last + 1]
                headers |= {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Length": str(len(content))}
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self._send_body(content if fault.cut is None else content[: fault.cut], fault.rate)
            if fault.cut is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def _send_body(self, content: bytes, rate: float | None) -> None:
        step = len(content) if rate is None else max(1, int(rate / 20))
        for start in range(0, len(content), step or 1):
            self.wfile.write(content[start : start + step])
            if rate is not None:
                time.sleep(step / rate)

    # ---------------------------------------------------------------------- who asks for what

    def user(self, required: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        if required and not token:
            raise Refusal(401, message="Invalid username or password.")
        return self.hub.tokens.get(token)

    def repo(self, kind: str | None, name: str, write: bool = False) -> Repo:
        user = self.user(required=write)
        repo = self.hub.repos.get(((kind or "models").rstrip("s"), name))
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != name.split("/")[0]:
            raise Refusal(403, message=f"You don't have the required permissions on {name}")
        return repo

    def revision(self, repo: Repo, revision: str | None) -> tuple[str, dict[str, bytes]]:
        oid = repo.refs.get(revision or "main", revision or "")
        if oid not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    def json(self, value: Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()

    # ---------------------------------------------------------------------- listing

    def whoami(self):
        return self.json(
            {"type": "user", "name": self.user(required=True), "orgs": [], "auth": {"type": "access_token"}}
        )

    def info(self, kind: str, name: str, revision: str | None = None):
        repo = self.repo(kind, name)
        oid, files = self.revision(repo, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        if "blobs" in self.query:
            for sibling in siblings:
                found = entry(sibling["rfilename"], files[sibling["rfilename"]])
                sibling |= {"size": found["size"], "blobId": found["oid"]}
                if "lfs" in found:
                    sibling["lfs"] = {"sha256": found["lfs"]["oid"], **found["lfs"]}
        gated = "manual" if repo.gated else False
        common = {"id": name, "sha": oid, "private": repo.private, "gated": gated, "disabled": False, "tags": []}
        with contextlib.suppress(KeyError, ValueError):
            common["config"] = {"model_type": json.loads(files["config.json"])["model_type"]}
        return self.json({**common, "siblings": siblings, "lastModified": DATE, "createdAt": DATE})

    def tree(self, kind: str, name: str, revision: str, path: str | None = None):
        repo = self.repo(kind, name)
        oid, files = self.revision(repo, revision)
        prefix = f"{path}/" if path else ""
        if path and not any(each.startswith(prefix) for each in files):
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}", {"X-Repo-Commit": oid})
        recursive = self.query.get("recursive", "").lower() == "true"
        found = [each for each in self._entries(repo, oid, files) if each["path"].startswith(prefix)]
        if not recursive:
            found = [each for each in found if "/" not in each["path"].removeprefix(prefix)]
        start, headers = int(self.query.get("cursor", 0)), {}
        if start + self.hub.page < len(found):
            following = urllib.parse.urlencode({**self.query, "cursor": start + self.hub.page})
            headers["Link"] = f'<{self.hub.url}{self.path.split("?")[0]}?{following}>; rel="next"'
        return self.json(found[start : start + self.hub.page], **headers)

    def paths_info(self, kind: str, name: str, revision: str):
        repo = self.repo(kind, name)
        wanted = urllib.parse.parse_qs(self.body.decode()).get("paths", [])
        return self.json(
            [each for each in self._entries(repo, *self.revision(repo, revision)) if each["path"] in wanted]
        )

    def _entries(self, repo: Repo, oid: str, files: Files) -> list[dict[str, Any]]:
        """Files and folders, sorted by path."""
        folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
        found = [
            {"type": "directory", "path": folder, "oid": blob_oid(folder.encode()), "size": 0} for folder in folders
        ]
        last = {"id": oid, "title": repo.titles[oid], "date": DATE}
        found = [{**each, "lastCommit": last} for each in [*found, *(entry(*item) for item in files.items())]]
        return sorted(found, key=lambda each: each["path"])

    def refs(self, kind: str, name: str):
        found = [{"name": n, "ref": n, "targetCommit": oid} for n, oid in self.repo(kind, name).refs.items()]
        return self.json({"branches": found[:1], "tags": found[1:], "converts": []})

    # ---------------------------------------------------------------------- downloading

    def resolve(self, kind: str | None, name: str, revision: str, path: str):
        repo = self.repo(kind, name)
        user = self.user()
        if repo.gated and (user or "", name) not in self.hub.granted and user != name.split("/")[0]:
            raise Refusal(403 if user else 401, "GatedRepo", f"Access to {name} is restricted")
        oid, files = self.revision(repo, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": oid})
        found, headers = entry(path, files[path]), {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if "lfs" not in found:
            return 200, {**headers, "ETag": f'"{found["oid"]}"'}, files[path]
        sha = found["lfs"]["oid"]
        self.hub.objects[sha] = files[path]
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(found["size"])}
        return 302, {**headers, "Location": f"{self.hub.cdn}/objects/{name}/{sha}/{urllib.parse.quote(path)}"}, b""

    def object(self, sha: str):
        if "Authorization" in self.headers:
            raise Refusal(400, message="a token was sent to the host of objects")
        return 200, {"ETag": f'"{sha}"', "Accept-Ranges": "bytes"}, self.hub.objects[sha]

    # ---------------------------------------------------------------------- uploading

    def create(self):
        wanted, user = json.loads(self.body), self.user(required=True)
        name, kind = f"{wanted['organization'] or user}/{wanted['name']}", wanted.get("type") or "model"
        if name.split("/")[0] != user:
            raise Refusal(403, message=f"You don't have the rights to create a {kind} under this namespace")
        prefix = "" if kind == "model" else f"{kind}s/"
        if (kind, name) in self.hub.repos:
            answer = {"error": "You already created this repo", "url": f"{self.hub.url}/{prefix}{name}"}
            return 409, {}, json.dumps(answer).encode()
        self.hub.add(name, kind=kind, private=wanted.get("visibility") == "private")
        return self.json({"url": f"{self.hub.url}/{prefix}{name}", "name": name})

    def validate_yaml(self):
        return self.json({"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str):
        _, files = self.revision(self.repo(kind, name, write=True), revision)
        answers = []
        for each in json.loads(self.body)["files"]:
            there = entry(each["path"], files[each["path"]]) if each["path"] in files else {}
            oid = there.get("lfs", there).get("oid")
            mode = "lfs" if is_lfs(each["path"], each["size"]) else "regular"
            answers.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.json({"files": answers})

    def lfs_batch(self, kind: str | None, name: str):
        self.repo(kind, name, write=True)
        objects = []
        for each in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.cdn}/upload/{each['oid']}"}}
            objects.append(each if each["oid"] in self.hub.objects else {**each, "actions": upload})
        return self.json({"transfer": "basic", "objects": objects})

    def upload(self, sha: str):
        if hashlib.sha256(self.body).hexdigest() != sha:
            raise Refusal(400, message="the content has another checksum")
        self.hub.objects[sha] = self.body
        return self.json({})

    def commit(self, kind: str, name: str, revision: str):
        repo = self.repo(kind, name, write=True)
        files, title = dict(self.revision(repo, revision)[1]), ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                files = {p: c for p, c in files.items() if not f"{p}/".startswith(value["path"].rstrip("/") + "/")}
        oid = repo.commit(files, title, revision)
        return self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})


def _routes() -> list[tuple[str, re.Pattern, Any]]:
    api, repo = (
        r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)",
        r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)",
    )
    table = [
        ("GET", r"/api/whoami-v2", Handler.whoami),
        ("POST", r"/api/repos/create", Handler.create),
        ("POST", r"/api/validate-yaml", Handler.validate_yaml),
        ("GET", api + r"(?:/revision/(?P<revision>[^/]+))?", Handler.info),
        ("GET", api + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
        ("POST", api + r"/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
        ("GET", api + r"/refs", Handler.refs),
        ("POST", api + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
        ("POST", api + r"/commit/(?P<revision>[^/]+)", Handler.commit),
        ("POST", repo + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
        ("GET HEAD", r"/objects/[^/]+/[^/]+/(?P<sha>\w+)/.+", Handler.object),
        ("PUT", r"/upload/(?P<sha>\w+)", Handler.upload),
        ("GET HEAD", repo + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ]
    return [(methods, re.compile(pattern), answer) for methods, pattern, answer in table]


ROUTES = _routes()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A server in a thread, until the block ends."""
    handler = type("HubHandler", (Handler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    handler.hub = Hub(server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()


def redirect_client(monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path) -> list[float]:
    """Send ``huggingface_hub`` of this process, and processes it starts, to `hub`, with an empty cache in `home`.

    Returns the list of the client's pauses between retries, which are noted instead of slept.
    """
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import HfFileSystem, constants, file_download, hf_api
    from huggingface_hub.utils import _http

    for name, value in hub.environment(home).items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    changed = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in changed.items():
        assert hasattr(constants, name), f"huggingface_hub {huggingface_hub.__version__} has no constant {name}"
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    pauses: list[float] = []
    noting = types.SimpleNamespace(**{**vars(time), "sleep": pauses.append})
    monkeypatch.setattr(_http, "time", noting)
    monkeypatch.setattr(file_download, "time", noting)
    HfFileSystem.clear_instance_cache()
    _http.close_session()  # a connection kept alive from another test's server
    return pauses
