"""A stand-in of the hub: as much of its HTTP interface as a push and a download need, on a port here."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE = (".safetensors", ".gguf")


@dataclass
class Repo:
    """A repository: visibility, files of its head, and its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict] = field(default_factory=list)
    past: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of earlier commits that are still asked for."""
    refs: dict[str, str] = field(default_factory=dict)
    """Branch or tag other than main -> its commit."""

    @property
    def head(self) -> str:
        return self.commits[-1]["oid"] if self.commits else "0" * 40

    def commit(self, revision: str) -> str:
        return self.head if revision == "main" else self.refs.get(revision, revision)


class Hub:
    """The server's state, and what is to go wrong with it."""

    def __init__(self) -> None:
        self.users = {
            "hf_owner_secret": {"name": "me", "orgs": [{"name": "lab"}], "role": "write"},
            "hf_reader_secret": {"name": "me", "orgs": [], "role": "read"},
            "hf_fine_secret": {"name": "me", "orgs": [], "role": "fineGrained"},
        }
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.drops: dict[str, int] = {}
        """Part of a call -> how often the connection breaks in the middle of it."""
        self.refused: dict[str, tuple[int, str] | tuple[int, str, str]] = {}
        """Part of a call -> the status, the words and, if any, the code that it is refused with."""
        self.stored = lambda _name, content: content
        """What becomes of a file's bytes."""
        self.always_public = False
        self.card_errors: list[str] = []
        """What is wrong with the card's metadata."""
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def changing(self) -> list[str]:
        """Calls so far that change something or send content."""
        return [c for c in self.calls if not c.startswith("GET")]

    def create(self, repo: str, private: bool) -> Repo:
        made = Repo(private and not self.always_public, {".gitattributes": ATTRIBUTES})
        self.repos[repo] = made
        return made


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def oid(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_oid(content)


class _Refused(Exception):
    """A call that is answered with an error."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_args) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        call = f"{self.command} {path}"
        self.hub.calls.append(call)
        for part, left in self.hub.drops.items():
            if part in call and left:
                self.hub.drops[part] -= 1
                self.rfile.read(16)
                self.connection.close()
                return
        body = self._body()
        try:
            for part, how in self.hub.refused.items():
                if part in call:
                    self._refuse(*how)
            if "/resolve/" in path:
                self._file(*path.strip("/").split("/", 4))
            else:
                self._answer(200, self._route(path, body))
        except _Refused as refused:
            status, words, code, *body = refused.args
            headers = {"X-Error-Message": words, **({"X-Error-Code": code} if code else {})}
            self._answer(status, body[0] if body else {"error": words}, headers)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, value, headers=()) -> None:
        self._send(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **dict(headers)},
        )

    def _send(self, status: int, content: bytes, headers) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _file(self, owner: str, name: str, _resolve: str, revision: str, file: str) -> None:
        repo = self._repo(f"{owner}/{name}")
        commit = repo.commit(revision)
        if commit != repo.head and commit not in repo.past:
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
        files = repo.past.get(commit, repo.files)
        if file not in files:
            self._refuse(404, "Entry not found", "EntryNotFound")
        etag = f'"{oid(file, files[file])}"'
        self._send(200, files[file], {"ETag": etag, "X-Repo-Commit": commit})

    def _refuse(self, status: int, words: str, code: str = "") -> None:
        raise _Refused(status, words, code)

    def _user(self) -> dict:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.users:
            self._refuse(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _repo(self, name: str) -> Repo:
        self._user()
        if name not in self.hub.repos:
            self._refuse(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[name]

    def _writable(self, owner: str) -> None:
        user = self._user()
        if user["role"] == "read" or owner not in [
            user["name"],
            *(o["name"] for o in user["orgs"]),
        ]:
            self._refuse(403, "You have no write access")

    def _route(self, path: str, body: bytes):
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":  # the storage knows no tokens, only addresses
            self.hub.blobs[parts[1]] = body
            return {}
        value = json.loads(body) if body and parts[-2:-1] != ["commit"] else {}
        if path == "/api/whoami-v2":
            user = self._user()
            return {
                "name": user["name"],
                "orgs": user["orgs"],
                "auth": {"accessToken": {"role": user["role"]}},
            }
        if path == "/api/validate-yaml":
            errors = [{"message": words} for words in self.hub.card_errors]
            if errors:
                raise _Refused(400, "bad metadata", "", {"errors": errors})
            return {"errors": errors, "warnings": []}
        if path == "/api/repos/create":
            return self._create(value)
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(f"{parts[0]}/{parts[1].removesuffix('.git')}", value)
        name, what = "/".join(parts[2:4]), parts[4:]
        repo = self._repo(name)
        if not what or what[0] == "revision":
            return {
                "id": name,
                "private": repo.private,
                "sha": repo.head,
                "siblings": [{"rfilename": f} for f in repo.files],
            }
        if what[0] == "tree":
            return [self._entry(f, content) for f, content in repo.files.items()]
        self._writable(parts[2])
        if what[0] == "preupload":
            return {"files": [self._mode(repo, file["path"]) for file in value["files"]]}
        if what[0] != "commit":
            self._refuse(404, "No such address")
        return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])

    def _create(self, value: dict):
        owner = value.get("organization") or self._user()["name"]
        self._writable(owner)
        name = f"{owner}/{value['name']}"
        if name in self.hub.repos:
            self._refuse(409, "You already created this model repo")
        private = value.get("private", value.get("visibility") == "private")
        self.hub.create(name, private)
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def _mode(self, repo: Repo, path: str) -> dict:
        row = {"path": path, "shouldIgnore": False}
        row["uploadMode"] = "lfs" if path.endswith(LARGE) else "regular"
        if path in repo.files:
            row["oid"] = oid(path, repo.files[path])
        return row

    def _batch(self, name: str, value: dict):
        self._repo(name)
        self._writable(name.split("/")[0])
        objects = []
        for row in value["objects"]:
            if row["oid"] not in self.hub.blobs:
                href = f"{self.hub.url}/lfs/{row['oid']}?signature=abc"
                row = {**row, "actions": {"upload": {"href": href}}}
            objects.append(row)
        return {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, repo: Repo, lines: list[dict]):
        header = next(line["value"] for line in lines if line["key"] == "header")
        for line in lines:
            file = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(file["content"])
            elif line["key"] == "lfsFile":
                if file["oid"] not in self.hub.blobs:
                    self._refuse(400, "LFS pointer points to no file")
                content = self.hub.blobs[file["oid"]]
            else:
                continue
            repo.files[file["path"]] = self.hub.stored(file["path"], content)
        commit = hashlib.sha1(json.dumps([len(repo.commits), header]).encode()).hexdigest()
        repo.commits.append({**header, "oid": commit})
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return {"commitUrl": url, "commitOid": commit, "pullRequestUrl": None}

    def _entry(self, path: str, content: bytes) -> dict:
        row = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path.endswith(LARGE):
            sha = hashlib.sha256(content).hexdigest()
            row["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        return row
