"""A hub on this machine: repositories that lie in directories, served by HTTP as huggingface.co serves them."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """repositories: {("models" or "datasets", "org/name"): {revision: directory}}; a commit is named by its content.

    locked: {(kind, name): "private", "gated", or the status that answers all requests, such as 500}.
    requests: the method and path of each that came.
    """

    def __init__(self, directory):
        self.directory = directory
        self.repositories = {}
        self.locked = {}
        self.requests = []
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind, name, files, revision="main"):
        """files: {path: bytes, a text, or the path of a file to copy}"""
        root = self.directory / kind / name / hashlib.sha256(revision.encode()).hexdigest()[:8]
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, root / path)
            else:
                (root / path).write_bytes(content.encode() if isinstance(content, str) else content)
        self.repositories.setdefault((kind, name), {})[revision] = root

    def sent(self, name):
        """The files of a repository that were sent, by their paths in it."""
        paths = [path for method, path in self.requests if method == "GET" and f"/{name}/resolve/" in path]
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in paths}


def files_of(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def commit_of(root):
    digest = hashlib.sha1(str(root).encode())
    for path in files_of(root):
        digest.update(path.encode() + (root / path).read_bytes())
    return digest.hexdigest()


def object_id(content):
    """git's name of a file's content"""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path)))
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[is_api:]
        kind = "models"
        if parts[0] in ("models", "datasets"):
            kind = parts.pop(0)
        repository = (kind, "/".join(parts[:2]))
        call, revision, *rest = [*map(unquote, parts[2:]), "", ""][: max(2, len(parts) - 2)]

        lock = self.hub.locked.get(repository)
        if isinstance(lock, int):
            return self.send(lock)
        # Whoever brings no token is not told that a private repository is there.
        if repository not in self.hub.repositories or lock == "private":
            return self.refuse(401, "RepoNotFound", "Invalid username or password.")
        revisions = self.hub.repositories[repository]
        commits = {commit_of(root): root for root in revisions.values()}
        root = revisions.get(revision or "main", commits.get(revision))
        if root is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        self.commit = commit_of(root)

        if is_api and call in ("", "revision"):
            siblings = [{"rfilename": path} for path in files_of(root)]
            return self.send_json({"id": repository[1], "sha": self.commit, "private": False, "siblings": siblings})
        if lock == "gated":
            return self.refuse(401, "GatedRepo", f"Access to {kind} {repository[1]} is restricted. Please log in.")
        if is_api and call == "tree":
            return self.send_tree(root, "/".join(rest))
        if call == "resolve":
            return self.send_file(root / "/".join(rest))
        return self.refuse(404, "EntryNotFound", "Not Found")

    def send_tree(self, root, folder):
        """The files and folders of a folder; those in its folders as well, if the query says recursive."""
        if not (root / folder).is_dir():
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        deep = "recursive=true" in self.path.lower()
        entries = []
        for path in sorted((root / folder).rglob("*") if deep else (root / folder).iterdir()):
            entry = {"path": str(path.relative_to(root)), "type": "directory", "size": 0, "oid": "0" * 40}
            if path.is_file():
                content = path.read_bytes()
                entry.update(type="file", size=len(content), oid=object_id(content))
            entries.append(entry)
        return self.send_json(entries)

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, path):
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = path.read_bytes()
        self.send(200, content, {"ETag": f'"{object_id(content)}"', "X-Linked-Size": str(len(content))})

    def refuse(self, status, code, message):
        self.send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status, content=b"", headers=()):
        self.send_response(status)
        headers = {**dict(headers), "Content-Length": str(len(content)), "X-Repo-Commit": getattr(self, "commit", "")}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
