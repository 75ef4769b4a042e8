"""A server on the loopback that speaks as much of the hub's protocol as a download needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def entry(folder: Path, name: str) -> dict[str, object]:
    """Returns what the hub says of a file in a listing."""
    body = (folder / name).read_bytes()
    return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}


def handler_of(repositories: dict[str, Path], asked: list[str], token: str | None, store: Path):
    """Returns the class that answers for folders by their names."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def respond(self, status: int, body: bytes, headers: dict[str, str], *, send: bool) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if send:
                self.wfile.write(body)

        def answer(self, *, send: bool) -> None:
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if is_api else parts[:2])
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}
                return self.respond(401, b"{}", headers, send=send)
            if name not in repositories:
                return self.respond(404, b"{}", {"X-Error-Code": "RepoNotFound"}, send=send)
            folder = repositories[name]
            if is_api:
                files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
                found: object = {
                    "id": name,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": f} for f in files],
                }
                if "tree" in parts:
                    found = [entry(folder, name) for name in files]
                kind = {"Content-Type": "application/json"}
                return self.respond(200, json.dumps(found).encode(), kind, send=send)
            file = folder / "/".join(parts[4:])
            asked.append(f"{'GET' if send else 'HEAD'} {'/'.join(parts[4:])}")
            body = file.read_bytes()
            tag = hashlib.sha1(body).hexdigest()
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            return self.respond(200, body, headers, send=send)

        def do_POST(self):
            """Creates a repository, or takes a commit whose files are in its text."""
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlparse(self.path).path).strip("/")
            if self.headers.get("Authorization") != f"Bearer {token}":
                return self.respond(401, b"{}", {}, send=True)
            kind = {"Content-Type": "application/json"}
            if path == "api/repos/create":
                found = json.loads(body)
                name = f"{found.get('organization') or 'someone'}/{found['name']}"
                repositories[name] = store / name
                answer: dict[str, object] = {"url": f"http://{self.headers['Host']}/{name}"}
            elif path == "api/validate-yaml":
                answer = {"errors": [], "warnings": []}
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                kept = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": f["path"], **kept} for f in files]}
            else:
                name = "/".join(path.split("/")[2:4])
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        file = repositories[name] / line["value"]["path"]
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(base64.b64decode(line["value"]["content"]))
                answer = {
                    "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                }
            self.respond(200, json.dumps(answer).encode(), kind, send=True)

        def do_GET(self):
            self.answer(send=True)

        def do_HEAD(self):
            self.answer(send=False)

    return Handler


@contextmanager
def serving(
    repositories: dict[str, Path], token: str | None = None, store: Path = Path()
) -> Iterator[tuple[str, list[str]]]:
    """Yields the address of a server of these folders, and the list of files that it is asked for.

    Repositories that are created lie in `store`.
    """
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(repositories, asked, token, store))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
