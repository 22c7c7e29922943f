"""Training that is killed goes on as if it had not been."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from regraft.errors import ConfigError
from regraft.methods import parse_method
from regraft.methods.base import trainable_parameters
from regraft.models import load_tokenizer
from regraft.records import Example, Message
from regraft.training.checkpoints import Checkpoints, versions_of
from regraft.training.encoding import encode
from regraft.training.loop import train
from regraft.training.steps import LoopSettings
from regraft.training.storage import Versions

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = [
    {"name": "lora", "rank": 4, "dropout": 0.2},
    {"name": "full"},
    {"name": "adalora", "rank": 2, "initial_rank": 4},
    {"name": "p_tuning", "virtual_tokens": 4, "encoder_hidden_size": 16},
]
SETTINGS = LoopSettings(5e-3, epochs=12, tokens_per_batch=64, evaluations=3, accumulate=2)
CHATS = [("When is the reading due?", "On the first."), ("Who pays?", "We do."), ("Hello", "How can I help?")]


def run(folder, settings, checkpoints, *, stop_at=None):
    """Train a method from the start of a process; gives the model, the outcome and what was reported."""
    method = parse_method(settings)
    tokenizer = load_tokenizer(folder)
    rows = [
        encode(
            tokenizer,
            Example(id=q, messages=(Message(role="user", content=q), Message(role="assistant", content=a))),
            128,
        )
        for q, a in CHATS
    ]
    torch.manual_seed(0)
    base = method.load_base(folder, "float32", "cpu")
    model = method.apply(base)
    points = []

    def report(point):
        points.append(point)
        if point.step == stop_at:
            raise KeyboardInterrupt

    outcome = None
    try:
        outcome = train(
            model, base, rows, rows, SETTINGS, pad_id=0, device="cpu", report=report, checkpoints=checkpoints,
            hooks=method.hooks(model),
        )  # fmt: skip
    except KeyboardInterrupt:
        assert stop_at is not None
    return model, outcome, points


@pytest.mark.parametrize("settings", METHODS, ids=lambda m: m["name"])
def test_interrupted_training_goes_on_to_the_very_same_end(tiny_model, tmp_path, settings):
    whole, expected, reported = run(tiny_model, settings, None)
    assert [p.step for p in reported] == [4, 8, 12]
    _, _, before = run(tiny_model, settings, Checkpoints(Versions(str(tmp_path / "c")), 0), stop_at=8)
    assert before == reported[:2]
    resumed = Checkpoints(Versions(str(tmp_path / "c")), 0)
    assert Versions(str(tmp_path / "c")).latest()[1]["step"] == 7
    model, outcome, after = run(tiny_model, settings, resumed)
    assert after == reported
    assert outcome.points == expected.points
    assert outcome.tokens_seen == expected.tokens_seen
    for a, b in zip(trainable_parameters(model), trainable_parameters(whole), strict=True):
        assert torch.equal(a, b)
    resumed.clear()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_checkpoints as case
from regraft.training.checkpoints import Checkpoints
from regraft.training.storage import Versions

class Fragile(Checkpoints):
    def save(self, model, optimiser, progress, hooks):
        if progress.step == 6:  # in the middle of writing: the weights are there, the rest is not
            torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        super().save(model, optimiser, progress, hooks)

case.run(Path({model!r}), case.METHODS[0], Fragile(Versions({folder!r}), 0))
"""


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(tiny_model, tmp_path):
    folder = tmp_path / "c"
    code = KILLED.format(tests=str(Path(__file__).parent), model=str(tiny_model), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert (folder / "step-6-of-1" / "weights.safetensors").exists()
    assert Versions(str(folder)).latest()[1]["step"] == 5
    _, _, reported = run(tiny_model, METHODS[0], None)
    _, _, after = run(tiny_model, METHODS[0], Checkpoints(Versions(str(folder)), 0))
    assert after == reported


def test_a_full_disk_leaves_the_checkpoint_before(tiny_model, tmp_path, monkeypatch):
    run(tiny_model, METHODS[0], Checkpoints(Versions(str(tmp_path / "c")), 0), stop_at=8)

    def disk_full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(OSError, match="disk full"):
            run(tiny_model, METHODS[0], Checkpoints(Versions(str(tmp_path / "c")), 0))
    assert Versions(str(tmp_path / "c")).latest()[1]["step"] == 7
    _, _, after = run(tiny_model, METHODS[0], Checkpoints(Versions(str(tmp_path / "c")), 3600))
    assert after == run(tiny_model, METHODS[0], None)[2]


def test_a_checkpoint_of_another_plan_is_not_used(tiny_model, tmp_path, caplog):
    run(tiny_model, METHODS[0], Checkpoints(Versions(str(tmp_path / "c")), 0), stop_at=8)
    file = tmp_path / "c" / "latest.json"
    pointer = json.loads(file.read_text())
    file.write_text(json.dumps(pointer | {"about": pointer["about"] | {"total": 999}}))
    _, _, after = run(tiny_model, METHODS[0], Checkpoints(Versions(str(tmp_path / "c")), 3600))
    assert after == run(tiny_model, METHODS[0], None)[2]
    assert "is of another run" in caplog.text


def test_none_is_written_before_its_time(tiny_model, tmp_path):
    run(tiny_model, METHODS[0], Checkpoints(Versions(str(tmp_path / "c")), 3600))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a server that speaks S3 over HTTP, as a URI."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    httpx.put(f"http://{host}:{port}/trials", headers={"x-amz-acl": "private"}).raise_for_status()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield f"s3://trials/runs?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    server.stop()


def test_a_run_goes_on_from_an_object_store(tiny_model, bucket):
    _, _, expected = run(tiny_model, METHODS[0], None)
    run(tiny_model, METHODS[0], Checkpoints(versions_of(bucket, "key"), 0), stop_at=8)
    kept = versions_of(bucket, "key")
    assert kept.latest()[0] == "step-7-of-1"
    assert kept._names() == ["step-7-of-1"]
    resumed = Checkpoints(kept, 0)
    _, _, after = run(tiny_model, METHODS[0], resumed)
    assert after == expected
    resumed.clear()
    assert kept.latest() is None
    resumed.clear()  # again: nothing to do is no error


def test_storage_that_nobody_knows_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"cluster\.storage: ftp://host/"):
        versions_of("ftp://host", "x")


def test_every_trial_has_a_place_of_its_own(tmp_path):
    assert versions_of("", "key") is None
    assert versions_of(str(tmp_path), "key").uri == f"{tmp_path}/checkpoints/key"
