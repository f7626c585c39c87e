"""A hub in memory, served on the loopback address: as much of the Hugging Face hub as its client needs for models.

    POST /api/repos/create                                          a new repository, public or private
    GET  /api/models/ID, /api/models/ID/revision/REVISION           its newest or named commit
    GET  /api/models/ID/tree/COMMIT                                 the files of a commit
    POST /api/validate-yaml                                         accepts the head of every model card
    POST /api/models/ID/preupload/main                              which files travel on their own: *.safetensors
    POST /ID.git/info/lfs/objects/batch, PUT /lfs/SHA256            those files (Git LFS, basic transfer)
    POST /api/models/ID/commit/main                                 the other files, and a commit of all
    HEAD, GET /ID/resolve/COMMIT/FILE                               a file, from any byte on; ETag and X-Repo-Commit

Whoever sends the token `secret` may do everything, others may read what is public.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "secret"


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Commit -> path -> content, oldest first."""

    def commit(self, files: dict[str, bytes]) -> str:
        content = b"".join(path.encode() + data for path, data in sorted(files.items()))
        name = hashlib.sha1(content + str(len(self.commits)).encode()).hexdigest()
        self.commits[name] = files
        return name

    @property
    def newest(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.newest]


@dataclass
class Hub:
    """What the server holds, what it was asked, and the faults it is told to have."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """sha256 -> content of uploaded files."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of every request."""
    cut: list[str] = field(default_factory=list)
    """Names of files: the next time, the connection ends in the middle of it. Listed twice, it ends twice."""
    flip: set[str] = field(default_factory=set)
    """Names of files that are sent with a flipped byte."""
    status: int | None = None
    """Answers everything, if given."""

    def paths(self, method: str) -> list[str]:
        return [path for asked, path, _ in self.requests if asked == method]


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_arguments: object) -> None:
            pass

        def answer(self, status: int, value: object = b"", **headers: str) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content_Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if hub.status is not None:
                return self.answer(hub.status, {"error": "told so"})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.command == "PUT":  # where it may be put is known only to those who may write
                hub.large[path.rsplit("/")[-1]] = body
                return self.answer(200)
            if self.command == "POST" and not may_write:
                return self.answer(401, {"error": "Invalid username or password."})
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            match = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?", path)
            repository = hub.repositories.get(match[1]) if match else None
            if repository is None or (repository.private and not may_write):
                status = 404 if may_write else 401
                return self.answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return self.of_repository(match[1], repository, (match[2] or "").split("/"), body)

        do_GET = do_HEAD = do_POST = do_PUT = serve

        def create(self, wanted: dict) -> None:
            name = f"{wanted['organization']}/{wanted['name']}"
            known = name in hub.repositories
            if not known:
                hub.repositories[name] = Repository(private="private" in (wanted.get("visibility"), *wanted))
                hub.repositories[name].commit({})
            self.answer(409 if known else 200, {"url": f"{hub.url}/{name}"})

        def of_repository(self, name: str, repository: Repository, words: list[str], body: bytes) -> None:
            match words:
                case [""]:
                    self.answer(200, self.info(name, repository, repository.newest))
                case ["revision" | "tree" | "resolve", revision, *_] if not self.commit_of(repository, revision):
                    self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
                case ["revision", revision]:
                    self.answer(200, self.info(name, repository, self.commit_of(repository, revision)))
                case ["tree", revision]:
                    files = repository.commits[self.commit_of(repository, revision)]
                    self.answer(200, [self.entry(path, data) for path, data in files.items()])
                case ["resolve", revision, *path]:
                    self.send_file(repository, self.commit_of(repository, revision), "/".join(path))
                case ["preupload", "main"]:
                    self.answer(200, {"files": [self.upload_mode(f["path"]) for f in json.loads(body)["files"]]})
                case ["info", "lfs", "objects", "batch"]:
                    objects = json.loads(body)["objects"]
                    self.answer(200, {"transfer": "basic", "objects": [self.upload_place(o) for o in objects]})
                case ["commit", "main"]:
                    self.add_commit(name, repository, [json.loads(line) for line in body.splitlines()])
                case _:
                    self.answer(500, {"error": f"this hub has no {self.command} {self.path}"})

        def commit_of(self, repository: Repository, revision: str) -> str | None:
            return repository.newest if revision == "main" else revision if revision in repository.commits else None

        def info(self, name: str, repository: Repository, commit: str) -> dict:
            siblings = [{"rfilename": path} for path in repository.commits[commit]]
            return {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}

        def entry(self, path: str, data: bytes) -> dict:
            found = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith(".safetensors"):
                found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            return found

        def upload_mode(self, path: str) -> dict:
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

        def upload_place(self, wanted: dict) -> dict:
            known = wanted["oid"] in hub.large
            actions = {} if known else {"actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}
            return {"oid": wanted["oid"], "size": wanted["size"]} | actions

        def add_commit(self, name: str, repository: Repository, lines: list[dict]) -> None:
            files = dict(repository.files)
            for line in lines:
                value = line["value"]
                match line["key"]:
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        files[value["path"]] = hub.large[value["oid"]]
                    case "deletedFile":
                        del files[value["path"]]
            commit = repository.commit(files)
            url = f"{hub.url}/{name}/commit/{commit}"
            self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

        def send_file(self, repository: Repository, commit: str, path: str) -> None:
            data = repository.commits[commit].get(path)
            if data is None:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            tag = hashlib.sha256(data).hexdigest()
            if path in hub.flip:
                data = data[:-1] + bytes([data[-1] ^ 1])
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
            more = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
            headers = {"ETag": f'"{tag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"} | more
            if self.command == "GET" and path in hub.cut:
                hub.cut.remove(path)
                headers["Content_Length"] = str(len(data) - start)
                self.close_connection = True
                data = data[: start + (len(data) - start) // 2]
            return self.answer(206 if start else 200, data[start:], **headers)

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub at `url`, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
