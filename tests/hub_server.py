"""A hub in miniature: it serves folders on 127.0.0.1 as huggingface_hub asks for them, and notes what was asked.

Run with HF_ENDPOINT set to its address before huggingface_hub is imported, thus in another process.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


COMMIT = hashlib.sha1(b"the only commit").hexdigest()


@contextmanager
def serve_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories root/models/ORG/NAME and root/datasets/ORG/NAME, each with one commit on main.

    Yields the address, and the list of requests so far, such as "GET /api/models/ORG/NAME".
    """
    requests = []
    handler = type("Handler", (_Handler,), {"root": root, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "api" and len(parts) > 3:
            self._answer_api(*parts[1:4], parts[4:])
        elif parts[0] == "api":
            self._send_error("EntryNotFound")
        else:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            self._answer_file(kind, *parts[:2], parts[2:])

    def _answer_api(self, kind: str, organization: str, name: str, rest: list[str]) -> None:
        repository = self._find(kind, organization, name, rest[1] if len(rest) > 1 else "main")
        if repository is None:
            return
        tree = _tree(repository)
        if rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            found = [entry for entry in tree if entry["path"].startswith(folder)]
            if "recursive=true" not in self.path.lower():
                found = [entry for entry in found if "/" not in entry["path"].removeprefix(folder)]
            self._send_json(found) if found else self._send_error("EntryNotFound")
        elif rest[:1] in ([], ["revision"]):
            files = [{"rfilename": entry["path"]} for entry in tree if entry["type"] == "file"]
            self._send_json({"id": f"{organization}/{name}", "sha": COMMIT, "siblings": files, "private": False})
        else:
            self._send_error("EntryNotFound")

    def _answer_file(self, kind: str, organization: str, name: str, rest: list[str]) -> None:
        repository = self._find(kind, organization, name, rest[1])
        if repository is None:
            return
        file = repository.joinpath(*rest[2:])
        if rest[0] != "resolve" or not file.is_file():
            self._send_error("EntryNotFound")
        else:
            self._send(200, file.read_bytes(), {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT})

    def _find(self, kind: str, organization: str, name: str, revision: str) -> Path | None:
        repository = self.root / kind / organization / name
        if not repository.is_dir():
            self._send_error("RepoNotFound")
        elif revision not in {"main", COMMIT}:
            self._send_error("RevisionNotFound")
        else:
            return repository

    def _send_json(self, content) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_error(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *message) -> None:
        pass


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _tree(repository: Path) -> list[dict]:
    return [
        {"type": "directory", "path": path.relative_to(repository).as_posix(), "oid": COMMIT, "size": 0}
        if path.is_dir()
        else {
            "type": "file",
            "path": path.relative_to(repository).as_posix(),
            "oid": _digest(path),
            "size": path.stat().st_size,
        }
        for path in sorted(repository.rglob("*"))
    ]
