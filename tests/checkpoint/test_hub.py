"""The Hub, played by a server on the loopback interface: what is asked for, what is pinned, what errors say.

huggingface_hub reads its settings once, at import, so each scenario runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from mergekit_lr.checkpoint.hub import SMALL_FILES
from mergekit_lr.lazy import torch

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_canaryCanaryCanaryCanary"


@dataclass
class Hub:
    """Repositories by name, and every request that came."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    ranges: bool = True
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def got(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {p.rsplit("/", 1)[1] for method, p, _ in self.requests if method == "GET" and "/resolve/" in p}


def handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range")))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                name, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
                files = hub.repositories.get(name)
                if files is None:
                    return self.refuse(404, "RepoNotFound")
                if name in hub.gated:
                    return self.refuse(403, "GatedRepo")
                if revision not in ("main", SHA):
                    return self.refuse(404, "RevisionNotFound")
                if action == "revision":
                    siblings = [{"rfilename": f} for f in files]
                    return self.send({"_id": "1", "id": name, "sha": SHA, "siblings": siblings}, with_body)
                tree = [{"type": "file", "path": f, "size": len(d), "oid": tag(d)} for f, d in files.items()]
                return self.send(tree, with_body)
            if len(parts) > 4 and parts[2] == "resolve":
                content = hub.repositories.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
                if content is not None:
                    return self.send(content, with_body, tag(content))
            return self.refuse(404, "EntryNotFound")

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, content: Any, with_body: bool, etag: str | None = None) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            wanted = self.headers.get("Range") if hub.ranges and with_body else None
            self.send_response(206 if wanted else 200)
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                total, data = len(data), data[int(first) : int(last or len(data)) + 1]
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", SHA)
            if etag:
                self.send_header("ETag", f'"{etag}"')
            self.end_headers()
            if with_body:
                try:
                    self.wfile.write(data)
                    hub.sent += len(data)
                except (BrokenPipeError, ConnectionResetError):
                    return

        def log_message(self, *_: Any) -> None:
            return

    return Handler


def tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


PROGRAM = """
import json, sys
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import CheckpointError
out = []
for text, options in json.loads(sys.argv[1]):
    try:
        with open_model(ModelReference.parse(text), **options) as c:
            values = {}
            for n, i in c.tensors.items():
                try:
                    values[n] = c.read(n, 0, i.numel).tolist()
                except CheckpointError as e:
                    values[n] = str(e)
            out.append({"revision": c.revision, "values": values, "config": c.config, "changed": c.changed(),
                        "shapes": {n: i.shape for n, i in c.tensors.items()}, "stamps": c.identity(),
                        "kind": type(c).__name__})
    except CheckpointError as e:
        out.append({"error": str(e)})
print(json.dumps(out))
"""


def ask(hub: Hub, home: Path, *questions: Any, **environment: str) -> list[dict[str, Any]]:
    """Open references in a fresh process; a question is a text, or (text, options)."""
    pairs = [(q, {}) if isinstance(q, str) else q for q in questions]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    extra = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(pairs)],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **extra},
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def shard(**values: list[float]) -> bytes:
    data: bytes = save({n: torch.tensor(v) for n, v in values.items()}, metadata={"format": "pt"})
    return data


def sharded() -> dict[str, bytes]:
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    return {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "model-1.safetensors": shard(a=[1.0, 2.0]),
        "model-2.safetensors": shard(b=[3.0]),
        "consolidated.safetensors": shard(z=[9.0]),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        "README.md": b"---\nlicense: mit\n---\n",
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"evil",
        "picture.png": b"x" * 1000,
        "onnx/model.safetensors": b"evil",
        "original/tokenizer.model": b"x",
    }


def test_only_what_is_needed_is_fetched_and_the_commit_is_recorded(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = sharded()
    (first, again) = ask(hub, tmp_path, "org/name", f"org/name@{SHA}")
    assert first["values"] == {"a": [1.0, 2.0], "b": [3.0]}
    assert (first["revision"], first["config"]) == (SHA, {"model_type": "llama"})
    assert first["stamps"] == again["stamps"]
    expected = {n for n in sharded() if "/" not in n and not n.endswith((".py", ".bin", ".png"))}
    assert hub.got() == expected - {"consolidated.safetensors"}
    # A later offline run has it all, and asks for nothing.
    hub.requests.clear()
    (offline,) = ask(hub, tmp_path, "org/name", HF_HUB_OFFLINE="1")
    assert offline["values"] == first["values"] and offline["revision"] == SHA
    assert hub.requests == []


def test_what_errors_say(hub: Hub, tmp_path: Path) -> None:
    hub.repositories.update({"org/name": sharded(), "org/gated": sharded(), "org/empty": {"config.json": b"{}"}})
    hub.gated.add("org/gated")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "names").mkdir()
    missing, gated, revision, empty = ask(hub, tmp_path, "org/nam", "org/gated", "org/name@v9", "org/empty")
    assert "the Hub has no such model" in missing["error"] and "there is org/names" in missing["error"]
    assert "it is gated" in gated["error"] and "HF_TOKEN" in gated["error"]
    assert "no revision 'v9'" in revision["error"]
    assert "holds no weights" in empty["error"]
    (offline,) = ask(hub, tmp_path, "org/name", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other"))
    assert "HF_HUB_OFFLINE is set" in offline["error"]
    (unreachable,) = ask(hub, tmp_path, "org/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached" in unreachable["error"]


def test_planning_fetches_headers_only(hub: Hub, tmp_path: Path) -> None:
    big = 1 << 20
    hub.repositories["org/big"] = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        ).encode(),
        "model-1.safetensors": save({"a": torch.zeros(big)}),
        "model-2.safetensors": save({"b": torch.zeros(2, big)}, metadata={"x": "y" * 300_000}),
    }
    hub.repositories["org/one"] = {"model.safetensors": save({"a": torch.zeros(big)}), "other.safetensors": b"x"}
    only = {"headers_only": True}
    sharded_model, one = ask(hub, tmp_path, ("org/big", only), ("org/one", only))
    assert sharded_model["shapes"] == {"a": [big], "b": [2, big]} and one["shapes"] == {"a": [big]}
    assert sharded_model["kind"] == "RemoteCheckpoint" and sharded_model["revision"] == SHA
    assert "planning only" in sharded_model["values"]["a"] and sharded_model["changed"] == []
    assert hub.sent < 2_000_000  # of 16 MB of weights: at most 128 KiB a file, and one long header


def test_planning_where_the_server_ignores_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.repositories["org/one"] = {"model.safetensors": save({"a": torch.zeros(40 << 20)})}
    (answer,) = ask(hub, tmp_path, ("org/one", {"headers_only": True}))
    assert answer["shapes"] == {"a": [40 << 20]}
    assert not list(tmp_path.rglob("model.safetensors"))


def test_planning_uses_what_is_cached(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = sharded()
    ask(hub, tmp_path, "org/name")
    (answer,) = ask(hub, tmp_path, ("org/name", {"headers_only": True}), HF_HUB_OFFLINE="1")
    assert answer["kind"] == "Checkpoint" and answer["values"]["a"] == [1.0, 2.0]


def test_hostile_repositories(hub: Hub, tmp_path: Path) -> None:
    evil_index = json.dumps({"weight_map": {"a": "../../../etc/passwd"}}).encode()
    hub.repositories["org/index"] = {"model.safetensors.index.json": evil_index}
    hub.repositories["org/liar"] = {"model.safetensors": b"\xff" * 64}
    hub.repositories["org/hole"] = {"model.safetensors": shard(a=[1.0])[:-2]}
    hub.repositories["org/list"] = {"model.safetensors": shard(a=[1.0]), "config.json": b"[]"}
    names = ["org/index", "org/liar", "org/hole", "org/list"]
    for options in ({}, {"headers_only": True}):
        answers = ask(hub, tmp_path, *((n, options) for n in names))
        messages = [a["error"] for a in answers]
        assert "plain .safetensors file name" in messages[0]
        assert all("not a sound safetensors file" in m for m in messages[1:3])
        assert "does not hold an object" in messages[3]


def test_adapter_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/base"] = {"model.safetensors": save({"m.weight": torch.zeros(3, 2)})}
    factors = {
        "base_model.model.m.lora_A.weight": torch.ones(1, 2),
        "base_model.model.m.lora_B.weight": torch.ones(3, 1),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3}
    hub.repositories["org/lora"] = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(factors),
        "checkpoint.safetensors": b"not asked for",
    }
    (answer,) = ask(hub, tmp_path, "org/base+org/lora")
    assert answer["values"] == {"m.weight": [3.0] * 6}
    assert "checkpoint.safetensors" not in hub.got()


def test_patterns_name_no_code() -> None:
    from fnmatch import fnmatch

    for name in ("modeling_x.py", "evil.pkl", "pytorch_model.bin", "x.pt", "run.sh", "model.onnx", "x.gguf"):
        assert not any(fnmatch(name, p) for p in SMALL_FILES)
