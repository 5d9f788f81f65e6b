"""A hub on this machine: as much of the Hugging Face hub's interface as its client needs to write and read a model.

Large files go through a second server, as on the hub, which has storage elsewhere: what it is sent shows whether a
token leaves the hub's host.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_test"


@dataclass
class Repository:
    """Commits by their names, each with all files; the last one is `main`."""

    private: bool = False
    commits: dict = field(default_factory=dict)

    def commit(self, files):
        name = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = files
        return name

    def find(self, revision):
        return list(self.commits)[-1] if revision == "main" and self.commits else revision


class Hub:
    """The state of both servers, and what they were asked."""

    def __init__(self):
        self.repositories = {}
        self.blobs = {}
        self.requests = []
        self.refuses = False

    def add(self, name, **files):
        repository = self.repositories.setdefault(name, Repository())
        files = {key.replace("__", "."): value for key, value in files.items()}
        return repository.commit({**(list(repository.commits.values()) or [{}])[-1], **files})

    def list_tokens(self, server):
        return {token for where, _, _, token in self.requests if where == server}


class _Handler(BaseHTTPRequestHandler):
    """Answers for either server; which one it is, and the state of both, are its server's attributes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        headers.setdefault("Content-Length", len(content))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def serve(self):
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.hub.requests.append((self.server.where, self.command, path, token))
        body = self.read()
        if self.server.where == "storage":
            return self.store(path, body)
        return self.answer(path.strip("/").split("/"), body, token)

    def store(self, path, body):
        if self.command == "PUT":
            self.server.hub.blobs[path.strip("/")] = body
            return self.reply(200)
        return self.reply(200, self.server.hub.blobs[path.strip("/")])

    def answer(self, parts, body, token):
        if self.server.hub.refuses:
            return self.reply(403, X_Error_Message="You have no right to it")
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body), token)
        if parts == ["api", "validate-yaml"]:
            return self.validate(json.loads(body)["content"])
        if parts[2:3] == ["resolve"]:
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
        if parts[-4:] == ["info", "lfs", "objects", "batch"]:
            return self.reply(
                200, {"transfer": "basic", "objects": [self.place(x) for x in json.loads(body)["objects"]]}
            )
        assert parts[:2] == ["api", "models"], parts
        return self.model("/".join(parts[2:4]), parts[4:], body, token)

    def validate(self, card):
        front = yaml.safe_load(card.split("---\n")[1])
        return self.reply(200 if front["license"] else 400, {"errors": [], "warnings": []})

    def find(self, name, token):
        repository = self.server.hub.repositories.get(name)
        if repository is None or (repository.private and token != TOKEN):
            self.reply(401 if not token else 404, X_Error_Code="RepoNotFound")
            return None
        return repository

    def create(self, values, token):
        if token != TOKEN:
            return self.reply(401)
        name = f"{values['organization']}/{values['name']}"
        is_private = values.get("private") or values.get("visibility") == "private"  # before and since version 2
        if name in self.server.hub.repositories:
            return self.reply(409, {"url": f"{self.server.addresses['hub']}/{name}"})
        self.server.hub.repositories[name] = Repository(is_private)
        self.server.hub.add(name, __gitattributes=b"")
        return self.reply(200, {"url": f"{self.server.addresses['hub']}/{name}"})

    def place(self, blob):
        href = f"{self.server.addresses['storage']}/{blob['oid']}"
        return {"oid": blob["oid"], "size": blob["size"], "actions": {"upload": {"href": href}}}

    def resolve(self, name, revision, file, token):
        repository = self.find(name, token)
        if repository is None:
            return None
        commit = repository.find(revision)
        if commit not in repository.commits:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        content = repository.commits[commit].get(file)
        if content is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if not file.endswith(".safetensors"):
            return self.reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)
        oid = hashlib.sha256(content).hexdigest()
        self.server.hub.blobs[oid] = content
        linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": len(content), "X_Repo_Commit": commit}
        return self.reply(302, Location=f"{self.server.addresses['storage']}/{oid}", **linked)

    def model(self, name, rest, body, token):
        repository = self.find(name, token)
        if repository is None:
            return None
        if rest[:1] == ["preupload"]:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "lfs" if n.endswith(".safetensors") else "regular"} for n in names]
            return self.reply(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if rest[:1] == ["commit"]:
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        files = list(repository.commits.values())[-1]
        siblings = [{"rfilename": file} for file in files]
        return self.reply(200, {"id": name, "private": repository.private, "siblings": siblings})

    def commit(self, name, lines):
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.blobs[value["oid"]]
        commit = self.server.hub.add(name, **files)
        address = f"{self.server.addresses['hub']}/{name}/commit/{commit}"
        return self.reply(200, {"commitUrl": address, "commitOid": commit})


for _method in ("GET", "HEAD", "POST", "PUT"):
    setattr(_Handler, f"do_{_method}", _Handler.serve)


@contextmanager
def run_hub():
    """Run both servers; give the hub and its address."""
    hub, addresses, servers = Hub(), {}, []
    for where, host in (("hub", "127.0.0.1"), ("storage", "localhost")):
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.hub, server.where, server.addresses = hub, where, addresses
        server.daemon_threads = True
        addresses[where] = f"http://{host}:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    try:
        yield hub, addresses["hub"]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
