"""A small server that speaks the hub's protocol over real HTTP on 127.0.0.1, and can fail in every way that the hub can."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much as huggingface_hub needs, for the repositories in `repos`. A handler class of its own for each server."""

    url: str
    files: dict[str, bytes]
    repos: tuple[str, ...] = ("acme/tiny", "acme/gated")
    authorizations: set[str]
    requests: Counter
    ranges: list[str]
    uploads: dict[str, bytes]
    drop_once: dict[str, int]
    """name -> bytes after which the connection breaks, the first time that the file is asked for."""
    lies: dict[str, bytes]
    """name -> what is sent instead of the content that the listing describes."""
    together: threading.Barrier | None
    """Where requests for weight files wait for each other."""
    answers: dict[str, tuple[int, dict[str, str]]]
    """part of a path -> status and headers to answer with."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.authorizations.add(self.headers.get("Authorization", ""))
        path = self.path.split("?")[0]
        self.requests[f"{self.command} {path}"] += 1
        if found := next((answer for part, answer in self.answers.items() if part in self.path), None):
            return self.answer(found[0], headers=found[1])
        if path == "/api/models":
            return self.answer(200, json.dumps([{"id": repo, "_id": repo} for repo in self.repos]).encode())
        repo = next((repo for repo in self.repos if f"/{repo}/" in path + "/"), None)
        if repo is None:
            return self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
        if path.startswith(f"/api/models/{repo}/tree/"):
            return self.answer(200, json.dumps([self.entry(name) for name in self.files]).encode())
        if path.startswith("/api/"):
            if "/revision/" in path and not path.endswith(("/main", COMMIT)):
                return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in self.files]
            if "blobs=true" in self.path:
                for sibling in siblings:
                    entry = self.entry(sibling["rfilename"])
                    sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                    if "lfs" in entry:
                        lfs = entry["lfs"]
                        sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
            return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if repo == "acme/gated":
            return self.answer(403, headers={"X-Error-Code": "GatedRepo"})
        self.send_file(path.split(f"/resolve/{COMMIT}/")[1])

    def do_POST(self) -> None:
        """An upload: the repository is made, files are announced, large ones asked for by LFS, and all committed."""
        self.authorizations.add(self.headers.get("Authorization", ""))
        self.requests[f"POST {self.path}"] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if found := next((answer for part, answer in self.answers.items() if part in self.path), None):
            return self.answer(found[0], headers=found[1])
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            return self.reply({"url": f"{self.url}/{wanted['organization']}/{wanted['name']}"})
        if self.path == "/api/validate-yaml":  # the model card's head
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]
            return self.reply({"files": files})
        if self.path.endswith("/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/put/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        assert "/commit/" in self.path, self.path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.uploads[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.uploads[value["path"]] = self.uploads.pop(value["oid"])
        repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        self.reply({"commitUrl": f"{self.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.uploads[self.path.rpartition("/")[2]] = content
        self.answer(200)

    def reply(self, content: dict) -> None:
        self.answer(200, json.dumps(content).encode())

    def entry(self, name: str) -> dict:
        """A file in a listing; large ones are stored with LFS, whose pointer has a size and an id of its own."""
        content = self.files[name]
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry = {"type": "file", "path": name, "size": len(content), "oid": blob}
        if name.endswith(".safetensors"):
            entry["oid"] = "f" * 40
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def send_file(self, name: str) -> None:
        entry, content = self.entry(name), self.lies.get(name, self.files[name])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{etag}"', "Accept-Ranges": "bytes"}
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        whole = len(content)
        if asked and self.command == "GET":
            self.ranges.append(f"{name} {asked[1]}")
            status, content = 206, content[int(asked[1]) :]
            headers["Content-Range"] = f"bytes {asked[1]}-{whole - 1}/{whole}"
        if self.command == "GET" and self.together is not None and name.endswith(".safetensors"):
            self.together.wait()
        if self.command == "GET" and name in self.drop_once:
            return self.answer(status, content, headers | {"ETag": f'"{etag}"'}, drop_after=self.drop_once.pop(name))
        self.answer(status, content, headers | {"ETag": f'"{etag}"'})

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, drop_after: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:drop_after])
        if drop_after is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[type[Hub]]:
    """A server of its own; the class that is yielded holds its state and its `url`."""
    state = {"files": dict(files), "authorizations": set(), "requests": Counter(), "ranges": [], "uploads": {}}
    handler = type("Handler", (Hub,), {**state, "drop_once": {}, "lies": {}, "answers": {}, "together": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
