"""Base models that lie elsewhere: in an MLflow registry, and behind the hub's protocol."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from regraft.errors import ModelError
from regraft.models import load_tokenizer, prompt_ids, resolve
from regraft.records import Message

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture(scope="module")
def registry(mlflow_url, tiny_model):
    """A registry whose model `base` is the tiny one as people log it, `parts` as plain files."""
    import mlflow
    from transformers import AutoModelForCausalLM

    try:
        mlflow.set_tracking_uri(mlflow_url)
        with mlflow.start_run():
            mlflow.transformers.log_model(
                {
                    "model": AutoModelForCausalLM.from_pretrained(tiny_model),
                    "tokenizer": load_tokenizer(tiny_model),
                },
                name="model",
                task="text-generation",
                registered_model_name="base",
                pip_requirements=["transformers"],
            )
        mlflow.MlflowClient().set_registered_model_alias("base", "stable", "1")
        yield mlflow_url
    finally:
        mlflow.set_tracking_uri(None)


@pytest.fixture
def with_registry(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path))


@pytest.mark.parametrize("source", ["models:/base/1", "models:/base@stable"])
def test_a_registered_transformers_model_is_a_base_with_its_tokenizer(with_registry, tiny_model, source):
    found = resolve(source)
    assert found.source == "models:/base/1"  # an alias is pinned to the version that it names
    messages = [Message(role="user", content="Hello?")]
    assert prompt_ids(load_tokenizer(found.path), messages) == prompt_ids(
        load_tokenizer(tiny_model), messages
    )
    assert (found.path / "model.safetensors").stat().st_size == (
        tiny_model / "model.safetensors"
    ).stat().st_size
    assert resolve(source) == found


@pytest.mark.parametrize("source", ["models:/base/7", "models:/base@nobody", "models:/nothing/1"])
def test_a_model_that_is_not_registered_is_named_and_nothing_is_kept(with_registry, tmp_path, source):
    with pytest.raises(ModelError, match=r"model\.source: models:/"):
        resolve(source)
    assert [p for p in tmp_path.rglob("*") if p.is_dir() and p.name != "models"] == []


@pytest.fixture
def hub(tiny_model):
    """The answers of the hub that a download needs, for `someone/tiny`; with what was asked."""
    files = {p.name: p.read_bytes() for p in tiny_model.iterdir()} | {"pytorch_model.bin": b"a pickle"}
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            name = self.path.rpartition("/")[2]
            if self.path.startswith("/api/models/someone/tiny/tree/"):
                entries = [
                    {"type": "file", "path": n, "size": len(f), "oid": f"{hash(f):x}"}
                    for n, f in files.items()
                ]
                self.answer(json.dumps(entries).encode())
            elif self.path.startswith("/api/models/someone/tiny"):
                siblings = [{"rfilename": n} for n in files]
                self.answer(json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode())
            elif self.path.startswith(f"/someone/tiny/resolve/{COMMIT}/") and name in files:
                self.answer(files[name])
            else:
                self.answer(b'{"error": "Repository not found"}', 404)

        do_HEAD = do_GET

        def answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            for key, value in {
                "Content-Length": len(body),
                "ETag": f'"{hash(body):x}"',
                "X-Repo-Commit": COMMIT,
                **({"X-Error-Code": "RepoNotFound"} if status == 404 else {}),
            }.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


RESOLVE = """
import json, sys
from regraft.errors import ModelError
from regraft.models import resolve
try:
    source, revision, path = resolve(sys.argv[1])
    print(json.dumps([source, revision, str(path)]))
except ModelError as error:
    raise SystemExit(str(error))
"""


def ask(source: str, endpoint: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Resolve in a process of its own: the hub's library reads its environment on import."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "REGRAFT_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, source],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_hub_id_is_downloaded_once_and_pinned_to_its_commit(hub, tmp_path, tiny_model):
    endpoint, asked = hub
    done = ask("someone/tiny", endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    source, revision, path = json.loads(done.stdout)
    assert (source, revision) == ("someone/tiny", COMMIT)
    got = Path(path)
    assert (got / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert load_tokenizer(got).chat_template
    assert not (got / "pytorch_model.bin").exists()  # pickles are never fetched
    del asked[:]
    assert ask("someone/tiny", endpoint, tmp_path).returncode == 0
    assert not [p for p in asked if "safetensors" in p]


def test_a_name_the_hub_does_not_know_is_an_error_with_the_mend(hub, tmp_path):
    done = ask("someone/else", hub[0], tmp_path)
    assert done.returncode == 1
    assert "model.source: someone/else is no folder, nor to be had from the hub" in done.stderr
    assert "bundled:smollm2-135m-instruct" in done.stderr
