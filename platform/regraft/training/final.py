"""A candidate once more, when nothing else runs: answers that played no part in its choice, and its speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from regraft.config import EvaluateSection, ModelSection
from regraft.methods import parse_method
from regraft.methods.endpoint import Endpoint
from regraft.models import load_tokenizer, pick_device, resolve_trained_on
from regraft.records import EvalReport, Example, ExampleScore, Record, Speed
from regraft.training.candidate import BaseCache, score, speed
from regraft.training.remote import ask_endpoint


class Entry(Record):
    """A candidate to be measured: what it was trained by, on which base, and where its files are.

    `logged_model_id` is None for a control.
    """

    label: str
    method: dict[str, Any]
    base_model: str
    base_revision: str
    logged_model_id: str | None = None


class Measured(NamedTuple):
    """What came of it."""

    report: EvalReport
    speed: Speed | None


def measure(
    entry: Entry,
    examples: Sequence[Example],
    train: Sequence[Example],
    settings: EvaluateSection,
    model: ModelSection,
    *,
    dataset_id: str,
    folder: Path | None,
    bases: BaseCache,
    known: Sequence[ExampleScore] = (),
    where: str = "",
) -> Measured:
    """Load a candidate as serving does, have it answer, and time it.

    Args:
        entry: The candidate.
        examples: What to ask.
        train: Training examples, for a control that shows some.
        settings: How to answer, score and time.
        model: How the base is held.
        dataset_id: The dataset the examples are from.
        folder: The files of its logged model; None for a control.
        bases: Clean bases of this process.
        known: Scores of the same candidate, asked and scored the same way, that need no second answer.
        where: How quiet it is here, for the record.

    Raises:
        ModelError: If the base here is not the one it was trained on.
    """
    import torch

    method = parse_method(entry.method)
    if isinstance(method, Endpoint):
        found = ask_endpoint(method, examples, settings, dataset_id=dataset_id, split="final")
        return Measured(found.report, found.speed)
    base_path = resolve_trained_on(entry.base_model, entry.base_revision, entry.label).path
    tokenizer, device = load_tokenizer(base_path), pick_device(model.device)
    shown = method.shown(train)
    asked = [e.after(shown) for e in examples]
    held = (method, base_path, model.dtype, device)
    base = bases.take(*held)
    before = bases.nats(base, tokenizer, settings, *held)
    if folder is None:
        candidate = base
    elif method.kind == "adapter":
        candidate = method.attach(base, folder)
    else:  # all weights are its own
        bases.give_back(base, *held)
        del base
        candidate = method.load(base_path, folder, model.dtype, device)
    candidate.eval()
    report = score(
        candidate, tokenizer, asked, settings,
        dataset_id=dataset_id, split="final", known=known, base_nats=before,
    )  # fmt: skip
    timing = speed(candidate, tokenizer, asked, settings, torch.get_num_threads())
    bases.give_back(method.release(candidate), *held)
    return Measured(
        report, timing.model_copy(update={"how": f"{timing.how}; {where}" if where else timing.how})
    )
