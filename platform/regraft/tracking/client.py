"""What runs and registry share: errors in Regraft's terms, records as JSON, adapter folders as hashes."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import requests
from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException

from regraft.errors import ModelError, ServiceError
from regraft.records import PromotionDecision, Record, RetrainDecision

SHA_TAG = "adapter.sha256"
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


class _Served(Protocol):
    @property
    def uri(self) -> str: ...


S = TypeVar("S", bound=_Served)
P = ParamSpec("P")
R = TypeVar("R")


def guarded(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let what MLflow raises leave a method as a `ServiceError` that names the server."""

    @functools.wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except (MlflowException, requests.RequestException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
            raise ServiceError(
                f"MLflow at {self.uri}: {reason}",
                "see that the server runs and that tracking.uri names it",
                away=_nobody_answered(error),
            ) from error

    return call


def _nobody_answered(error: BaseException | None) -> bool:
    """Whether a connection failed somewhere below: MLflow wraps what the requests library raised."""
    while error is not None:
        if isinstance(error, requests.ConnectionError | requests.Timeout):
            return True
        error = error.__cause__ or error.__context__
    return False


def has_code(error: MlflowException, *codes: str) -> bool:
    """Whether the server gave one of these error codes, such as `RESOURCE_DOES_NOT_EXIST`."""
    return error.error_code in codes


def to_json(record: Record) -> str:
    """A record as readable JSON. NaN stays NaN, where pydantic's own JSON would lose it as null."""
    return json.dumps(record.model_dump(mode="json"), ensure_ascii=False, indent=1)


def log_decision(client: MlflowClient, run_id: str, decision: RetrainDecision | PromotionDecision) -> None:
    """Log a decision on a run, as a JSON artifact and as tags."""
    if isinstance(decision, PromotionDecision):
        kind, name = "promotion", f"promotion_{decision.id}.json"
        tags = {"id": decision.id, "outcome": decision.outcome, "reason": decision.reason}
    else:
        kind, name = "retrain", "retrain_decision.json"
        tags = {"id": decision.id, "action": decision.action, "reason": decision.reason}
        tags |= {"job": decision.job_id} if decision.job_id else {}
    client.log_text(run_id, to_json(decision), name)
    client.log_batch(run_id, tags=[RunTag(f"{kind}.{key}", value[:1000]) for key, value in tags.items()])


def hash_folder(folder: Path) -> str:
    """SHA-256 over the relative names and the contents of all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder with weights that could run code when they are loaded.

    Raises:
        ModelError: If a file is of a pickled kind; the message names it.
    """
    for file in sorted(folder.rglob("*")):
        if file.suffix in PICKLES:
            raise ModelError(
                f"{file.relative_to(folder)} is a pickled file, which may run code when it is loaded",
                "save the model as safetensors",
            )


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow counts them."""
    return int(time.time() * 1000)
