"""A hub of data sets on this machine, as far as `datasets` asks of it: one that it gives to all
(`owner/name`), gated ones, and no others."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "owner/name"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "train.jsonl": b'{"text": "a"}\n{"text": "b"}\n',
    "test.jsonl": b'{"text": "c"}\n',
}
_COMMIT = "a" * 40


@contextmanager
def served() -> Iterator[str]:
    """Serve the hub inside the block; yields what HF_ENDPOINT is to be."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        body, headers = self._found(path)
        self.send_response(200 if body is not None else 403 if "gated" in path else 404)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if body is not None and self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass

    @staticmethod
    def _found(path: str) -> tuple[bytes | None, dict[str, str]]:
        api, files = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"
        if path in (api, f"{api}/revision/{_COMMIT}"):
            about = {"id": NAME, "sha": _COMMIT, "private": False, "gated": False, "tags": []}
            about["siblings"] = [{"rfilename": name} for name in FILES]
            return json.dumps(about).encode(), {}
        if path == f"{api}/tree/{_COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                for name, data in FILES.items()
            ]
            return json.dumps(entries).encode(), {}
        if path.startswith((api, files)):
            data = FILES.get(path.rpartition("/")[2])
            if data is None:
                return None, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT}
            return data, {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": _COMMIT}
        return None, {"X-Error-Code": "GatedRepo" if "gated" in path else "RepoNotFound"}


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
