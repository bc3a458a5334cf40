"""A web server of files, with ranges, latency, a limited rate and faults on demand; it can go away and come back.

It shares requests, faults and the way to send a body with the hub's server.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from .hub import Handler
from .repositories import Hub

Content = Callable[[str], bytes | None]


class FileHandler(Handler):
    server_state: ClassVar[WebServer]

    def _handle(self) -> None:
        state, path = self.server_state, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.fault = self.hub.take_fault(self.command, path)
        time.sleep(state.latency + (self.fault.delay if self.fault else 0))
        if state.login is not None and self.headers.get("Authorization") != state.login:
            return self._send(401, {}, b"")
        if self.fault is not None and self.fault.status is not None:
            status, headers, self.fault = self.fault.status, self.fault.headers, None
            return self._send(status, headers, b"")
        content = state.content(path.lstrip("/"))
        if content is None:
            return self._send(404, {}, b"")
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        if self.headers.get("If-Range", tag) != tag:
            del self.headers["Range"]
        headers = {"ETag": tag, "Accept-Ranges": "bytes", "Last-Modified": state.modified, **state.headers}
        self._send(200, headers, content)

    do_GET = do_HEAD = _handle

    def _send_body(self, content: bytes, rate: float | None) -> None:
        if rate is not None or self.server_state.rate is None:
            return super()._send_body(content, rate)
        for start in range(0, len(content), 1 << 18):
            block = content[start : start + (1 << 18)]
            time.sleep(self.server_state.share(len(block)))
            self.wfile.write(block)


class WebServer:
    """Serves what `content` gives for a path.

    Attributes:
        latency: seconds before each answer. rate: bytes per second over all connections together, None: any.
        modified: the time of all files. login: the Authorization header that is asked for; None: none.
        headers: further ones of every answer.
        requests, faults, fail: as of the hub.
    """

    login: str | None = None
    modified = "Thu, 01 Jan 2026 00:00:00 GMT"

    def __init__(self, content: Content, *, latency: float = 0.0, rate: float | None = None) -> None:
        self.content, self.latency, self.rate = content, latency, rate
        self.headers: dict[str, str] = {}
        self._free = time.monotonic()
        self._lock = threading.Lock()
        self._port = 0
        self.start()

    def start(self) -> None:
        handler = type("WebHandler", (FileHandler,), {"server_state": self})
        self._server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        if not self._port:
            self._port = self._server.server_port
            self._hub = Hub(self._port)
            self.url, self.requests, self.fail = self._hub.url, self._hub.requests, self._hub.fail
        handler.hub = self._hub
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Go away: connections are refused from now on, until :meth:`start`."""
        self._server.shutdown()
        self._server.server_close()

    def share(self, size: int) -> float:
        """Seconds until so many bytes may be sent."""
        with self._lock:
            now = time.monotonic()
            self._free = max(self._free, now) + size / (self.rate or float("inf"))
            return self._free - now


@contextlib.contextmanager
def serving_files(content: Content, **options: Any) -> Iterator[WebServer]:
    server = WebServer(content, **options)
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):
            server.stop()
