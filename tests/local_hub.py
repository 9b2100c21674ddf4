"""A stand-in for the hub on this machine.

It has one repository, and answers the few requests that sharing a router takes.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    requests: list[tuple[str, str]]
    created: dict
    tokens: set[str | None]

    def log_message(self, *args):
        pass

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.note()
        here = f"http://{self.headers['Host']}/someone/some-router"
        if self.path == "/api/repos/create":
            type(self).created = json.loads(body)
            self.reply({"url": here})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.reply({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply({"commitUrl": f"{here}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.reply({}, 404)

    def do_GET(self):
        self.note()
        name = self.path.split("/")[-1]
        if self.path.startswith("/api/models/someone/some-router"):
            siblings = [
                {"rfilename": name, "size": len(content)} for name, content in self.files.items()
            ]
            tree = [
                {"type": "file", "path": name, "size": len(c), "oid": "0" * 40}
                for name, c in self.files.items()
            ]
            is_tree = "/tree/" in self.path
            self.reply(
                tree
                if is_tree
                else {"id": "someone/some-router", "sha": COMMIT, "siblings": siblings}
            )
        elif self.path.startswith("/someone/some-router/resolve/") and name in self.files:
            etag = hashlib.sha256(self.files[name]).hexdigest()
            self.reply(self.files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        else:
            self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def note(self):
        self.requests.append((self.command, self.path))
        self.tokens.add(self.headers.get("Authorization"))


@contextmanager
def local_hub(monkeypatch, cache):
    """Inside, huggingface_hub speaks with this process's server alone; downloads go to `cache`."""
    hub = type("Hub", (LocalHub,), {"files": {}, "requests": [], "created": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
