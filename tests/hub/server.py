"""A Hub on 127.0.0.1, in memory: what huggingface_hub's client needs to push and pull models and data sets.

    with LoopbackHub() as hub:
        hub.url, hub.repositories, hub.requests
        hub.fail("GET", r"\\.safetensors$", "truncate")

Tokens: `hf_me` and `hf_you` may write as the users `me` and `you`, `hf_reader` may only read what `me` has,
any other is refused. LFS files come from another address by redirects, as the Hub's come from its CDN.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

USERS = {"hf_me": ("me", "write"), "hf_you": ("you", "write"), "hf_reader": ("me", "read")}
LFS_FROM = 1000  # bytes; text files stay in the commit whatever their size
TEXT = (".json", ".md", ".txt", ".py", ".gitattributes")
KINDS = {"models": "model", "datasets": "dataset"}


@dataclass
class File:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    name: str
    kind: str  # model or dataset
    private: bool = False
    gated: bool = False  # shows what it has and gives nobody any of it
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # sha -> its files
    branches: dict[str, str] = field(default_factory=dict)  # also refs/pr/N

    def commit(self, files: dict[str, File], branch: str = "main", title: str = "") -> str:
        parent = self.branches.get(branch, self.branches.get("main", ""))
        listing = "".join(f"{path}:{file.sha256}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(f"{parent}{len(self.commits)}{title}{listing}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    method: str
    path: re.Pattern[str]
    kind: str  # 500, drop (no answer at all) or truncate (half of the body)
    times: int


class LoopbackHub:
    """Serves from a thread of its own. `repositories` is keyed by (kind, name)."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.storage: dict[str, bytes] = {}  # LFS objects by sha256
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "GET /me/corgi/resolve/main/model_index.json", in order
        self.lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self) -> "LoopbackHub":
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(self, method: str, path: str, kind: str, times: int = 1) -> None:
        """The next `times` requests of that method whose path matches go wrong; -1 is all of them."""
        self.faults.append(Fault(method, re.compile(path), kind, times))

    def repair(self) -> None:
        self.faults.clear()

    def next_fault(self, method: str, path: str) -> str | None:
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.method == method and fault.times and fault.path.search(path):
                    fault.times -= 1
                    return fault.kind
        return None

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A model put there by hand, with whatever file names."""
        repository = Repository(name, "model", private)
        stored = {path: File(content, lfs=path.endswith(".safetensors")) for path, content in files.items()}
        self.storage |= {file.sha256: file.content for file in stored.values()}
        repository.commit(stored)
        self.repositories["model", name] = repository
        return repository


class Refused(Exception):
    """An answer other than 200: its status and, for the client's kinds of errors, code and message."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    # ---- one request ----

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cut = False
        fault = self.hub.next_fault(self.command, path)
        if fault == "drop":
            self.close_connection = True
            return
        self.cut = fault == "truncate"
        try:
            if fault == "500":
                raise Refused(500, "Internal Error - We're working hard to fix this as soon as possible!")
            self.user = self.authenticate()
            self.route(path, parse_qs(urlsplit(self.path).query))
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            self.answer({"error": refused.message}, refused.status, headers)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in ({"Content-Type": kind} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
            self.close_connection |= self.cut

    def authenticate(self) -> tuple[str, str] | None:
        """(user, role), None without a token."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind != "Bearer":
            return None
        if token not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def route(self, path: str, query: dict[str, list[str]]) -> None:
        for method, pattern, handler in ROUTES:
            if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                handler(self, query, **match.groupdict())
                return
        raise Refused(404, f"no such endpoint here: {self.command} {path}")

    def repository(self, kind: str, name: str, write: bool = False) -> Repository:
        found = self.hub.repositories.get((KINDS[kind], name))
        owner = name.split("/")[0]
        reads = found is not None and (not found.private or (self.user is not None and self.user[0] == owner))
        if found is None or not reads:  # a private repository does not show that it is there
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user is None:
            raise Refused(401, "Invalid username or password.")
        if write and self.user != (owner, "write"):
            raise Refused(403, "Forbidden: you don't have the right to write to this repository")
        return found

    def revision(self, repository: Repository, revision: str) -> str:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # ---- the endpoints ----

    def whoami(self, query: dict[str, list[str]]) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        name, role = self.user
        self.answer({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self, query: dict[str, list[str]]) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user[0]
        if self.user != (owner, "write"):
            raise Refused(403, f"You don't have the rights to create a repository under {owner!r}")
        name, kind = f"{owner}/{asked['name']}", asked.get("type") or "model"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            self.answer({"error": "You already created this repo", "url": url}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        repository = Repository(name, kind, bool(private))
        repository.commit({".gitattributes": File(b"*.safetensors filter=lfs\n")}, title="initial commit")
        self.hub.repositories[kind, name] = repository
        self.answer({"url": url, "name": name, "id": name})

    def validate_yaml(self, query: dict[str, list[str]]) -> None:
        self.answer({"errors": [], "warnings": []})

    def info(self, query: dict[str, list[str]], kind: str, name: str, revision: str | None = None) -> None:
        repository = self.repository(kind, name)
        sha = self.revision(repository, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        self.answer({"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def refs(self, query: dict[str, list[str]], kind: str, name: str) -> None:
        repository = self.repository(kind, name)
        heads = [(ref, sha) for ref, sha in repository.branches.items() if "/" not in ref]
        branches = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha} for ref, sha in heads]
        self.answer({"branches": branches, "tags": [], "converts": []})

    def tree(
        self, query: dict[str, list[str]], kind: str, name: str, revision: str, folder: str | None = None
    ) -> None:
        repository = self.repository(kind, name)
        files = repository.commits[self.revision(repository, revision)]
        start = "" if folder is None else folder + "/"
        inside = {path: file for path, file in files.items() if path.startswith(start)}
        if folder is not None and not inside:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = query.get("recursive", ["False"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(inside.items()):
            parts = path.removeprefix(start).split("/")
            for depth in range(1, len(parts)):
                above = start + "/".join(parts[:depth])
                if recursive or depth == 1:
                    entries[above] = {"type": "directory", "path": above, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = describe(path, file)
        self.answer(list(entries.values()))

    def paths_info(self, query: dict[str, list[str]], kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name)
        files = repository.commits[self.revision(repository, revision)]
        asked = json.loads(self.body) if self.body.startswith(b"{") else parse_qs(self.body.decode())
        paths = asked.get("paths", [])
        found = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in files:
                found.append(describe(path, files[path]))
            elif any(file.startswith(path.rstrip("/") + "/") for file in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.answer(found)

    def preupload(self, query: dict[str, list[str]], kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write="create_pr" not in query)
        known = repository.commits[self.revision(repository, revision)]
        files = []
        for file in json.loads(self.body)["files"]:
            lfs = not file["path"].endswith(TEXT) and file["size"] >= LFS_FROM
            there = known.get(file["path"])
            oid = there and (there.sha256 if there.lfs else there.blob_id)
            mode = "lfs" if lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def lfs_batch(self, query: dict[str, list[str]], name: str, kind: str | None = None) -> None:
        self.repository(kind or "models", name)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.storage_url}/upload/{wanted['oid']}"}}
            there = wanted["oid"] in self.hub.storage
            objects.append(wanted | ({} if there else {"actions": actions}))
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, query: dict[str, list[str]], oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not what was announced")
        self.hub.storage[oid] = self.body
        self.answer({})

    def commit(self, query: dict[str, list[str]], kind: str, name: str, revision: str) -> None:
        create_pr = query.get("create_pr") == ["1"]
        repository = self.repository(kind, name, write=not create_pr)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        files, title = dict(repository.commits[self.revision(repository, revision)]), ""
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise Refused(400, f"{value['path']} was never uploaded")
                files[value["path"]] = File(self.hub.storage[value["oid"]], lfs=True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"unknown operation {operation['key']}")
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
        branch = f"refs/pr/{number}" if create_pr else revision
        sha = repository.commit(files, branch, title)
        page = f"{self.hub.url}/{name}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}"}
        self.answer(answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if create_pr else {}))

    def resolve(
        self, query: dict[str, list[str]], name: str, revision: str, path: str, kind: str | None = None
    ) -> None:
        repository = self.repository(kind or "models", name)
        sha = self.revision(repository, revision)
        file = repository.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if repository.gated:
            raise Refused(403, f"Access to model {name} is restricted", "GatedRepo")
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            location = f"{self.hub.storage_url}/storage/{file.sha256}/{quote(path)}"
            self.answer(b"", 302, headers | {"ETag": f'"{file.blob_id}"', "Location": location})
        else:
            self.send_content(file.content, headers | {"ETag": f'"{file.blob_id}"'})

    def send_stored(self, query: dict[str, list[str]], oid: str) -> None:
        self.send_content(self.hub.storage[oid], {"ETag": f'"{oid}"'})

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        headers["Accept-Ranges"] = "bytes"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.answer(content[start : end + 1], 206, headers)
        else:
            self.answer(content, 200, headers)


def describe(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
    return entry


_REPOSITORY = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_PAGE = r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", _REPOSITORY, Handler.info),
    ("GET", f"{_REPOSITORY}/revision/{_REVISION}", Handler.info),
    ("GET", f"{_REPOSITORY}/refs", Handler.refs),
    ("GET", f"{_REPOSITORY}/tree/{_REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    ("POST", f"{_REPOSITORY}/paths-info/{_REVISION}", Handler.paths_info),
    ("POST", f"{_REPOSITORY}/preupload/{_REVISION}", Handler.preupload),
    ("POST", f"{_REPOSITORY}/commit/{_REVISION}", Handler.commit),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/upload/(?P<oid>[0-9a-f]{64})", Handler.store),
    ("GET|HEAD", "/storage/(?P<oid>[0-9a-f]{64})/.+", Handler.send_stored),
    ("GET|HEAD", f"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
]
