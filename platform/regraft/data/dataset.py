"""From files to an immutable, checked `DatasetVersion`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from regraft.config import DataSection
from regraft.data.chats import read_chats
from regraft.data.checks import find_leaks, without_repeats
from regraft.errors import DataError
from regraft.records import DatasetVersion, Example, content_hash
from regraft.selection.split import final_part, selection_part


def load_dataset(name: str, section: DataSection) -> DatasetVersion:
    """Read, check and hash the data of an experiment.

    Raises:
        DataError: If a file is wrong, or a training prompt is (nearly) an evaluation prompt.
    """
    splits = {"train": tuple(e for path in section.train for e in read_chats(path))}
    splits |= {split: read_chats(path) for split, path in section.evaluation.items()}
    sources = {"train": ", ".join(str(p) for p in section.train)}
    sources |= {split: str(path) for split, path in section.evaluation.items()}
    return make_dataset(name, splits, sources=sources, leakage_jaccard=section.leakage_jaccard)


def make_dataset(
    name: str,
    splits: Mapping[str, Sequence[Example]],
    *,
    sources: Mapping[str, str],
    leakage_jaccard: float,
    parent_id: str | None = None,
) -> DatasetVersion:
    """Check splits against each other and give them a content hash.

    Exact duplicates within the training split are dropped and counted; leakage is refused.

    Raises:
        DataError: If ids repeat across splits or training prompts leak evaluation prompts.
    """
    train, repeats = without_repeats(splits["train"])
    kept = {split: tuple(rows) for split, rows in splits.items()} | {"train": train}
    _refuse_repeated_ids(kept, sources)
    for split, rows in kept.items():
        if split == "train":
            continue
        leaks = find_leaks(kept["train"], rows, leakage_jaccard)
        if leaks:
            shown = "\n".join(
                f"{sources.get('train', 'train')}: {leak.train_id} is {leak.jaccard:.2f} alike to "
                f"{leak.evaluation_id} of {sources.get(split, split)}"
                for leak in leaks[:10]
            )
            raise DataError(
                f"{len(leaks)} training prompts leak the evaluation set {split!r}:\n{shown}",
                "take those rows out of one file, or raise data.leakage_jaccard if they really differ",
            )
    identity = {
        split: [[e.id, [m.model_dump() for m in e.messages]] for e in rows] for split, rows in kept.items()
    }
    return DatasetVersion(
        id=content_hash(identity),
        name=name,
        splits=kept,
        sources=dict(sources),
        checks={"exact_duplicates_dropped": repeats, "leaks": 0},
        parent_id=parent_id,
    )


def _refuse_repeated_ids(splits: Mapping[str, Sequence[Example]], sources: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for split, rows in splits.items():
        for example in rows:
            where = sources.get(split, split)
            if example.id in first:
                raise DataError(
                    f"{where}: id {example.id!r} stands already in {first[example.id]}",
                    "give each example an id of its own; the same row must not be in two sets",
                )
            first[example.id] = where


def evaluation_splits(dataset: DatasetVersion) -> tuple[str, ...]:
    """Names of the evaluation sets."""
    return tuple(split for split in dataset.splits if split != "train")


def union_of_evaluations(dataset: DatasetVersion) -> tuple[Example, ...]:
    """All evaluation examples, each tagged with the set it is from."""
    return tuple(
        e.model_copy(update={"tags": {**e.tags, "set": split}})
        for split in evaluation_splits(dataset)
        for e in dataset.split(split)
    )


class Parts(NamedTuple):
    """The evaluation examples in two parts, each example tagged with its set."""

    selection: tuple[Example, ...]
    final: tuple[Example, ...]


def evaluation_parts(dataset: DatasetVersion, final_share: float) -> Parts:
    """What candidates are chosen by, and what the chosen are judged by.

    Args:
        dataset: With its evaluation sets.
        final_share: `evaluate.final_share`.

    Raises:
        DataError: If there is nothing to choose by, or to judge by.
    """
    union = union_of_evaluations(dataset)
    parts = Parts(selection_part(union, final_share), final_part(union, final_share))
    for part, purpose in zip(parts, ("to choose by", "to judge the chosen by"), strict=True):
        if not part:
            raise DataError(
                f"evaluate.final_share = {final_share:g} leaves none of {len(union)} evaluation examples "
                + purpose,
                "add evaluation examples, or set evaluate.final_share to 0: the same to choose and to judge",
            )
    return parts
