"""Validate an experiment whole and print its plan."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from jobs.console import console, say
from regraft.config import Experiment
from regraft.data.chats import read_chats
from regraft.data.dataset import load_dataset
from regraft.errors import ConfigError, InfeasibleTrialError
from regraft.methods.search import expand
from regraft.models import resolve
from regraft.records import DatasetVersion


def run(path: Path) -> None:
    """Check configuration, data and base model; start nothing."""
    from regraft.tuning.plan import describe

    experiment = Experiment.load(path)
    dataset = load_dataset(experiment.name, experiment.data)
    for file in (experiment.retrain.reviewed, *experiment.retrain.evaluation.values()):
        if file is not None:
            read_chats(file)
    base = resolve(experiment.model.source, experiment.model.revision, say)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in dataset.splits.items())
    console.print(
        f"{experiment.name}: base {base.source} ({base.revision}); dataset {dataset.id}: {counts}",
        markup=False,
    )
    table = Table(title="Trials")
    for name in ("trial", "runs", "memory"):
        table.add_column(name)
    for row in describe(experiment, base.path):
        table.add_row(*row)
    console.print(table)
    _check_inputs(experiment, dataset, base.path)
    console.print(
        f"chosen by {experiment.select.maximise}; served at {experiment.serve.host}:{experiment.serve.port}"
    )


def _check_inputs(experiment: Experiment, dataset: DatasetVersion, base: Path) -> None:
    """Encode the data as a trial will, and find the layers that adapters name; say what will be lost."""
    from regraft.methods.base import TunerMethod, empty_causal_lm
    from regraft.models import embedding_rows, load_tokenizer
    from regraft.templates import writes_system
    from regraft.training.encoding import encode_evaluation, encode_train

    tokenizer, rows = load_tokenizer(base), embedding_rows(base)
    has_system = any(e.messages[0].role == "system" for split in dataset.splits.values() for e in split)
    if has_system and not writes_system(tokenizer):
        say("the base's template has no system turn: its text goes before the first user turn's, everywhere")
    found = {"train": encode_train(tokenizer, dataset, experiment.sweep, rows)}
    found["evaluation loss"] = encode_evaluation(tokenizer, dataset, experiment.sweep, rows)
    for name, encodings in found.items():
        console.print(f"{name}: {encodings.summary}", markup=False)
    skeleton = empty_causal_lm(base)
    for index, entry in enumerate(experiment.sweep.methods):
        for method in expand(entry, samples=experiment.sweep.samples, seed=experiment.sweep.seed):
            if isinstance(method, TunerMethod):
                try:
                    method.check_targets(skeleton)
                except InfeasibleTrialError as error:
                    raise ConfigError(f"sweep.methods.{index}.{error.problem}", error.mend) from error
