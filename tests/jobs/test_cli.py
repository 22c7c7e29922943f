"""Bad input through the real command line: one message with the mend, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

YAML = """\
name: support
model:
  source: {model}
data:
  train: data/train.jsonl
  evaluation: data/evaluation.jsonl
sweep:
  methods:
    - {{name: zero_shot}}
    - {{name: lora, rank: 8}}
serve: {{port: 0}}
tracking: {{port: 0}}
cluster: {{dashboard_port: 0, num_cpus: 1}}
evaluate: {{final_share: 0}}
"""


class Case(NamedTuple):
    """A folder with an experiment, and the command line in it."""

    folder: Path
    mark: str

    def change(self, old: str, new: str) -> None:
        file = self.folder / "regraft.yaml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "REGRAFT_"))
        }
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", *arguments],
            cwd=self.folder,
            env=environment | {"REGRAFT_HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "1", "CLI_TEST": self.mark},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Whatever still runs of what the command started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("CLI_TEST") == self.mark and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def services(self) -> dict[str, object]:
        file = self.folder / ".regraft" / "services.json"
        return json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture
def case(tmp_path: Path, tiny_model: Path) -> Iterator[Case]:
    (tmp_path / "data").mkdir()
    for name, prompt in [("train", "Who pays for the repair?"), ("evaluation", "When is the reading due?")]:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Soon."}]
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "regraft.yaml").write_text(YAML.format(model="./model"))
    case = Case(tmp_path, str(tmp_path))
    yield case
    for process in case.processes():  # only where a test failed
        process.kill()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is bound, so that nobody else gets it, and on which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def refused(case: Case, done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Status 2, one message that has the words and what to do, and nothing left running or half-written."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1
    assert done.stderr.startswith("error: ")
    assert "\n  mend: " in done.stderr
    for word in words:
        assert word in done.stderr
    assert case.processes() == []
    assert {k: v for k, v in case.services().items() if k in {"mlflow", "ray", "monitor"} and v} == {}
    if (case.folder / ".regraft").exists():
        assert not list((case.folder / ".regraft").glob(".*.part"))


def untouched(case: Case) -> None:
    assert not (case.folder / ".regraft").exists()


def test_good_experiment_is_checked_without_starting_anything(case: Case) -> None:
    case.change("sweep:", "sweep:\n  search: {name: tpe, trials: 9, startup: 2}\n  budget: {hours: 2}")
    case.change("sweep:", "sweep:\n  finalists: {count: 2, seeds: 3}")
    case.change("rank: 8", "rank: 8, learning_rate: {loguniform: [1.0e-4, 1.0e-2]}")
    done = case.run("check", ".")
    assert done.returncode == 0, done.stderr
    assert "1 train, 1 evaluation" in done.stdout
    assert "lora rank=8" in done.stdout
    assert "train: 1 of 1 examples kept; " in " ".join(done.stdout.split())
    assert "search tpe: up to 6 more trials follow from what these come to" in done.stdout
    assert "the best 2 are repeated with 2 more seeds each" in done.stdout
    assert "budget: 2 hours" in done.stdout
    assert case.processes() == []
    untouched(case)


MISTAKES: dict[str, tuple[Callable[[Case], object], tuple[str, ...]]] = {
    "wrong key": (
        lambda c: c.change("sweep:", "sweep:\n  epoch: 3"),
        ("regraft.yaml:8: sweep.epoch: unknown key; did you mean 'epochs'?",),
    ),
    "unknown method": (
        lambda c: c.change("name: lora", "name: lorra"),
        ("regraft.yaml:10: sweep.methods.1.name: unknown method 'lorra'; did you mean 'lora'?",),
    ),
    "broken data line": (
        lambda c: (c.folder / "data" / "train.jsonl").write_text('{"messages": []}\n{"messages": [\n'),
        ("train.jsonl:1: messages: ", "train.jsonl:2: not valid JSON"),
    ),
    "missing data file": (
        lambda c: (c.folder / "data" / "evaluation.jsonl").unlink(),
        ("evaluation.jsonl: No such file",),
    ),
    "missing model folder": (
        lambda c: c.change("./model", "./modle"),
        ("model.source: no folder ./modle",),
    ),
    "too long": (
        lambda c: c.change("sweep:", "sweep:\n  max_length: 16"),
        ("train: 1 of 1 examples are longer than sweep.max_length = 16", "sweep.too_long"),
    ),
    "no such layer": (
        lambda c: c.change("rank: 8", "rank: 8, target_modules: [q_proj, nope]"),
        ("sweep.methods.1.target_modules: the base model has no layer nope; it has down_proj",),
    ),
    "method that does not pack": (
        lambda c: (c.change("sweep:", "sweep:\n  packing: true"), c.change("lora, rank: 8", "prompt_tuning")),
        ("methods.1: prompt_tuning does not train with sweep.packing",),
    ),
    "method without four bits": (
        lambda c: c.change("name: lora", "name: loha, quantise: nf4"),
        ("sweep.methods.1.quantise: this method does not train on a quantised base",),
    ),
    "unknown storage": (
        lambda c: c.change("cluster: {", "cluster: {storage: 'ftp://host/x', "),
        ("cluster.storage: ftp://host/x",),
    ),
    "missing experiment": (lambda c: (c.folder / "regraft.yaml").unlink(), ("regraft.yaml: No such file",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_the_check_with_its_place_and_mend(case: Case, mistake: str) -> None:
    make, words = MISTAKES[mistake]
    make(case)
    refused(case, case.run("check", "."), *words)
    untouched(case)


@pytest.mark.parametrize(
    ("key", "old"),
    [("tracking.port", "tracking: {port: 0"), ("cluster.dashboard_port", "dashboard_port: 0")],
)
def test_port_in_use_is_found_before_anything_starts(case: Case, taken_port: int, key: str, old: str) -> None:
    case.change(old, old.removesuffix("0") + str(taken_port))
    refused(case, case.run("up", "."), f"port {taken_port}", key)
    untouched(case)


def test_dead_mlflow_address_is_named(case: Case, closed_port: int) -> None:
    case.change("tracking: {port: 0", f"tracking: {{uri: 'http://127.0.0.1:{closed_port}'")
    case.change("cluster: {", f"cluster: {{address: '127.0.0.1:{closed_port}', ")
    done = case.run("sweep", ".")
    refused(case, done, f"no MLflow server answers at http://127.0.0.1:{closed_port}", "tracking.uri")


def test_dead_ray_address_is_named_and_the_mlflow_that_was_started_ended(
    case: Case, closed_port: int
) -> None:
    case.change("cluster: {", f"cluster: {{address: '127.0.0.1:{closed_port}', ")
    done = case.run("sweep", ".")
    assert "starting MLflow" in done.stdout
    refused(case, done, f"no Ray cluster answers at 127.0.0.1:{closed_port}", "cluster.address")


def test_up_that_fails_ends_what_it_started(case: Case, closed_port: int) -> None:
    case.change("cluster: {", f"cluster: {{address: '127.0.0.1:{closed_port}', ")
    refused(case, case.run("up", "."), f"no Ray cluster answers at 127.0.0.1:{closed_port}")


@pytest.mark.parametrize("arguments", [("chekc",), ("rollback", ".", "second"), ("retrain",)])
def test_wrong_usage_is_explained_without_a_traceback(case: Case, arguments: tuple[str, ...]) -> None:
    done = case.run(*arguments)
    assert done.returncode == 2
    assert "Usage: " in done.stderr
    assert "Traceback" not in done.stderr
    untouched(case)
