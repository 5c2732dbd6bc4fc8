"""The Hub, played on the loopback interface: what this package and huggingface_hub ask of it, and what can go wrong.

One server is the Hub, a second one on another port is the storage that large files are sent on to; the token must never
arrive there. Faults are put in a queue and happen to the next requests they fit.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_canaryCanaryCanaryCanary"
LARGE = (".safetensors", ".bin")


@dataclass
class Fault:
    """Something that happens to the next ``times`` requests whose ``METHOD path range`` the pattern finds.

    ``status``: the answer; ``headers``: what an answer says besides, or in place of what it should; ``cut``: bytes of
    the body after which the connection breaks; ``flip``: a byte of the body that arrives changed; ``change``: the body
    that is sent in its place, its length stated right and its range not.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    cut: int | None = None
    flip: int | None = None
    change: Callable[[bytes], bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    span: str | None
    token: bool
    storage: bool


@dataclass
class Repository:
    """Files of the one commit there is; ``private`` as it was created."""

    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = SHA
    private: bool = False
    commits: list[list[dict[str, Any]]] = field(default_factory=list)


@dataclass
class Hub:
    """Repositories by name, what was uploaded, every request, and the bytes of bodies that were sent."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    gated: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    ranges: bool = True
    redirects: bool = True
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    url: str = ""
    storage_url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        """As new."""
        self.repositories, self.objects, self.gated, self.faults, self.requests = {}, {}, set(), [], []
        self.ranges, self.redirects, self.sent = True, True, 0

    def add(self, name: str, files: dict[str, bytes]) -> None:
        self.repositories[name] = Repository(dict(files))

    def add_folder(self, name: str, folder: Path) -> None:
        """A repository with the files of a folder."""
        self.add(name, {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()})

    def got(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {r.path.rsplit("/", 1)[1] for r in self.requests if r.method == "GET" and not r.path.startswith("/api")}

    def count(self, pattern: str) -> int:
        """Requests whose ``METHOD path`` the pattern finds."""
        return sum(bool(re.search(pattern, f"{r.method} {r.path}")) for r in self.requests)

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def etag(name: str, data: bytes) -> str:
    return sha256(data) if name.endswith(LARGE) else git_oid(data)


def handler(hub: Hub, storage: bool) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        fault: Fault | None = None

        def do_HEAD(self) -> None:
            self.take()

        def do_GET(self) -> None:
            self.take()

        def do_POST(self) -> None:
            self.take()

        def do_PUT(self) -> None:
            self.take()

        def take(self) -> None:
            path, _, self.query = self.path.partition("?")
            authorised = TOKEN in (self.headers.get("Authorization") or "")
            with hub.lock:
                hub.requests.append(Request(self.command, path, self.headers.get("Range"), authorised, storage))
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.fault = hub.fault(f"{self.command} {path} {self.headers.get('Range') or ''}")
            if self.fault is not None and self.fault.status is not None:
                return self.refuse(self.fault.status, "", self.fault.headers)
            parts = path.strip("/").split("/")
            if storage:
                return self.stored(parts)
            if parts[:3] == ["api", "repos", "create"]:
                return self.create()
            if parts == ["api", "validate-yaml"]:
                return self.send_json({"errors": [], "warnings": []})
            if parts[:2] == ["api", "models"]:
                return self.model(parts)
            if parts[-4:] == ["info", "lfs", "objects", "batch"]:
                return self.batch()
            if len(parts) > 4 and parts[2] == "resolve":
                return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            return self.refuse(404, "EntryNotFound")

        def model(self, parts: list[str]) -> None:
            name = "/".join(parts[2:4])
            action = parts[4] if len(parts) > 4 else "revision"
            repository = hub.repositories.get(name)
            if repository is None:
                return self.refuse(404, "RepoNotFound")
            if name in hub.gated:
                return self.refuse(403, "GatedRepo")
            if len(parts) > 5 and parts[5] not in ("main", repository.commit):
                return self.refuse(404, "RevisionNotFound")
            if action == "revision":
                found = [self.sibling(f, d) for f, d in repository.files.items()]
                answer = {"_id": "1", "id": name, "sha": repository.commit, "siblings": found}
                return self.send_json(answer | {"private": repository.private})
            if action == "tree":
                return self.send_json(
                    [
                        {"type": "file", "path": f, "size": len(d), "oid": git_oid(d)}
                        | ({"lfs": {"oid": sha256(d), "size": len(d), "pointerSize": 134}} if f.endswith(LARGE) else {})
                        for f, d in repository.files.items()
                    ]
                )
            if action == "preupload":
                wanted = json.loads(self.body)["files"]
                return self.send_json(
                    {
                        "files": [
                            {
                                "path": f["path"],
                                "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                                "shouldIgnore": False,
                            }
                            for f in wanted
                        ]
                    }
                )
            if action == "commit":
                return self.commit(name, repository)
            return self.refuse(404, "EntryNotFound")

        def sibling(self, name: str, data: bytes) -> dict[str, Any]:
            found: dict[str, Any] = {"rfilename": name}
            if "blobs=" in self.query:
                found |= {"size": len(data), "blobId": git_oid(data)}
                if name.endswith(LARGE):
                    found["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            return found

        def create(self) -> None:
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            url = f"{hub.url}/{name}"
            if name in hub.repositories:
                self.send_json({"url": url}, 409)
                return
            hub.repositories[name] = Repository(
                private=asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            self.send_json({"url": url})

        def batch(self) -> None:
            objects = []
            for o in json.loads(self.body)["objects"]:
                answer = {"oid": o["oid"], "size": o["size"]}
                if o["oid"] not in hub.objects:
                    answer["actions"] = {"upload": {"href": f"{hub.storage_url}/upload/{o['oid']}"}}
                objects.append(answer)
            self.send_json({"transfer": "basic", "objects": objects})

        def commit(self, name: str, repository: Repository) -> None:
            lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
            files = dict(repository.files)
            for line in lines:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    if value["oid"] not in hub.objects:
                        return self.refuse(400, "LfsObjectMissing")
                    files[value["path"]] = hub.objects[value["oid"]]
            repository.files = files
            repository.commits.append(lines)
            repository.commit = hashlib.sha1(self.body).hexdigest()
            self.send_json(
                {"commitUrl": f"{hub.url}/{name}/commit/{repository.commit}", "commitOid": repository.commit}
            )
            return None

        def resolve(self, name: str, revision: str, file: str) -> None:
            repository = hub.repositories.get(name)
            if repository is None or name in hub.gated:
                return self.refuse(
                    404 if repository is None else 403, "RepoNotFound" if repository is None else "GatedRepo"
                )
            content = repository.files.get(file)
            if revision not in ("main", repository.commit) or content is None:
                return self.refuse(404, "EntryNotFound" if content is None else "RevisionNotFound")
            large = file.endswith(LARGE)
            headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{git_oid(content)}"'}
            if large:
                headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            if large and hub.redirects:
                headers |= {"Location": f"{hub.storage_url}/{name}/{revision}/{file}", "Content-Length": "0"}
                self.send_response(302)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                return None
            return self.send_bytes(content, headers)

        def stored(self, parts: list[str]) -> None:
            if parts[0] == "upload":
                if sha256(self.body) != parts[1]:
                    return self.refuse(400, "WrongDigest")
                hub.objects[parts[1]] = self.body
                return self.send_bytes(b"", {})
            name, file = "/".join(parts[:2]), "/".join(parts[3:])
            return self.send_bytes(hub.repositories[name].files[file], {})

        def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_json(self, content: Any, status: int = 200) -> None:
            self.send_bytes(json.dumps(content).encode(), {}, status)

        def send_bytes(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
            with_body = self.command != "HEAD"
            wanted = self.headers.get("Range") if hub.ranges and with_body and status == 200 else None
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                total, data = len(data), data[int(first) : int(last or len(data)) + 1]
                headers = headers | {"Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{total}"}
            if self.fault is not None and self.fault.change is not None:
                data = self.fault.change(data)
            self.send_response(206 if wanted else status)
            told = headers | {"Content-Length": str(len(data))} | (self.fault.headers if self.fault is not None else {})
            for key, value in told.items():
                self.send_header(key, value)
            self.end_headers()
            if not with_body:
                return
            if self.fault is not None and self.fault.flip is not None and self.fault.flip < len(data):
                at = self.fault.flip
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            cut = self.fault.cut if self.fault is not None else None
            try:
                self.wfile.write(data if cut is None else data[:cut])
                with hub.lock:
                    hub.sent += len(data) if cut is None else min(cut, len(data))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            if cut is not None:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            return

    return Handler


@contextmanager
def playing() -> Iterator[Hub]:
    """A Hub and its storage while the context lasts."""
    hub = Hub()
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(hub, storage)) for storage in (False, True)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{s.server_port}" for s in servers)
    threads = [threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True) for s in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that takes ``hub`` for the Hub, with its cache under ``home``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return {**clean, **ours, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", **more}


FORKING = """
import contextlib, json, os, sys, traceback
import huggingface_hub.constants as constants
import huggingface_hub.file_download, huggingface_hub.hf_api, huggingface_hub._snapshot_download
import torch, mergekit_lr.cli, mergekit_lr.engine.run, mergekit_lr.checkpoint.store
import mergekit_lr.checkpoint.retry as retry

def child(job):
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(job["cwd"])
    constants.HF_HOME = os.environ["HF_HOME"]
    constants.HF_HUB_CACHE = constants.HF_HOME + "/hub"
    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"
    retry.FIRST_PAUSE = 0.01
    sys.argv = ["mergekit-lr", *job["arguments"]]
    code = 0
    try:
        exec(job["program"], {"__name__": "__main__"})
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runner:
    """Runs programs that take ``hub`` for the Hub, each in a process of its own, forked off one that has imported all.

    huggingface_hub reads its settings at import, and importing takes longer than any of these programs.
    """

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(hub, folder),
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def start(self, home: Path, program: str, *arguments: str, **more: str) -> int:
        """Begin a program; its process id. `finish` must come next."""
        job = {
            "program": program,
            "arguments": arguments,
            "environment": environment(self.hub, home, **more),
            "cwd": str(home),
            "stdout": str(self.folder / "stdout"),
            "stderr": str(self.folder / "stderr"),
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait for it. The token must not be in anything that it printed."""
        assert self.process.stdout is not None
        code = int(self.process.stdout.readline())
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        assert TOKEN not in out + err
        return subprocess.CompletedProcess([], code, out, err)

    def run(self, home: Path, program: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        self.start(home, program, *arguments, **more)
        return self.finish()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


COMMAND = "from mergekit_lr.cli import main\nmain()\n"
"""The command line; arguments follow."""
