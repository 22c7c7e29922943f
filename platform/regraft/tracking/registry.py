"""Registered versions of a model, the aliases that say which one serves, and the files to serve it from."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from regraft.errors import ModelError, RegraftError
from regraft.records import ModelVersion, PromotionDecision, TrialResult
from regraft.tracking.client import SHA_TAG, guarded, has_code, hash_folder, log_decision, refuse_pickles
from regraft.tracking.server import check_server

CHAMPION = "champion"
_TAGS = ("method", "base_model", "base_revision", "dataset_id", "run_id")
_SOURCE = "models:/"


class PromotionConflictError(RegraftError):
    """The champion has changed since the challenger was compared with it."""


class Registry:
    """The model registry of an MLflow server.

    Args:
        uri: URL of the MLflow server.
        cache: Folder where fetched models are kept, by logged model id.
    """

    def __init__(self, uri: str, cache: Path) -> None:
        self.uri = uri.rstrip("/")
        self.cache = cache
        self._client = MlflowClient(self.uri)

    @guarded
    def register(self, name: str, result: TrialResult) -> ModelVersion:
        """Make a version from a trial's logged model; the same logged model twice is one version.

        Raises:
            ValueError: If the trial kept no model, as the untuned control does not.
        """
        model_id = result.logged_model_id
        if model_id is None:
            raise ValueError(f"trial {result.label!r} kept no model: there is nothing to register")
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if not has_code(error, "RESOURCE_ALREADY_EXISTS"):
                raise
        for known in self.versions(name):
            if known.logged_model_id == model_id:
                return known
        tags = {
            "method": json.dumps(result.method, sort_keys=True),
            "base_model": result.base_model,
            "base_revision": result.base_revision,
            "dataset_id": result.dataset_id,
            "run_id": result.run_id,
        }
        raw = self._client.create_model_version(
            name,
            f"{_SOURCE}{model_id}",
            run_id=result.run_id,
            tags=tags,
            model_id=model_id,
            await_creation_for=0,  # the SQL store creates at once; waiting only writes a line about it
        )
        return _version(raw)

    @guarded
    def version(self, name: str, version: int) -> ModelVersion:
        """One version of a model.

        Raises:
            ModelError: If there is no such version, or Regraft did not register it.
        """
        try:
            raw = self._client.get_model_version(name, str(version))
        except MlflowException as error:
            if has_code(error, "RESOURCE_DOES_NOT_EXIST"):
                raise ModelError(
                    f"there is no version {version} of {name}", "see `versions` in MLflow's Models page"
                ) from error
            raise
        return _version(raw)

    @guarded
    def versions(self, name: str) -> tuple[ModelVersion, ...]:
        """All versions that Regraft registered, the oldest first; none where there is no such model."""
        found: list[ModelVersion] = []
        token = None
        while True:
            page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
            found += [_version(raw) for raw in page if _is_ours(raw)]
            token = page.token
            if not token:
                return tuple(sorted(found, key=lambda v: v.version))

    @guarded
    def promoted(self, name: str) -> tuple[ModelVersion, ...]:
        """Versions that once became the champion, the newest first."""
        return tuple(v for v in reversed(self.versions(name)) if self._decided(v))

    @guarded
    def note_decision(self, version: ModelVersion, decision: PromotionDecision) -> None:
        """Say on a version's page what the gate said of it last, and why."""
        tags = {"gate.id": decision.id, "gate.outcome": decision.outcome, "gate.against": decision.incumbent}
        for key, value in tags.items():
            self._client.set_model_version_tag(version.name, str(version.version), key, value)
        said = f"{decision.outcome}, against {decision.incumbent}: {decision.reason}"
        self._client.update_model_version(version.name, str(version.version), said)

    @guarded
    def by_alias(self, name: str, alias: str) -> ModelVersion | None:
        """The version that an alias points to; None if the model or the alias does not exist.

        Raises:
            ServiceError: If the server does not answer; within seconds, where MLflow's client would go on
                trying for minutes.
        """
        check_server(self.uri)
        try:
            raw = self._client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            missing_alias = has_code(error, "INVALID_PARAMETER_VALUE") and "not found" in str(error)
            if missing_alias or has_code(error, "RESOURCE_DOES_NOT_EXIST"):
                return None
            raise
        return _version(raw)

    @guarded
    def aliases(self, name: str) -> dict[str, int]:
        """All aliases of a model and the versions they point to; none if there is no such model.

        Raises:
            ServiceError: As `by_alias`: this is what serving polls.
        """
        check_server(self.uri)
        try:
            found = self._client.get_registered_model(name).aliases
        except MlflowException as error:
            if has_code(error, "RESOURCE_DOES_NOT_EXIST"):
                return {}
            raise
        return {alias: int(version) for alias, version in found.items()}

    @guarded
    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias to a version. The champion's is moved by `promote` and `return_to` instead."""
        self._client.set_registered_model_alias(name, alias, str(version))

    @guarded
    def promote(
        self,
        version: ModelVersion,
        decision: PromotionDecision,
        *,
        expected: ModelVersion | None,
        promotion_lock: Path,
    ) -> None:
        """Make a version the champion, if the champion is still the one it was compared with.

        Aliases have no compare-and-swap, so promotions go one at a time through a file lock. The alias moves
        last: before it does nothing has happened, after it everything has, and the same call again is safe.

        Args:
            version: The new champion.
            decision: The gate's decision to promote it.
            expected: The champion that the decision knows of; None if there was none.
            promotion_lock: A file that all promoters of this registry lock.

        Raises:
            PromotionConflictError: If the champion is another than `expected`.
            ValueError: If the decision is not to promote.
        """
        if decision.outcome != "promote":
            raise ValueError(f"decision {decision.id} is {decision.outcome!r}, not 'promote'")
        with _locked(promotion_lock):
            current = self.by_alias(version.name, CHAMPION)
            if current == version and self._decided(version) == decision.id:
                return
            if current != expected:
                raise PromotionConflictError(
                    f"the champion of {version.name} is {_name(current)}, not {_name(expected)} as when "
                    f"{version.served_id} was compared with it",
                    "compare the challenger with the present champion and decide again",
                )
            log_decision(self._client, version.run_id, decision)
            for key, value in {"promotion.id": decision.id, "promotion.outcome": decision.outcome}.items():
                self._client.set_model_version_tag(version.name, str(version.version), key, value)
            self._client.set_registered_model_alias(version.name, CHAMPION, str(version.version))

    @guarded
    def return_to(
        self, version: ModelVersion, *, instead_of: ModelVersion | None, promotion_lock: Path
    ) -> ModelVersion | None:
        """Make a version the champion by a person's or a fault's word; gives the champion before.

        Args:
            version: The new champion.
            instead_of: The champion that is gone back from; None: whichever it is.
            promotion_lock: The file that all promoters of this registry lock.

        Raises:
            PromotionConflictError: If the champion is another than `instead_of`.
        """
        with _locked(promotion_lock):
            current = self.by_alias(version.name, CHAMPION)
            if instead_of is not None and current != instead_of:
                raise PromotionConflictError(
                    f"the champion of {version.name} is {_name(current)}, not {_name(instead_of)}",
                    "see whether the present champion is to be gone back from too",
                )
            self._client.set_registered_model_alias(version.name, CHAMPION, str(version.version))
            return current

    @guarded
    def judged(self, version: ModelVersion) -> PromotionDecision | None:
        """What the gate said of a version last; None if it was never asked."""
        raw = self._client.get_model_version(version.name, str(version.version))
        decided: str | None = raw.tags.get("gate.id")
        return self._decision(version, decided) if decided else None

    @guarded
    def promotion(self, version: ModelVersion) -> PromotionDecision | None:
        """The decision that made a version the champion; None if there was none."""
        decided = self._decided(version)
        return self._decision(version, decided) if decided else None

    def _decision(self, version: ModelVersion, decided: str) -> PromotionDecision:
        with tempfile.TemporaryDirectory() as folder:
            file = self.load_artifact(version.run_id, f"promotion_{decided}.json", Path(folder))
            return PromotionDecision.model_validate_json(file.read_text())

    @guarded
    def fetch(self, logged_model_id: str) -> Path:
        """The files of a logged model in the local cache, downloaded and checked on first use.

        Raises:
            ModelError: If a file is pickled, or the files are not those that were logged.
        """
        target = self.cache / logged_model_id
        if target.is_dir():
            return target
        self.cache.mkdir(parents=True, exist_ok=True)
        model = self._client.get_logged_model(logged_model_id)
        with tempfile.TemporaryDirectory(dir=self.cache, prefix=".fetch-") as temporary:
            # Not by its models:/ URI: resolving that one asks the process-wide tracking server.
            folder = Path(
                mlflow.artifacts.download_artifacts(
                    artifact_uri=model.artifact_location, dst_path=temporary, tracking_uri=self.uri
                )
            )
            # Written by MLflow and not under the hash: what is served is exactly what was hashed.
            (folder / "MLmodel").unlink(missing_ok=True)
            refuse_pickles(folder)
            if hash_folder(folder) != model.tags.get(SHA_TAG):
                raise ModelError(
                    f"the files of logged model {logged_model_id} are not those that were logged: "
                    f"their SHA-256 is not the one in its tag {SHA_TAG}",
                    "find out what changed the artifact store, and promote another version meanwhile",
                )
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first, with the same content
                    raise
        return target

    @guarded
    def save_artifact(self, run_id: str, name: str, folder_or_file: Path) -> None:
        """Keep a file or a folder under `name` among the artifacts of a run."""
        if folder_or_file.is_dir():
            self._client.log_artifacts(run_id, str(folder_or_file), name)
            return
        with tempfile.TemporaryDirectory() as temporary:  # MLflow takes the name from the file
            renamed = Path(temporary) / Path(name).name
            shutil.copyfile(folder_or_file, renamed)
            parent = Path(name).parent.as_posix()
            self._client.log_artifact(run_id, str(renamed), None if parent == "." else parent)

    @guarded
    def has_artifact(self, run_id: str, name: str) -> bool:
        """Whether a run has a file or folder by that name at its root."""
        return any(found.path == name for found in self._client.list_artifacts(run_id))

    @guarded
    def load_artifact(self, run_id: str, name: str, into: Path) -> Path:
        """Download what `save_artifact` kept, into a folder; gives the path of the file or folder there."""
        into.mkdir(parents=True, exist_ok=True)
        return Path(self._client.download_artifacts(run_id, name, str(into)))

    def _decided(self, version: ModelVersion) -> str | None:
        raw = self._client.get_model_version(version.name, str(version.version))
        decided: str | None = raw.tags.get("promotion.id")
        return decided


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also if this process dies
        yield


def _is_ours(raw: Any) -> bool:
    return str(raw.source).startswith(_SOURCE) and all(tag in raw.tags for tag in _TAGS)


def _version(raw: Any) -> ModelVersion:
    """A version as a record; MLflow does not keep `model_id`, so that one comes from the source."""
    if not _is_ours(raw):
        raise ModelError(
            f"{raw.name}/{raw.version} was not registered by Regraft: it lacks tags among {', '.join(_TAGS)}",
            "register the trial through Regraft, or point the alias to a version that was",
        )
    return ModelVersion(
        name=raw.name,
        version=int(raw.version),
        logged_model_id=str(raw.source).removeprefix(_SOURCE),
        run_id=raw.tags["run_id"],
        method=json.loads(raw.tags["method"]),
        base_model=raw.tags["base_model"],
        base_revision=raw.tags["base_revision"],
        dataset_id=raw.tags["dataset_id"],
    )


def _name(version: ModelVersion | None) -> str:
    return version.served_id if version else "none"
