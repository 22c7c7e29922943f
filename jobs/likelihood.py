"""How likely a version finds the answers that the endpoint gave: it is loaded as serving loads it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from monitoring.kept import kept, key_of
from monitoring.likelihoods import likelihoods, scorable
from regraft.config import Experiment
from regraft.errors import DataError
from regraft.models import home
from regraft.records import CapturedExchange, Example, Likelihood, Message, ModelVersion

#: Raised whenever a change makes earlier figures incomparable.
VERSION = 1


def answer_logprobs(
    experiment: Experiment,
    version: ModelVersion,
    exchanges: Sequence[CapturedExchange],
    limit: int,
    *,
    folder: Path,
    cache: Path | None = None,
) -> dict[str, float]:
    """Mean log-probability of a token, in nats, of a sample of answers under a version.

    Args:
        experiment: How the model is held.
        version: Who scores.
        exchanges: Whose answers; with the system turn that they were asked with.
        limit: Answers scored at most, chosen by the hash of their ids.
        folder: The files of the version's logged model, from `Registry.fetch`.
        cache: Folder that keeps figures, by version and exchange; `logprobs` in Regraft's home if not given.

    Returns:
        By the id of the exchange; absent where an answer failed, was cut off, was not chosen, or its tokens
        cannot be told from the chat template.

    Raises:
        DataError: If the version is an endpoint elsewhere, which tells no probabilities.
        ModelError: If the base model is not the one the version was trained on.
    """
    from regraft.methods import parse_method
    from regraft.methods.endpoint import Endpoint

    if isinstance(parse_method(version.method), Endpoint):
        raise DataError(
            f"{version.served_id} is an endpoint elsewhere and tells no probabilities",
            "leave the log-probabilities of answers out",
        )
    asked = scorable(exchanges, limit)
    keys = [
        key_of(version.logged_model_id, version.base_revision, experiment.model.dtype, _identity(e))
        for e in asked
    ]

    def make(places: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        found = likelihoods(
            [asked[i] for i in places], lambda some: _score(experiment, version, folder, some), len(places)
        )
        return np.array([[found.get(asked[i].id, np.nan)] for i in places], dtype=np.float64)

    rows = kept(cache or home() / "logprobs", f"logprob_{VERSION}", 1, keys, make)
    return {e.id: float(row[0]) for e, row in zip(asked, rows, strict=True) if np.isfinite(row[0])}


def _identity(exchange: CapturedExchange) -> str:
    """The exchange's id with what was said: an id alone may be another's in another store."""
    return repr([exchange.id, [(m.role, m.content) for m in exchange.messages], exchange.output])


def _score(
    experiment: Experiment, version: ModelVersion, folder: Path, exchanges: Sequence[CapturedExchange]
) -> list[Likelihood | None]:
    import torch

    from regraft.methods import parse_method
    from regraft.models import load_tokenizer, pick_device, resolve_trained_on
    from regraft.training.likelihood import reference_likelihoods

    base = resolve_trained_on(version.base_model, version.base_revision, version.served_id).path
    device = pick_device(experiment.model.device)
    model = parse_method(version.method).load(base, folder, experiment.model.dtype, device)
    examples = [
        Example(id=e.id, messages=(*e.messages, Message(role="assistant", content=e.output)))
        for e in exchanges
    ]
    try:
        return reference_likelihoods(model, load_tokenizer(base), examples, device)
    finally:
        del model
        gc.collect()  # models refer to themselves
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
