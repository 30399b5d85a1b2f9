"""Models by name: downloads from a hub on the loopback interface, the cache, and errors."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from files import SMALL, weights, write

import tinyprompt
from tinyprompt.errors import CheckpointError
from tinyprompt.export import graphs as export
from tinyprompt.files import hub, models, prompts
from tinyprompt.model import PROMPT, Prompt

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install '.[hub]'")

COMMIT = {"main": "c0ffee" * 6 + "0000", "v2": "decaf" * 8}
NEVER = ("README.md", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "model.fp16.safetensors")
JUNK = dict.fromkeys(NEVER, b"junk")
SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TEXT = {"config.json", "tokenizer_config.json"}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download uses: the file list and the files of a repository."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append((self.command, path, self.headers.get("Authorization")))
        rest = path.removeprefix("api/models/")
        parts = rest.split("/")
        name, files = "/".join(parts[:2]), self.server.repositories.get("/".join(parts[:2]))
        if files is None:
            return self.say(401, b"", {"X-Error-Code": "RepoNotFound"})
        if isinstance(files, int):
            return self.say(files, b"{}", {"X-Error-Code": "GatedRepo"} if files == 403 else {})
        revision = parts[3] if len(parts) > 3 else "main"
        commit = COMMIT.get(revision, revision)
        if commit not in COMMIT.values():
            return self.say(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path == rest:  # the path is org/name/resolve/COMMIT/FILE
            content = files["/".join(parts[4:])]
            if content is None:
                return self.say(403, b"", {"X-Error-Code": "GatedRepo"})
            etag = hashlib.sha256(content).hexdigest()
            return self.say(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        if parts[2:3] == ["tree"]:
            entries = {
                path: dict(type="file", oid="0" * 40, size=len(content or b"")) for path, content in files.items()
            }
            tree = [{"path": path, **entry} for path, entry in entries.items()]
            return self.say(200, json.dumps(tree).encode())
        siblings = [{"rfilename": path} for path in files]
        return self.say(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def say(self, status, content, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Return the files of each repository. A number is an error status; None is a file that must not be fetched."""
    folder = write(tmp_path_factory.mktemp("hub") / "whole", SMALL, weights())
    text = JUNK | {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".json"}
    whole = text | {"model.safetensors": (folder / "model.safetensors").read_bytes(), "pytorch_model.bin": b"unread"}
    index = json.dumps({"weight_map": dict(enumerate(SHARDS))}).encode()
    bert = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"{}", "model.safetensors": b"no T5"}
    return {
        "org/whole": whole,
        "org/torch": text | {"pytorch_model.bin": b"torch's"},
        "org/shards": text | {"pytorch_model.bin.index.json": index, **{name: name.encode() for name in SHARDS}},
        "org/adapter": JUNK
        | {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a", "adapter_model.bin": b"b"},
        "org/bert": bert,
        "org/broken": bert | {"config.json": b"[1"},
        "org/empty": {"README.md": b"nothing"},
        "org/mute": {name: content for name, content in whole.items() if not name.startswith("tokenizer")},
        "org/gated": dict.fromkeys(whole),
        "org/closed": 403,
        "org/down": 503,
    }


@pytest.fixture(scope="module")
def server(repositories):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.asked = repositories, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hubs(server, tmp_path, monkeypatch):
    """Configure this process like HF_ENDPOINT and HF_HOME would, which the library reads when it is imported."""
    from huggingface_hub import constants, hf_api

    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server.asked.clear()
    return server


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("org/whole", TEXT | {"model.safetensors"}),
        ("org/torch", TEXT | {"pytorch_model.bin"}),
        ("org/shards", TEXT | {"pytorch_model.bin.index.json", *SHARDS}),
        ("org/adapter", ADAPTER),
    ],
)
def test_only_needed_files_are_fetched(hubs, name, files):
    folder = hub.pull(name)
    assert {p.name for p in folder.iterdir()} == files
    got = {path.rpartition("/")[2] for kind, path, _ in hubs.asked if kind == "GET" and "/resolve/" in path}
    assert got == files
    for file in files:
        assert (folder / file).read_bytes() == hubs.repositories[name][file]
    assert hub.find(name) == hub.find(f"{name}@main") == hub.find(f"{name}@{COMMIT['main']}") == folder
    assert hub.name_of(folder) == name
    assert hub.pull(name) == folder


def test_a_pulled_model_can_replace_a_path(hubs, tmp_path):
    folder = hub.pull("org/whole")
    assert (folder / "model.safetensors").is_symlink()
    model = models.load("org/whole", stored=True)
    assert model.name == models.load(folder).name == "org/whole"
    assert isinstance(model.params["shared"]["weight"], np.memmap)
    assert model.fingerprint == models.load(write(tmp_path / "same", SMALL, weights())).fingerprint
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    out = export.export("org/whole", tmp_path / "out", export.Shape(1, 3, 2, 2))
    assert {Path(path).name for path in out.files} >= {"model.safetensors", "step.onnx"}
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    ort.InferenceSession(tmp_path / "out" / "score.onnx")


def test_a_revision_has_its_own_name(hubs):
    folder = hub.pull("org/whole", "v2")
    assert folder.name == COMMIT["v2"]
    assert hub.find("org/whole@v2") == folder
    with pytest.raises(CheckpointError, match=r"org/whole: no such .*with: tinyprompt pull org/whole$"):
        hub.find("org/whole")
    with pytest.raises(CheckpointError, match=r"pull org/whole --revision v3$"):
        hub.find("org/whole@v3")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", r"no such model at http://127.*check the name; if it is private, set HF_TOKEN"),
        ("org/gated", r"gated: accept its terms .*HF_TOKEN"),
        ("org/closed", r"gated: accept its terms .*HF_TOKEN"),
        ("org/down", r"answered 503; try again later"),
        ("org/bert", r"config\.json: key 'model_type': 'bert' is not in the T5 family"),
        ("org/broken", r"config\.json: Expecting"),
        ("org/empty", r"not a T5 and not an adapter; .* config\.json and model\.safetensors or .*; found README\.md$"),
        ("org/mute", r"no tokenizer; expected one of .*; found README\.md, config\.json"),
        ("org", r"expected org/name"),
        ("org/a/b", r"expected org/name"),
        ("org/whole@v2", r"give a revision with --revision"),
        ("org/a--b", r"Cannot have -- or \.\."),
    ],
)
def test_a_model_that_cannot_be_pulled_is_named(hubs, tmp_path, name, message):
    with pytest.raises(CheckpointError, match=f"^{name}: .*{message}") as error:
        hub.pull(name)
    assert "\n" not in str(error.value)
    assert not any(p.stat().st_size > 1000 for p in tmp_path.rglob("blobs/*"))


def test_a_token_is_sent_and_may_be_refused(hubs, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(CheckpointError, match="the token was refused") as error:
        hub.pull("org/closed")
    assert "hf_secret" not in str(error.value)
    assert hubs.asked[-1][2] == "Bearer hf_secret"
    with pytest.raises(CheckpointError, match=r"org/whole: no revision 'v9'"):
        hub.pull("org/whole", "v9")


def test_a_full_disk_and_a_missing_network_are_named(hubs, monkeypatch):
    import huggingface_hub

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", full)
        with pytest.raises(CheckpointError, match=r"org/whole: the disk is full; make room in .*hub, or set HF_HOME"):
            hub.pull("org/whole")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"org/whole: cannot be downloaded from http://.*check the network"):
        hub.pull("org/whole")


@pytest.mark.parametrize(("name", "missing"), [("org/whole", "model.safetensors"), ("org/shards", SHARDS[1])])
def test_an_incomplete_download_is_named(hubs, name, missing):
    folder = hub.pull(name)
    (folder / missing).unlink()
    with pytest.raises(
        CheckpointError, match=rf"{name}: .* pulled only partly; continue with: tinyprompt pull {name}$"
    ):
        hub.find(name)
    assert hub.pull(name) == hub.find(name) == folder


def test_a_prompt_keeps_the_name_of_its_built_in_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for size in ("tiny", "small", "base"):
        folder = hub.find(size)
        assert hub.find(hub.name_of(folder)) == folder == hub.built_in(size)
    (tmp_path / "tinyprompt-t5").mkdir()
    assert hub.find("tinyprompt-t5") == Path("tinyprompt-t5")


def test_paths_come_before_names(hubs, tmp_path, monkeypatch):
    hub.pull("org/whole")
    monkeypatch.chdir(tmp_path)
    for path in ("a", "/a/b", "../a", "./org/whole", "a/b/c", "org/p.safetensors", "org/p.npz:name", tmp_path / "no"):
        assert hub.find(path) == Path(path)
    (tmp_path / "org" / "whole").mkdir(parents=True)
    assert hub.find("org/whole") == Path("org/whole")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for function in (hub.find, hub.pull, models.load, prompts.load_prompt):
        with pytest.raises(CheckpointError, match=r"^org/name: .*pip install 'tinyprompt-t5\[hub\]'"):
            function("org/name")


def test_commands_in_separate_processes_share_the_cache(server, tmp_path):
    """The first process fetches; the other processes have no network."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    env["PYTHONPATH"] = str(Path(tinyprompt.__file__).parents[1])

    def run(*args, **more):
        command = [sys.executable, "-m", "tinyprompt", *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, env=env | more, capture_output=True, text=True, check=False)

    def refused(*args, **more):
        done = run(*args, **more)
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr.strip().splitlines()[-1]

    assert "HF_HUB_OFFLINE prevents downloads" in refused("pull", "org/whole", HF_HUB_OFFLINE="1")
    assert "no model of this name was pulled" in refused("predict", "org/adapter", "a")
    assert "no model of this name was pulled" in refused("export", "--model", "org/whole")
    (tmp_path / "file").touch()
    assert "is HF_HOME a folder" in refused("pull", "org/whole", HF_HOME=str(tmp_path / "file"))
    out = json.loads(run("pull", "org/whole", "--json").stdout)
    folder = Path(out["folder"])
    assert folder.is_relative_to(tmp_path / "home" / "hub")
    assert out["files"] == {name: (folder / name).stat().st_size for name in sorted(out["files"])}
    text = run("pull", "org/whole").stdout
    assert text.startswith(str(folder))
    assert "model.safetensors" in text

    model = models.load(folder)
    prompt = Prompt({PROMPT: np.ones((2, 4), np.float32)}, model.name, model.fingerprint, ("good", "bad"), {})
    prompts.save_prompt(prompt, tmp_path / "p.safetensors")
    done = run("predict", "p.safetensors", "a text", "--model", "org/whole", HF_HUB_OFFLINE="1", HF_ENDPOINT="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("good", "bad")
