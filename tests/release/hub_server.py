"""A hub on this machine, for tests: the endpoints that huggingface_hub 2.4 calls for model repositories, and faults.

Standard library only. A commit is there whole or not at all; large files (safetensors) go through the LFS store, as on
the real hub; a private repository is not there for anybody but its owner.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

ADAS_TOKEN, BOBS_TOKEN = "hf_the_first_token", "hf_the_second_token"
OWNERS = {ADAS_TOKEN: "ada", BOBS_TOKEN: "bob"}


class Fault(NamedTuple):
    """What goes wrong with the next requests that match: a status, or `drop` (no answer), `lost` (done, but no answer),
    `half` (the body is not read to its end)."""

    request: str  # regular expression over "METHOD /path"
    what: int | str
    headers: dict[str, str] = {}  # noqa: RUF012


@dataclass
class Commit:
    oid: str
    files: dict[str, tuple[bytes, bool]]  # path: content, whether it is large


@dataclass
class Repo:
    owner: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)  # large files by sha256, committed or not
    names: dict[str, str] = field(default_factory=dict)  # sha256: path

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit.oid == revision), None)


class Answer(NamedTuple):
    status: int
    body: Any = None
    headers: dict[str, str] = {}  # noqa: RUF012


class Refused(Exception):  # noqa: N818
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.answer = Answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


class HubServer(ThreadingHTTPServer):
    """Serves from a thread of its own until `close`; what was asked is in `log`, what is to go wrong in `faults`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.headers: list[str] = []
        self.waits: list[float] = []  # seconds that clients waited between tries
        self.lock = threading.RLock()
        self.commits = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a reader of a branch sees, without what the hub itself puts there."""
        commit = self.repos[repo].find(revision)
        return {path: content for path, (content, _) in commit.files.items() if path != ".gitattributes"}

    def next_oid(self) -> str:
        self.commits += 1
        return hashlib.sha1(b"commit %d" % self.commits).hexdigest()

    def fault_of(self, request: str) -> Fault | None:
        with self.lock:
            found = next((fault for fault in self.faults if re.search(fault.request, request)), None)
            if found is not None:
                self.faults.remove(found)
            return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one packet; two would wait for the client's nod
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        request = f"{self.command} {unquote(url.path)}"
        self.server.log.append(request)
        self.server.headers.append(str(self.headers))
        fault = self.server.fault_of(request)
        if fault is not None and fault.what == "half":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.drop()
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault is not None and fault.what == "drop":
            return self.drop()
        if fault is not None and isinstance(fault.what, int):
            return self.send(Answer(fault.what, {"error": "injected"}, fault.headers))
        try:
            with self.server.lock:
                found = self.route(url.path, {key: value[0] for key, value in parse_qs(url.query).items()})
        except Refused as refused:
            found = refused.answer
        return self.drop() if fault is not None and fault.what == "lost" else self.send(found)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, answer: Answer) -> None:
        raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for key, value in {"Content-Length": str(len(raw)), **answer.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in OWNERS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return OWNERS[token]

    def repo(self, name: str, write: bool = False) -> Repo:
        found, user = self.server.repos.get(name), self.user
        if found is None or (found.private and found.owner != user):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and found.owner != user:
            raise Refused(403, message="Forbidden")
        return found

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        found = repo.find(unquote(revision))
        if found is None:
            raise Refused(404, "RevisionNotFound", "Revision not found")
        return found

    def route(self, path: str, query: dict[str, str]) -> Answer:
        for (method, pattern), act in ROUTES.items():
            if (found := re.fullmatch(pattern, path)) and self.command in method.split():
                return act(self, *found.groups())
        raise Refused(404, message=f"no such endpoint: {self.command} {path}")

    def whoami(self) -> Answer:
        return Answer(200, {"type": "user", "name": self.user, "orgs": []})

    def create(self) -> Answer:
        asked, user = json.loads(self.body), self.user
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user:
            raise Refused(403, message=f"You don't have the rights to create a model under {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.server.repos:
            return Answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        repo = Repo(owner, asked.get("visibility", "public") == "private")
        repo.branches["main"] = [
            Commit(self.server.next_oid(), {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        ]
        self.server.repos[name] = repo
        return Answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def delete_repo(self) -> Answer:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        self.repo(name, write=True)
        del self.server.repos[name]
        return Answer(200, {})

    def settings(self, name: str) -> Answer:
        self.repo(name, write=True).private = json.loads(self.body)["visibility"] == "private"
        return Answer(200, {})

    def validate_yaml(self) -> Answer:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        faults = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer(400 if faults else 200, {"errors": faults, "warnings": []})

    def preupload(self, name: str, revision: str) -> Answer:
        commit = self.commit_of(self.repo(name, write=True), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors")
            known = commit.files.get(file["path"])
            oid = None if known is None else _sha256(known[0]) if known[1] else _git_sha1(known[0])
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer(200, {"files": files})

    def lfs_batch(self, name: str) -> Answer:
        repo, objects = self.repo(name, write=True), []
        for asked in json.loads(self.body)["objects"]:
            href = f"{self.server.url}/lfs-store/{name}/{asked['oid']}"
            actions = {} if asked["oid"] in repo.store else {"actions": {"upload": {"href": href}}}
            objects.append({**asked, **actions})
        return Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, name: str, oid: str) -> Answer:  # a signed address: it needs no token
        if _sha256(self.body) != oid:
            raise Refused(400, message="these are other bytes")
        self.server.repos[name].store[oid] = self.body
        return Answer(200, {})

    def commit(self, name: str, revision: str) -> Answer:
        repo = self.repo(name, write=True)
        before = self.commit_of(repo, revision)
        files = dict(before.files)
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header" and value.get("parentCommit", before.oid) != before.oid:
                raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            if key == "lfsFile":
                if value["oid"] not in repo.store:
                    raise Refused(422, message="the large file was not uploaded")
                files[value["path"]] = (repo.store[value["oid"]], True)
                repo.names[value["oid"]] = value["path"]
            if key == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        made = Commit(self.server.next_oid(), files)
        repo.branches[unquote(revision)].append(made)
        return Answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{made.oid}", "commitOid": made.oid})

    def branch(self, name: str, branch: str) -> Answer:
        repo = self.repo(name, write=True)
        if unquote(branch) in repo.branches:
            raise Refused(409, message="Reference already exists")
        repo.branches[unquote(branch)] = [repo.branches["main"][0]]
        return Answer(200, {})

    def squash(self, name: str, branch: str) -> Answer:
        repo = self.repo(name, write=True)
        last = self.commit_of(repo, branch)
        repo.branches[unquote(branch)] = [Commit(self.server.next_oid(), last.files)]
        return Answer(200, {})

    def lfs_files(self, name: str) -> Answer:
        repo = self.repo(name)
        rows = [
            {"fileOid": f"f{oid}", "filename": repo.names.get(oid, ""), "oid": oid, "size": len(content)}
            for oid, content in repo.store.items()
        ]
        return Answer(200, [{**row, "pushedAt": "2026-11-01T00:00:00.000Z"} for row in rows])

    def lfs_delete(self, name: str) -> Answer:
        repo = self.repo(name, write=True)
        for sha in json.loads(self.body)["deletions"]["sha"]:
            del repo.store[sha.removeprefix("f")]
        return Answer(200, {})

    def info(self, name: str, revision: str | None) -> Answer:
        repo = self.repo(name)
        commit = self.commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        return Answer(200, {"id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> Answer:
        rows = []
        for path, (content, large) in self.commit_of(self.repo(name), revision).files.items():
            row = {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
            rows.append(
                row | ({"lfs": {"oid": _sha256(content), "size": len(content), "pointerSize": 1}} if large else {})
            )
        return Answer(200, rows)

    def resolve(self, name: str, revision: str, path: str) -> Answer:
        commit = self.commit_of(self.repo(name), revision)
        if unquote(path) not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content, large = commit.files[unquote(path)]
        digest = _sha256(content) if large else _git_sha1(content)
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))} if large else {}
        return Answer(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": commit.oid, **linked})


_ID = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    ("GET", "/api/whoami-v2"): Handler.whoami,
    ("POST", "/api/repos/create"): Handler.create,
    ("DELETE", "/api/repos/delete"): Handler.delete_repo,
    ("POST", "/api/validate-yaml"): Handler.validate_yaml,
    ("PUT", f"/api/models/{_ID}/settings"): Handler.settings,
    ("POST", f"/api/models/{_ID}/preupload/([^/]+)"): Handler.preupload,
    ("POST", f"/api/models/{_ID}/commit/([^/]+)"): Handler.commit,
    ("POST", f"/api/models/{_ID}/branch/([^/]+)"): Handler.branch,
    ("POST", f"/api/models/{_ID}/super-squash/([^/]+)"): Handler.squash,
    ("GET", f"/api/models/{_ID}/lfs-files"): Handler.lfs_files,
    ("POST", f"/api/models/{_ID}/lfs-files/batch"): Handler.lfs_delete,
    ("GET", f"/api/models/{_ID}(?:/revision/([^/]+))?"): Handler.info,
    ("GET", f"/api/models/{_ID}/tree/([^/]+)"): Handler.tree,
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch"): Handler.lfs_batch,
    ("PUT", f"/lfs-store/{_ID}/([0-9a-f]+)"): Handler.lfs_put,
    ("HEAD GET", f"/{_ID}/resolve/([^/]+)/(.+)"): Handler.resolve,
}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
