"""An MLflow experiment and its runs, found by their tags: what those that read and write it share.

Everything goes through `MlflowClient`: the fluent API keeps an active run in the process, which a Ray actor
that is used for one trial after another would carry over.
"""

from __future__ import annotations

import json
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from regraft.errors import ServiceError
from regraft.records import DatasetVersion
from regraft.tracking.client import has_code
from regraft.tracking.trials import dataset_split_name


class TrackedExperiment:
    """One MLflow experiment.

    Args:
        uri: URL of the MLflow server.
        experiment: Name of the experiment; made on first use if there is none.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri.rstrip("/")
        self.experiment = experiment
        self._client = MlflowClient(self.uri)

    @cached_property
    def experiment_id(self) -> str:
        """The id of the experiment."""
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                # Without the kind, MLflow opens the experiment on its pages for traces.
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return str(self._client.create_experiment(self.experiment, tags=kind))
            except MlflowException as error:
                if not has_code(error, "RESOURCE_ALREADY_EXISTS"):
                    raise
                found = self._client.get_experiment_by_name(self.experiment)  # another trial was first
        if found.lifecycle_stage == "deleted":
            raise ServiceError(
                f"the MLflow experiment {self.experiment!r} is deleted",
                f"restore it: mlflow experiments restore --experiment-id {found.experiment_id}",
            )
        return str(found.experiment_id)

    def _search(self, tags: dict[str, str], *more: str) -> list[Run]:
        """Runs with all of these tags, and for which more holds, the newest first."""
        wanted = " AND ".join([*(f"tags.{key} = '{value}'" for key, value in tags.items()), *more])
        found, token = [], None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], wanted, order_by=["attributes.start_time DESC"], page_token=token
            )
            found += list(page)
            if not (token := page.token):
                return found

    def _resume(
        self, tags: dict[str, str], *, name: str, more: dict[str, str] | None = None, counted: str = ""
    ) -> Run:
        """The run with these tags, set running; made if there is none.

        Args:
            tags: What it is found by.
            name: Its name, if it is made.
            more: Tags that it gets in any case.
            counted: A tag that counts how often this was done.
        """
        found = self._search(tags)
        more = (more or {}) | {"status": "running"}
        if counted:
            before = found[0].data.tags.get(counted, "0") if found else "0"
            more[counted] = str(int(before) + 1)
        if not found:
            return self._client.create_run(self.experiment_id, run_name=name, tags=tags | more)
        run = found[0]
        self._client.update_run(run.info.run_id, status="RUNNING")
        self._client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in more.items()])
        return run

    def _describe(self, run: Run, params: dict[str, Any], dataset: DatasetVersion) -> None:
        """Log parameters and datasets, less what an earlier attempt has logged: MLflow refuses changes."""
        new = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
        self._client.log_batch(run.info.run_id, params=new)
        if not run.inputs.dataset_inputs:
            inputs = [_dataset_input(dataset, split) for split in dataset.splits]
            self._client.log_inputs(run.info.run_id, inputs)

    def _read_json(self, run_id: str, name: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(self._client.download_artifacts(run_id, name, folder))
            return json.loads(path.read_text(encoding="utf-8"))


def _dataset_input(dataset: DatasetVersion, split: str) -> DatasetInput:
    examples = dataset.splits[split]
    return DatasetInput(
        Dataset(
            name=dataset_split_name(dataset.name, split),
            digest=dataset.id,
            source_type="local",
            source=json.dumps({"uri": dataset.sources.get(split, "")}),
            profile=json.dumps({"num_rows": len(examples)}),
        ),
        [InputTag("mlflow.data.context", "training" if split == "train" else "eval")],
    )
