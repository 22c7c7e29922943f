"""The evaluation sets of a model: those of its YAML, and those that its versions were promoted by.

A set that once decided stays: what a later version must not lose is looked at, whether or not the YAML of
that day names it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from jobs.console import Say
from regraft.config import Experiment
from regraft.data.chats import read_chats, write_chats
from regraft.data.dataset import evaluation_splits, make_dataset
from regraft.records import DatasetVersion, ModelVersion
from regraft.tracking.registry import Registry

_FOLDER = "evaluation_sets"


def keep_sets(registry: Registry, version: ModelVersion, dataset: DatasetVersion) -> None:
    """Keep with a version's run the sets that it is promoted by."""
    with tempfile.TemporaryDirectory() as folder:
        for split in evaluation_splits(dataset):
            write_chats(Path(folder) / f"{split}.jsonl", dataset.split(split))
        registry.save_artifact(version.run_id, _FOLDER, Path(folder))


def with_registered(
    experiment: Experiment, dataset: DatasetVersion, registry: Registry, say: Say
) -> DatasetVersion:
    """The dataset with the sets that versions of this model were promoted by, where it lacks them.

    Of sets by one name that of the dataset counts, or else the newest; an example that stands in another set
    by now stays there.

    Raises:
        DataError: If training prompts leak a registered set.
    """
    splits, sources = dict(dataset.splits), dict(dataset.sources)
    taken = {e.id for split in evaluation_splits(dataset) for e in dataset.split(split)}
    for version in registry.promoted(experiment.name):
        if not registry.has_artifact(version.run_id, _FOLDER):
            continue
        with tempfile.TemporaryDirectory() as folder:
            for file in sorted(registry.load_artifact(version.run_id, _FOLDER, Path(folder)).glob("*.jsonl")):
                rows = tuple(e for e in read_chats(file) if e.id not in taken)
                if file.stem not in splits and rows:
                    splits[file.stem], sources[file.stem] = rows, f"registered with {version.served_id}"
                    taken |= {e.id for e in rows}
    if splits.keys() == dataset.splits.keys():
        return dataset
    added = [f"{name} ({len(splits[name])})" for name in splits if name not in dataset.splits]
    say(f"evaluated on {', '.join(added)} too: earlier versions were promoted by that")
    return make_dataset(
        experiment.name,
        splits,
        sources=sources,
        leakage_jaccard=experiment.data.leakage_jaccard,
        parent_id=dataset.id,
    )
