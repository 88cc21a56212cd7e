"""A hub of models on this machine, as far as huggingface_hub asks of it: folders as repositories.

A file of weights is given away in ranges only; what was given is counted.
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
from typing import Any

COMMIT = "b" * 40


@dataclass
class Hub:
    """What is served, and what was asked for.

    Attributes:
        endpoint: what HF_ENDPOINT is to be.
        given: bytes of weights by repository.
    """

    endpoint: str
    given: dict[str, int] = field(default_factory=dict)


@contextmanager
def served(folders: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve folders inside the block: `owner/name` -> what the repository holds.

    A repository whose name ends in `closed` refuses to give its weights.
    """

    class Handler(_Handler):
        repositories = folders

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    repositories: Mapping[str, Path]
    hub: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", path):
            files = self._files(found[1])
            about = {"id": found[1], "sha": COMMIT, "private": False, "gated": False, "tags": []}
            self._send(json.dumps(about | {"siblings": [{"rfilename": n} for n in files]}).encode())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                for name, data in self._files(found[1]).items()
            ]
            self._send(json.dumps(entries).encode())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            self._send_file(found[1], found[2])
        else:
            self._send(None)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass

    def _files(self, repository: str) -> dict[str, bytes]:
        folder = self.repositories[repository]
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def _send_file(self, repository: str, name: str) -> None:
        data = self._files(repository).get(name)
        if data is None or not name.endswith(".safetensors"):
            self._send(data)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        if asked is None or repository.endswith("closed"):
            self._send(None, code=503)
            return
        part = data[int(asked[1]) : int(asked[2]) + 1]
        self.hub.given[repository] = self.hub.given.get(repository, 0) + len(part)
        self._send(part, code=206)

    def _send(self, body: bytes | None, code: int = 200) -> None:
        self.send_response(404 if body is None and code == 200 else code)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{_digest(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if body is not None and self.command != "HEAD":
            self.wfile.write(body)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
