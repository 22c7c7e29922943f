"""The whole loop on one experiment: data, sweep, champion, endpoint, drift, retraining.

The stages are the same functions that the separate commands run. What a stage gave is kept in the journal;
a second run finds it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from jobs.check_drift import watch
from jobs.console import console, say, show_decision, show_drift, show_leaderboard, stage
from jobs.decisions import submit_retrain
from jobs.evaluation_sets import with_registered
from jobs.promotion import promote_winner
from jobs.replay import Replayed, key_header, replay
from jobs.retrain import outcome_file
from jobs.serve import serve, wait_for_champion
from jobs.sweep import sweep
from jobs.workspace import Connection, Workspace, connected
from regraft.cluster.jobs import follow
from regraft.config import Experiment, experiment_file
from regraft.data.chats import read_chats
from regraft.data.dataset import load_dataset
from regraft.errors import RegraftError, ServiceError
from regraft.models import resolve
from regraft.processes import free_port
from regraft.records import (
    DatasetVersion,
    DriftReport,
    ModelVersion,
    PromotionDecision,
    RetrainDecision,
    content_hash,
)

STAGES = ("data", "model", "sweep", "selection", "serving", "ordinary traffic", "storm week", "retraining")
ORDINARY = 100


def check_ports(experiment: Experiment, workspace: Workspace) -> None:
    """Find a port in use before anything is started.

    Raises:
        ServiceError: Naming the port and the key that moves it.
    """
    services = workspace.services()
    if experiment.tracking.uri is None and services.mlflow is None:
        free_port(experiment.tracking.port, "tracking.port", experiment.tracking.host)
    if experiment.cluster.address is None and services.ray is None:
        free_port(experiment.cluster.dashboard_port, "cluster.dashboard_port")
        free_port(experiment.serve.port, "serve.port", experiment.serve.host)


class Quickstart:
    """One run of the loop; each method is a stage."""

    def __init__(
        self, path: Path, experiment: Experiment, workspace: Workspace, traffic: Path, storm: list[Path]
    ):
        self.path, self.experiment, self.workspace = path, experiment, workspace
        self.traffic, self.storm = traffic, storm
        self.key = ""
        self.seconds: dict[str, float] = {}
        self.base = ""

    def run(self) -> None:
        """All stages, and what they came to."""
        experiment = self.experiment
        dataset = self._timed("data", self._data)
        self.key = content_hash(
            [experiment.model_dump(mode="json", exclude={"tracking", "cluster"}), dataset.id], 12
        )
        done = self.workspace.found("retraining", self.key)
        if done is not None:
            say("finished already: nothing is run again (remove .regraft/ to start afresh)")
            self._summary()
            return
        check_ports(experiment, self.workspace)
        self._timed("model", self._model)
        with connected(experiment, self.workspace, say) as connection:
            version = self._timed("sweep", lambda: self._sweep(dataset, connection))
            self._timed("serving", lambda: self._serve(connection))
            self._timed(
                "ordinary traffic", lambda: self._watch("ordinary", [self.traffic], ORDINARY, connection)
            )
            drift = self._timed("storm week", lambda: self._watch("storm", self.storm, None, connection))
            self._timed("retraining", lambda: self._retrain(drift[1], version, connection))
            self._summary()
            console.print(f"\nruns: {connection.tracker(experiment).leaderboard_url()}", markup=False)
        console.print("nothing is left running; `regraft up` brings it all up again", markup=False)

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        stage(STAGES.index(name) + 1, len(STAGES), name)
        started = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - started
        return result

    def _model(self) -> None:
        base = resolve(self.experiment.model.source, self.experiment.model.revision, say)
        say(f"{base.source} ({base.revision}) in {base.path}")

    def _data(self) -> DatasetVersion:
        dataset = load_dataset(self.experiment.name, self.experiment.data)
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in dataset.splits.items())
        say(f"dataset {dataset.id}: {counts}; no leakage at Jaccard {self.experiment.data.leakage_jaccard:g}")
        return dataset

    def _sweep(self, dataset: DatasetVersion, connection: Connection) -> ModelVersion:
        found = self.workspace.found("sweep", self.key)
        if found is None:
            dataset = with_registered(self.experiment, dataset, connection.registry, say)
            board, results, _ = sweep(self.experiment, dataset, connection)
            say(f"MLflow: {connection.tracker(self.experiment).leaderboard_url()}")
            started = time.monotonic()
            stage(STAGES.index("selection") + 1, len(STAGES), "selection")
            show_leaderboard(board)
            version, decision = promote_winner(self.experiment, dataset, board, results, connection)
            self.seconds["selection"] = time.monotonic() - started
            show_decision(decision)
            if decision.outcome != "promote":
                raise RegraftError(
                    f"the sweep's winner does not beat what is there: {decision.reason}",
                    "more epochs, other learning rates, or more examples: see the runs in MLflow",
                )
            say(f"{version.served_id} is the champion")
            found = {
                "board": board.model_dump(),
                "version": version.model_dump(),
                "decision": decision.model_dump(),
            }
            self.workspace.finished("sweep", self.key, found)
        else:
            say("found: the sweep and its champion")
        return ModelVersion.model_validate(found["version"])

    def _serve(self, connection: Connection) -> None:
        self.base = serve(self.experiment, connection)
        say(f"{self.base}/v1 answers as {self._ask('When is my bill due?')}")

    def _ask(self, question: str) -> str:
        body = {
            "model": self.experiment.name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 48,
        }
        answer = httpx.post(
            f"{self.base}/v1/chat/completions",
            json={**body, "temperature": 0},
            timeout=120,
            headers=key_header(),
        )
        if answer.is_error:
            raise ServiceError(f"the endpoint said {answer.status_code}: {answer.text[:500]}", "see its log")
        said = answer.json()
        return f"{said['model']}: {question} → {said['choices'][0]['message']['content']!r}"

    def _watch(
        self, name: str, files: list[Path], limit: int | None, connection: Connection
    ) -> tuple[DriftReport, RetrainDecision]:
        found = self.workspace.found(name, self.key)
        if found is None:
            examples = [e for file in files for e in read_chats(file)][:limit]
            say(f"replaying {len(examples)} prompts of the {name} week")
            section = self.experiment.serve
            tokens = min(self.experiment.evaluate.max_new_tokens, section.max_new_tokens)
            replayed: Replayed = replay(
                self.base,
                self.experiment.name,
                examples,
                max_tokens=tokens,
                concurrency=section.max_batch,
                say=say,
            )
            rate = replayed.completion_tokens / replayed.seconds
            say(f"{replayed.answered} answered in {replayed.seconds:.0f} s ({rate:.0f} tokens/s), captured")
            report, decision, html = watch(self.path, self.experiment, connection, close=True, act=False)[-1]
            found = {"report": report.model_dump(), "decision": decision.model_dump(), "html": str(html)}
            self.workspace.finished(name, self.key, found)
        else:
            say(f"found: the {name} week and its check")
        report = DriftReport.model_validate(found["report"])
        decision = RetrainDecision.model_validate(found["decision"])
        say(f"{report.status}: {report.summary}")
        say(f"report: {found['html']}")
        say(f"decision: {decision.action}: {decision.reason}")
        return report, decision

    def _retrain(self, decision: RetrainDecision, champion: ModelVersion, connection: Connection) -> None:
        if decision.action != "retrain" or decision.job_id is None:
            raise RegraftError(
                f"the storm week was decided as {decision.action!r}: {decision.reason}",
                "see the drift report",
            )
        if connection.jobs_url is None:
            raise RegraftError("no job server is known", "set cluster.jobs to http://<head>:8265")
        before = self._ask("Where can I cool down with my dog during the heat?")
        if submit_retrain(self.path, decision, connection):
            say(f"submitted job {decision.job_id}")
        status = follow(
            connection.jobs_url, decision.job_id, lambda line: console.print(f"    {line}", markup=False)
        )
        outcome = outcome_file(connection, decision.id)
        if status != "SUCCEEDED" or not outcome.exists():
            raise RegraftError(
                f"job {decision.job_id} ended as {status}", "see its log above or in Ray's dashboard"
            )
        gave = json.loads(outcome.read_text())
        version = ModelVersion.model_validate(gave["version"])
        verdict = PromotionDecision.model_validate(gave["decision"])
        if verdict.outcome == "promote":
            wait_for_champion(self.base, version.name, version.version)
            say(f"the endpoint answers from {version.served_id}")
            say(f"before: {before}")
            say(f"after:  {self._ask('Where can I cool down with my dog during the heat?')}")
        self.workspace.finished("retraining", self.key, gave)

    def _summary(self) -> None:
        console.print("\n── what came of it ──", markup=False, style="bold")
        reports = []
        for name in ("ordinary", "storm"):
            found = self.workspace.found(name, self.key)
            if found:
                reports.append((f"{name} week", DriftReport.model_validate(found["report"])))
        show_drift(reports)
        done = self.workspace.found("retraining", self.key)
        if done:
            show_decision(PromotionDecision.model_validate(done["decision"]))
        if self.seconds:
            took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
            console.print(f"time: {took}", markup=False)


def run(path: Path) -> None:
    """The quickstart on an experiment folder that also holds `data/traffic.jsonl` and the storm week."""
    path = experiment_file(path)
    experiment = Experiment.load(path)
    data = path.parent / "data"
    storm = [
        p for p in (experiment.retrain.reviewed, *experiment.retrain.evaluation.values()) if p is not None
    ]
    missing = [p for p in (data / "traffic.jsonl", *storm) if not p.exists()]
    if missing or not storm:
        raise RegraftError(
            f"the quickstart needs {', '.join(map(str, missing)) or 'retrain.reviewed'}",
            "run it on examples/utility-support, or use the separate commands on your own data",
        )
    Quickstart(path, experiment, Workspace(), data / "traffic.jsonl", storm).run()
