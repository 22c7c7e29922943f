"""What a trial logs while it runs: its curve, its adapter, its result."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, RunTag
from mlflow.models import Model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from regraft.records import EvalReport, LossPoint, TrialResult
from regraft.tracking.background import InOrder, patiently
from regraft.tracking.client import SHA_TAG, guarded, hash_folder, now_ms, refuse_pickles, to_json

RESULT_FILE = "trial_result.json"
SAMPLES_FILE = "samples.json"
SAMPLES = 20
#: The points of a curve that come within so many seconds go in one request.
_LINGER = 1.0
#: MLflow shows tags in full in its tables; the whole reason is in the record.
TAG_CHARACTERS = 1000


class RunAt(NamedTuple):
    """A run, its experiment, and where its artifacts belong."""

    experiment_id: str
    run_id: str
    artifacts: str


class TrialRun:
    """The MLflow run of one trial. `Tracker.start_trial` makes it.

    Training waits for nothing here until its end: the run is opened and the curve logged in the background,
    and again while the server is away.

    Args:
        client: A client of the server at `uri`.
        uri: The server, for error messages.
        opened: Finds or makes the run.
        dataset_name: Name of the dataset version that the trial trains on.
    """

    def __init__(
        self, client: MlflowClient, *, uri: str, opened: Callable[[], RunAt], dataset_name: str
    ) -> None:
        self.uri = uri
        self._client = client
        self._opened = opened
        self._at = RunAt("", "", "")
        self._dataset_name = dataset_name
        self._last_step = 0
        self._later = InOrder()
        self._unsent: list[Metric] = []
        self._lock = threading.Lock()
        self._at_once = threading.Event()
        self._later.put(self._open)

    @property
    def run_id(self) -> str:
        """The run; waits until there is one.

        Raises:
            ServiceError: If the server refused it, or was away for too long.
        """
        if not self._at.run_id:
            self.settle()
        return self._at.run_id

    @guarded
    def _open(self) -> None:
        self._at = self._opened()

    def log_curve(self, points: Sequence[LossPoint]) -> None:
        """Log points of the learning curve, with others that follow soon in one request.

        Raises:
            ServiceError: If the server refused an earlier call.
        """
        self._later.check()
        self._last_step = max(self._last_step, *(point.step for point in points))
        with self._lock:
            self._unsent += self._of_curve(points)
        self._later.put(self._send_curve)

    def settle(self) -> None:
        """Wait until all that was logged has arrived.

        Raises:
            ServiceError: If the server refused it, or was away for too long.
        """
        self._at_once.set()
        try:
            self._later.wait()
        finally:
            self._at_once.clear()

    @guarded
    def _send_curve(self, tags: Sequence[RunTag] = ()) -> None:
        """Send the metrics that wait, and tags with them."""
        self._at_once.wait(_LINGER)
        with self._lock:
            metrics, self._unsent = self._unsent, []
        if not self._at.run_id or not (metrics or tags):  # without a run, its error is what `settle` raises
            return
        try:
            self._client.log_batch(self._at.run_id, metrics=metrics, tags=tags)
        except BaseException:
            with self._lock:
                self._unsent = metrics + self._unsent
            raise

    @staticmethod
    def _of_curve(points: Sequence[LossPoint]) -> list[Metric]:
        metrics, now = [], now_ms()
        for point in points:
            values = {
                "train/loss": point.train_loss,
                "train/learning_rate": point.learning_rate,
                "train/tokens_seen": point.tokens_seen,
            }
            if point.eval_loss is not None:
                values["eval/loss"] = point.eval_loss
            # Not by the names of the whole set's scores, which stand at the last step too.
            values |= {f"eval/{name}_at_points": value for name, value in point.scores.items()}
            metrics += [Metric(key, value, now, point.step) for key, value in values.items()]
        return metrics

    def log_adapter(self, folder: Path, *, name: str, params: dict[str, Any], step: int) -> str:
        """Keep what was trained, as plain files at the root of an MLflow logged model.

        Args:
            folder: The files to keep, safetensors and JSON.
            name: Name of the logged model.
            params: What the Models tab shows of it, `base_model` and `base_revision` among it.
            step: The training step at which it was saved.

        Returns:
            The id of the logged model.

        Raises:
            ModelError: If the folder holds pickled weights.
        """
        refuse_pickles(folder)
        self.settle()
        return patiently(lambda: self._send_adapter(folder, name=name, params=params, step=step))

    @guarded
    def _send_adapter(self, folder: Path, *, name: str, params: dict[str, Any], step: int) -> str:
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        is_adapter = (folder / "adapter_config.json").exists()
        model = self._client.create_logged_model(
            self._at.experiment_id,
            name=_model_name(name),
            source_run_id=self.run_id,
            tags={SHA_TAG: hash_folder(folder), "adapter.bytes": str(size)},
            params={key: str(value) for key, value in {**params, "step": step}.items()},
            model_type="peft-adapter" if is_adapter else "hf-model",
        )
        model_id = str(model.model_id)
        try:
            self._client.log_model_artifacts(model_id, str(folder))
            with tempfile.TemporaryDirectory() as temporary:
                # MLflow's own page offers to register a model only where it finds this file.
                described = Model(run_id=self.run_id, model_id=model_id)
                flavor = "peft_adapter" if is_adapter else "hf_model"
                described.add_flavor(flavor, data=".", **{k: str(v) for k, v in params.items()})
                described.save(str(Path(temporary) / "MLmodel"))
                self._client.log_model_artifacts(model_id, temporary)
        except BaseException:
            self._client.finalize_logged_model(model_id, LoggedModelStatus.FAILED)
            raise
        self._client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=step)])
        self._last_step = max(self._last_step, step)
        return model_id

    def finish(self, result: TrialResult) -> TrialResult:
        """Log what came of the trial and end its run; waits for a server that is away. Gives the record.

        The record is written before the run ends: a run that has ended without one did not come this far.
        """
        tags = end_tags(result.status, result.reason)
        if result.report is not None:
            tags.append(
                RunTag("mlflow.loggedArtifacts", json.dumps([{"path": SAMPLES_FILE, "type": "table"}]))
            )
        with self._lock:
            self._unsent += self._metrics(result)
        self._at_once.set()
        self._later.put(lambda: self._send_curve(tags))
        record = result.model_copy(update={"run_id": self.run_id})
        texts = {RESULT_FILE: to_json(record)}
        if result.report is not None:
            texts[SAMPLES_FILE] = _samples(result.report)
        for name, text in texts.items():
            patiently(lambda name=name, text=text: self._put(name, text))  # type: ignore[misc]
        self.settle()
        patiently(lambda: self._end("FAILED" if result.status == "failed" else "FINISHED"))
        return record

    @guarded
    def _end(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status)

    @guarded
    def _put(self, name: str, text: str) -> None:
        """Write an artifact. `MlflowClient.log_text` does the same, after asking where this run's belong."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, name)
            file.write_text(text, encoding="utf-8")
            get_artifact_repository(self._at.artifacts, self.uri).log_artifact(str(file))

    def _metrics(self, result: TrialResult) -> list[Metric]:
        now, step = now_ms(), self._last_step
        quality = {
            f"eval/{name}": value
            for name, value in (result.report.means | result.report.whole if result.report else {}).items()
        }
        if result.eval_loss is not None:
            quality["eval/loss"] = result.eval_loss
        other = {f"cost/{name}": value for name, value in result.cost.figures.items()}
        other |= {f"data/{name}": count for name, count in result.data.items()}
        if result.speed is not None:
            other |= {f"speed/{name}": value for name, value in result.speed.figures.items()}
        # The Models tab shows the metrics that name both a model and a dataset, and no others.
        link: dict[str, str] = {}
        if result.logged_model_id and result.report:
            link = {
                "model_id": result.logged_model_id,
                "dataset_name": dataset_split_name(self._dataset_name, result.report.split),
                "dataset_digest": result.report.dataset_id,
            }
        return [Metric(key, value, now, step, **link) for key, value in quality.items()] + [
            Metric(key, value, now, step) for key, value in other.items()
        ]


def _samples(report: EvalReport) -> str:
    """The table of answers that MLflow lays side by side for several runs.

    `MlflowClient.log_table` would append to the table of an earlier attempt; this replaces it.
    """
    names = sorted({name for example in report.examples for name in example.scores})
    rows = [
        [e.prompt, e.reference, e.output, *(e.scores.get(name) for name in names)]
        for e in report.examples[:SAMPLES]
    ]
    return json.dumps(
        {"columns": ["prompt", "reference", "output", *names], "data": rows}, ensure_ascii=False
    )


def dataset_split_name(dataset: str, split: str) -> str:
    """Name of a split as an MLflow dataset. MLflow tells datasets apart by name and digest alone."""
    return f"{dataset}/{split}"


def end_tags(status: str, reason: str) -> list[RunTag]:
    """Tags that say how a trial ended."""
    return [RunTag("status", status), RunTag("reason", reason[:TAG_CHARACTERS])]


def _model_name(name: str) -> str:
    """A name that MLflow takes: it refuses these characters in the names of logged models."""
    return name.translate(dict.fromkeys(map(ord, "/:.%\"'"), "-"))
