"""Hubs on this machine: one of a single repository to download from, and one to push to."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"
NEXT_REVISION = "76543210fedcba9876543210fedcba9876543210"
REPO = "someone/small-xl"


class Hub(ThreadingHTTPServer):
    """Serves ``folder`` as REPO, one of ``models`` or of ``datasets``. A file named in ``cut``
    breaks off once after so many bytes; ``lost`` cannot be had. After a download of
    ``moves_after`` the branch stands at NEXT_REVISION, which is ``next_folder``."""

    def __init__(self, folder: Path, kind: str = "models") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.kind = folder, kind
        self.cut: dict[str, int] = {}
        self.lost = ""
        self.requests: list[str] = []  # the file of each download
        self.listings: list[str] = []  # the path of each request for what a commit holds
        self.moves_after = ""
        self.next_folder = folder
        self.branch = REVISION

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def root(self, revision: str) -> Path:
        return self.next_folder if revision == NEXT_REVISION else self.folder

    def files(self, revision: str = REVISION) -> dict[str, int]:
        root = self.root(revision)
        paths = (path for path in root.rglob("*") if path.is_file())
        return {p.relative_to(root).as_posix(): p.stat().st_size for p in sorted(paths)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        requested = next(
            (r for r in (REVISION, NEXT_REVISION) if r in self.path), self.server.branch
        )
        files = self.server.files(requested)
        api = f"/api/{self.server.kind}/"
        if self.path.startswith(api):
            self.server.listings.append(self.path)
        if self.path.startswith(f"{api}{REPO}/tree/"):
            rows = [{"type": "file", "path": n, "size": s, "oid": "0"} for n, s in files.items()]
            self._send_json(rows)
        elif self.path.startswith(f"{api}{REPO}"):
            rows = [{"rfilename": name, "size": size} for name, size in files.items()]
            self._send_json({"id": REPO, "sha": requested, "siblings": rows})
        else:
            self._send_file(head=False)

    def do_HEAD(self) -> None:
        self._send_file(head=True)

    def _send_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_file(self, head: bool) -> None:
        revision, _, rest = self.path.partition("/resolve/")[2].partition("/")
        name = rest.partition("?")[0]
        if name not in self.server.files(revision) or name == self.server.lost:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = self.server.root(revision) / name
        data, requested = path.read_bytes(), self.headers.get("Range")
        begin = int(requested.removeprefix("bytes=").partition("-")[0]) if requested else 0
        self.send_response(206 if requested else 200)
        self.send_header("ETag", f'"{len(data)}-{revision[:8]}-{name.replace("/", "-")}"')
        self.send_header("X-Repo-Commit", revision)
        self.send_header("Accept-Ranges", "bytes")
        if requested:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if head:
            return
        self.server.requests.append(name)
        if name == self.server.moves_after:
            self.server.branch = NEXT_REVISION
        cut = self.server.cut.pop(name, len(data))
        self.wfile.write(data[begin : max(begin, cut)])
        if cut < len(data):
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


USER, TOKEN, READER = "someone", "hf_may_write", "hf_may_read"


class WritableHub(ThreadingHTTPServer):
    """Keeps repositories in memory. TOKEN may write what is of USER, READER nothing."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Writing)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.num_commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Writing(BaseHTTPRequestHandler):
    """The requests of ``whoami``, ``model_info``, ``create_repo`` and ``create_commit``."""

    protocol_version = "HTTP/1.1"
    server: WritableHub

    def do_GET(self) -> None:
        if self._token not in (TOKEN, READER):
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/whoami-v2":
            return self._answer(200, {"name": USER, "type": "user", "orgs": []})
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if name not in self.server.repositories:
            return self._answer(404, {"error": "not found"}, "RepoNotFound")
        files = [{"rfilename": file} for file in self.server.repositories[name]]
        private = self.server.private[name]
        self._answer(200, {"id": name, "sha": REVISION, "private": private, "siblings": files})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self._token != TOKEN:
            return self._answer(403, {"error": "Forbidden: you have no right"})
        if self.path == "/api/repos/create":
            fields = json.loads(data)
            name = f"{fields['organization'] or USER}/{fields['name']}"
            if fields["organization"] not in (None, USER):
                return self._answer(403, {"error": "Forbidden: not yours"})
            self.server.repositories[name] = {}
            self.server.private[name] = fields["visibility"] == "private"
            return self._answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        name, _, action = (
            self.path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        )
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(data)["files"]
            ]
            return self._answer(200, {"files": files})
        assert action == "commit", self.path
        self.server.num_commits += 1
        for line in data.splitlines():
            item = json.loads(line)
            assert item["key"] in ("header", "file"), "nothing is ever deleted"
            if item["key"] == "file":
                content = base64.b64decode(item["value"]["content"])
                self.server.repositories[name][item["value"]["path"]] = content
        url = f"{self.server.url}/{name}/commit/{REVISION}"
        self._answer(200, {"commitUrl": url, "commitOid": REVISION})

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _answer(self, status: int, value: Any, code: str = "") -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(folder: Path, kind: str = "models") -> Iterator[Hub]:
    with running(Hub(folder, kind)) as hub:
        yield hub


@contextmanager
def running(server: Any) -> Iterator[Any]:
    with server as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
