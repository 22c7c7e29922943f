"""Validate an experiment whole and print its plan."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from jobs.console import console, say
from regraft.config import Experiment
from regraft.data.chats import read_chats
from regraft.data.dataset import load_dataset
from regraft.errors import ConfigError, InfeasibleTrialError
from regraft.models import resolve
from regraft.records import DatasetVersion
from regraft.search import expand


def run(path: Path, *, cards: bool = False) -> None:
    """Check configuration, data and base model; start nothing."""
    experiment = Experiment.load(path)
    source = Path(experiment.model.source)
    if cards and (source / "config.json").is_file():
        _show_cards(experiment, source)
        if not any(source.glob("*.safetensors")):
            say(f"{source} has no weights: nothing else can be checked")
            return
    from monitoring.check import detector_of

    dataset = load_dataset(experiment.name, experiment.data)
    for file in (experiment.retrain.reviewed, *experiment.retrain.evaluation.values()):
        if file is not None:
            read_chats(file)
    _check_storage(experiment)
    detector_of(experiment.monitor)
    base = resolve(experiment.model.source, experiment.model.revision, say)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in dataset.splits.items())
    console.print(
        f"{experiment.name}: base {base.source} ({base.revision}); dataset {dataset.id}: {counts}",
        markup=False,
    )
    tokens = _check_inputs(experiment, dataset, base.path)
    _show_trials(experiment, base.path, tokens)
    if cards and not (source / "config.json").is_file():
        _show_cards(experiment, base.path)
    console.print(
        f"chosen by {experiment.select.maximise}; served at {experiment.serve.host}:{experiment.serve.port}"
    )


def _check_storage(experiment: Experiment) -> None:
    """Refuse a place for checkpoints that nothing can be written to by its name alone."""
    from regraft.training.checkpoints import versions_of

    versions_of(experiment.cluster.storage or "", "check")


def _show_trials(experiment: Experiment, base: Path, tokens: int) -> None:
    from regraft.tuning.plan import describe

    table = Table(title="Trials: predicted peak memory, and time of training")
    for name in ("trial", "runs", "memory", "time", ""):
        table.add_column(name, overflow="fold")
    rows = describe(experiment, base, tokens)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    search, budget = experiment.sweep.search, experiment.sweep.budget
    if search.learns:
        more = getattr(search, "trials", len(rows)) - len(rows)
        console.print(
            f"search {search.name}: up to {max(0, more)} more trials follow from what these come to"
        )
    if finalists := experiment.sweep.finalists:
        console.print(f"the best {finalists.count} are repeated with {finalists.seeds - 1} more seeds each")
    if bounds := budget.model_dump(exclude_none=True):
        words = ", ".join(f"{value:g} {name.replace('_', '-')}" for name, value in bounds.items())
        console.print(f"budget: {words}; trials that do not fit are left out and named", markup=False)


def _show_cards(experiment: Experiment, base: Path) -> None:
    """What each method would need on GPUs of common sizes, whatever this machine has."""
    from regraft.training.preflight import CARDS, Batching, on_card, predict, shape_of

    sweep = experiment.sweep
    batching = Batching.of(sweep, experiment.evaluate)
    table = Table(
        title=f"{shape_of(base).parameters / 1e9:.2f} billion parameters, {sweep.tokens_per_batch} tokens a "
        f"batch, {sweep.max_length} a row: predicted for CUDA, not measured there",
        show_lines=True,
    )
    for name in ("trial", "one card needs", *CARDS):
        table.add_column(name, overflow="fold")
    for method in sweep.expanded():
        if method.remote:
            continue
        memory = predict(method, base, "bfloat16", "cuda", batching)
        fits = [on_card(method, base, batching, size) for size in CARDS.values()]
        table.add_row(method.label, f"{memory.gib:.1f} GiB ({memory.parts})", *fits)
    console.print(table)


def _check_inputs(experiment: Experiment, dataset: DatasetVersion, base: Path) -> int:
    """Encode the data as a trial will, and find the layers that adapters name; say what will be lost.

    Gives the tokens of the training set.
    """
    from regraft.data.dataset import evaluation_parts
    from regraft.methods.base import empty_causal_lm
    from regraft.methods.tuner import TunerMethod
    from regraft.models import embedding_rows, load_tokenizer
    from regraft.templates import writes_system
    from regraft.training.encoding import encode_evaluation, encode_train

    tokenizer, rows = load_tokenizer(base), embedding_rows(base)
    has_system = any(e.messages[0].role == "system" for split in dataset.splits.values() for e in split)
    if has_system and not writes_system(tokenizer):
        say("the base's template has no system turn: its text goes before the first user turn's, everywhere")
    parts = evaluation_parts(dataset, experiment.evaluate.final_share)
    found = {"train": encode_train(tokenizer, dataset, experiment.sweep, rows)}
    found["evaluation loss"] = encode_evaluation(tokenizer, parts.selection, experiment.sweep, rows)
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
    return sum(len(row.ids) for row in found["train"].rows)
