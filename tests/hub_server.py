"""A stand-in for the Hugging Face Hub: the part of its HTTP API that an adapter's way needs.

Large files (safetensors) lie with a second server, the storage, as on the Hub, so that what is sent
to which host can be looked at. Faults are put in by path. Everything is in memory.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass
class Fault:
    """What to answer instead, for requests whose method and path match."""

    pattern: str
    status: int = 503
    headers: dict = field(default_factory=dict)
    body: bytes = b'{"error": "fault"}'
    cut: int | None = None
    """Not an error: serve the file, but hang up after this many bytes of the body."""
    times: int = 10**6


@dataclass
class Repo:
    """Commits in order, each all files by path; branches by name."""

    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)

    def commit(self, files, branch="main"):
        """Makes these the files of the branch and returns the commit."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """The state of the stand-in, and what was asked of it."""

    def __init__(self):
        self.url = self.storage = None
        self.forget()

    def forget(self):
        """Makes it as it was in the beginning, at the same address."""
        self.repos, self.stored, self.faults, self.requests = {}, {}, [], []
        self.listed_sizes, self.after_info = {}, None
        self.token = "hf_" + "s3cr3t" * 5

    def repo(self, name, files=None, **options):
        """Makes a repository as the Hub does, with .gitattributes; then a commit with the files."""
        made = self.repos[name] = Repo(**options)
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        if files is not None:
            made.commit({".gitattributes": b"", **files})
        return made

    def asked(self, pattern):
        """Returns the requests that match, as `METHOD path`."""
        return [line for line, _, _ in self.requests if re.search(pattern, line)]


@contextmanager
def running():
    """Yields a Hub that answers at `hub.url`."""
    hub = Hub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) for _ in range(2)]
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.05,), daemon=True) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(hub):
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; the second would wait 40 ms

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), unquote(parts.path)
        line = f"{self.command} {path}"
        host = f"http://{self.headers['Host']}"
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.requests.append((line, host, headers))
        self.cut = None
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                fault.times -= 1
                if fault.cut is None:
                    return self._send(fault.status, fault.body, fault.headers)
                self.cut = fault.cut
        for pattern, name in _ROUTES:
            if match := re.fullmatch(pattern, line):
                return getattr(self, name)(**match.groupdict())
        return self._json({"error": "no such page"}, 404)

    def _send(self, status, body=b"", headers=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is not None and len(body) > self.cut:
            self.wfile.write(body[: self.cut])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _json(self, value, status=200, **headers):
        named = {key.replace("_", "-"): text for key, text in headers.items()}
        self._send(
            status, json.dumps(value).encode(), {"Content-Type": "application/json", **named}
        )

    def _may(self, *, write=False, repo=None):
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.hub.token}":
            message = "Invalid credentials in Authorization header"
            self._json({"error": message}, 401, X_Error_Message=message)
            return False
        hidden = repo is not None and (repo not in self.hub.repos or self.hub.repos[repo].private)
        if given is None and (write or hidden):
            code = {"X_Error_Code": "RepoNotFound"} if hidden else {}
            self._json({"error": "Invalid username or password."}, 401, **code)
            return False
        if repo is not None and repo not in self.hub.repos:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return False
        return True

    def _commit_of(self, repo, revision):
        found = self.hub.repos[repo].find(revision)
        if found is None:
            message = f"Invalid rev id: {revision}"
            self._json({"error": message}, 404, X_Error_Code="RevisionNotFound")
        return found

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may(write=True):
            return
        if name in self.hub.repos:
            url = {"url": f"{self.hub.url}/{name}"}
            return self._json({"error": "You already created this model repo", **url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repo(name, private=private)
        self._json({"url": f"{self.hub.url}/{name}"})

    def branch(self, repo, branch):
        if not self._may(write=True, repo=repo):
            return
        found = self.hub.repos[repo]
        if branch in found.branches:
            return self._json({"error": "Reference already exists"}, 409)
        found.branches[branch] = found.branches["main"]
        self._json({}, 201)

    def validate(self):
        front = json.loads(self.body)["content"].split("---\n")[1]
        errors = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no mapping"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, repo, revision="main"):
        if not self._may(repo=repo) or (sha := self._commit_of(repo, revision)) is None:
            return
        files = self.hub.repos[repo].commits[sha]
        siblings = [
            {"rfilename": path, "size": self.hub.listed_sizes.get(path, len(data))}
            for path, data in files.items()
        ]
        private = self.hub.repos[repo].private
        self._json({"id": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []})
        if self.hub.after_info is not None:
            self.hub.after_info()

    def tree(self, repo, revision):
        if not self._may(repo=repo) or (sha := self._commit_of(repo, revision)) is None:
            return
        entries = []
        for path, data in self.hub.repos[repo].commits[sha].items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
            if path.endswith(".safetensors"):
                oid = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def preupload(self, repo, revision):
        if not self._may(write=True, repo=repo) or (sha := self._commit_of(repo, revision)) is None:
            return
        there = self.hub.repos[repo].commits[sha]
        files = [
            {
                "path": (path := file["path"]),
                "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": _git_hash(there[path]) if path in there else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def batch(self, repo):
        if not self._may(write=True, repo=repo):
            return
        objects = [
            {
                **asked,
                "actions": {
                    "upload": {"href": f"{self.hub.storage}/storage/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify/{asked['oid']}"},
                },
            }
            for asked in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json({"error": "another hash"}, 400)
        self.hub.stored[oid] = self.body
        self._send(200)

    def verify(self, oid):
        self._json({}, 200 if oid in self.hub.stored else 404)

    def commit(self, repo, revision):
        if not self._may(write=True, repo=repo) or (sha := self._commit_of(repo, revision)) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, operations = lines[0]["value"], lines[1:]
        if header.get("parentCommit") not in (None, sha):
            return self._json({"error": "A commit has happened since."}, 412)
        files = dict(self.hub.repos[repo].commits[sha])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.stored[value["oid"]]
        made = self.hub.repos[repo].commit(files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{made}", "commitOid": made})

    def resolve(self, repo, revision, path):
        if not self._may(repo=repo) or (sha := self._commit_of(repo, revision)) is None:
            return
        data = self.hub.repos[repo].commits[sha].get(path)
        if data is None:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        headers = {"X-Repo-Commit": sha}
        if not path.endswith(".safetensors"):
            return self._part(data, {**headers, "ETag": f'"{_git_hash(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.hub.stored[oid] = data
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/storage/{oid}"})

    def load(self, oid):
        self._part(self.hub.stored[oid], {"ETag": f'"{oid}"'})

    def _part(self, data, headers):
        headers = {**headers, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data, headers)
        start = int(asked[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206, data[start:], headers)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/models/{_REPO}"
_ROUTES = (
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST {_API}/branch/(?P<branch>.+)", "branch"),
    (rf"GET {_API}", "info"),
    (rf"GET {_API}/revision/(?P<revision>.+)", "info"),
    (rf"GET {_API}/tree/(?P<revision>.+)", "tree"),
    (rf"POST {_API}/preupload/(?P<revision>.+)", "preupload"),
    (rf"POST {_API}/commit/(?P<revision>.+)", "commit"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /storage/(?P<oid>\w+)", "store"),
    (r"(?:GET|HEAD) /storage/(?P<oid>\w+)", "load"),
    (r"POST /verify/(?P<oid>\w+)", "verify"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)


def _git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
