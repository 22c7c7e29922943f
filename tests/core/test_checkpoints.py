"""Training that is killed goes on as if it had not been."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regraft.methods import parse_method
from regraft.methods.base import trainable_parameters
from regraft.models import load_tokenizer
from regraft.records import Example, Message
from regraft.training.checkpoints import Checkpoints, checkpoint_folder
from regraft.training.encoding import encode
from regraft.training.loop import LoopSettings, train

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = [
    {"name": "lora", "rank": 4, "dropout": 0.2},
    {"name": "full"},
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
            model, base, rows, rows, SETTINGS, pad_id=0, device="cpu", report=report, checkpoints=checkpoints
        )
    except KeyboardInterrupt:
        assert stop_at is not None
    return model, outcome, points


@pytest.mark.parametrize("settings", METHODS, ids=lambda m: m["name"])
def test_interrupted_training_goes_on_to_the_very_same_end(tiny_model, tmp_path, settings):
    whole, expected, reported = run(tiny_model, settings, None)
    assert [p.step for p in reported] == [4, 8, 12]
    _, _, before = run(tiny_model, settings, Checkpoints(tmp_path / "c", 0), stop_at=8)
    assert before == reported[:2]
    resumed = Checkpoints(tmp_path / "c", 0)
    assert json.loads((tmp_path / "c" / "progress.json").read_text())["step"] == 7
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

class Fragile(Checkpoints):
    def save(self, model, optimiser, progress):
        if progress.step == 6:  # in the middle of writing: the weights are there, the rest is not
            torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        super().save(model, optimiser, progress)

case.run(Path({model!r}), case.METHODS[0], Fragile(Path({folder!r}), 0))
"""


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(tiny_model, tmp_path):
    folder = tmp_path / "c"
    code = KILLED.format(tests=str(Path(__file__).parent), model=str(tiny_model), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert json.loads((folder / "progress.json").read_text())["step"] == 5
    _, _, reported = run(tiny_model, METHODS[0], None)
    _, _, after = run(tiny_model, METHODS[0], Checkpoints(folder, 0))
    assert after == reported


class Full(Checkpoints):
    """No room for the next one."""

    def save(self, model, optimiser, progress):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", raise_disk_full)
            super().save(model, optimiser, progress)


def raise_disk_full(*_):
    raise OSError("disk full")


def test_a_checkpoint_between_two_renames_is_found(tiny_model, tmp_path):
    run(tiny_model, METHODS[0], Checkpoints(tmp_path / "c", 0), stop_at=8)
    (tmp_path / "c").rename(tmp_path / ".c.old")
    with pytest.raises(OSError, match="disk full"):  # what is there outlives the writing of the next one
        run(tiny_model, METHODS[0], Full(tmp_path / "c", 0))
    assert (tmp_path / ".c.old" / "progress.json").exists()
    _, _, after = run(tiny_model, METHODS[0], Checkpoints(tmp_path / "c", 3600))
    assert after == run(tiny_model, METHODS[0], None)[2]


def test_a_checkpoint_of_another_plan_is_not_used(tiny_model, tmp_path, caplog):
    run(tiny_model, METHODS[0], Checkpoints(tmp_path / "c", 0), stop_at=8)
    file = tmp_path / "c" / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"total": 999}))
    _, _, after = run(tiny_model, METHODS[0], Checkpoints(tmp_path / "c", 3600))
    assert after == run(tiny_model, METHODS[0], None)[2]
    assert "is of another run" in caplog.text


def test_none_is_written_before_its_time(tiny_model, tmp_path):
    run(tiny_model, METHODS[0], Checkpoints(tmp_path / "c", 3600))
    assert list(tmp_path.iterdir()) == []


def test_object_stores_keep_none(tmp_path):
    assert checkpoint_folder("s3://bucket/x", "key") is None
    assert checkpoint_folder(str(tmp_path), "key") == tmp_path / "checkpoints" / "key"
