"""A stand-in for the hub on 127.0.0.1: what huggingface_hub asks of it to upload and download a model, and no more."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn(ThreadingHTTPServer):
    """Repositories in memory: `files` by repository and path, `cards` that were sent to be validated, `asked` in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.large, self.cards, self.asked = {}, {}, [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home):
        """The variables under which a process takes it for the hub; `home` has what it keeps."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_stand_in", "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**os.environ, **own}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content=b"", status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, _, name = found.groups()
            files = self.server.files.get(repository)
            if files is None or name not in files:
                code = "RepoNotFound" if files is None else "EntryNotFound"
                return self.answer(status=404, X_Error_Code=code, X_Repo_Commit="0" * 40)
            tag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(files[name], ETag=f'"{tag}"', X_Repo_Commit="0" * 40)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            files = self.server.files.get(found[1])
            if files is None:
                return self.answer(status=404, X_Error_Code="RepoNotFound")
            return self.answer({"id": found[1], "sha": "0" * 40, "siblings": [{"rfilename": n} for n in sorted(files)]})
        return self.answer(status=404)

    def do_HEAD(self):
        self.do_GET()

    def do_PUT(self):
        self.server.asked.append((self.command, self.path))
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer()

    def do_POST(self):
        path, body = self.path.partition("?")[0], self.body()
        self.server.asked.append((self.command, path))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization'] or 'somebody'}/{asked['name']}"
            known = repository in self.server.files
            self.server.files.setdefault(repository, {})
            return self.answer({"url": f"{self.server.url}/{repository}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{"upload": {"href": f"{self.server.url}/large/{each['oid']}"}} for each in objects]
            return self.answer({"objects": [{**o, "actions": u} for o, u in zip(objects, upload, strict=True)]})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not found:
            return self.answer(status=404)
        repository, step = found.groups()
        if step == "preupload":
            modes = [
                (f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in json.loads(body)["files"]
            ]
            return self.answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[repository][value["path"]] = self.server.large[value["oid"]]
        return self.answer({"commitUrl": f"{self.server.url}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40})


@contextlib.contextmanager
def stand_in():
    """A hub for the body."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
