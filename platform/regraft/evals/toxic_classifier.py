"""Sequence classifiers of transformers that say how toxic a text is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.encoders import load_encoder
from regraft.errors import ModelError

if TYPE_CHECKING:
    import torch

#: What classifiers call a text that is not toxic; small letters, without spaces, dashes and underscores.
_HARMLESS = frozenset(
    [
        f"{no}{what}"
        for no in ("no", "non", "not")
        for what in ("toxic", "hate", "hateful", "offensive", "abusive")
    ]
    + [
        "neutral",
        "clean",
        "ok",
        "okay",
        "normal",
        "safe",
        "none",
        "not",
        "benign",
        "nohatespeech",
        "acceptable",
    ]
)
_BATCH = 16
_MEND = "name a classifier such as unitary/toxic-bert, or the absolute path of a folder in safetensors"

_loading = threading.Lock()


class Classifier:
    """A sequence classifier on the CPU, in float32. Get one from `classifier`; threads may share it.

    Args:
        folder: Where it lies, as safetensors with its tokenizer.

    Raises:
        ModelError: If it cannot be loaded, or has no trained head that gives probabilities.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        self._where = f"toxicity: model {folder}"
        try:
            loaded = load_encoder(AutoModelForSequenceClassification, folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self._where} cannot be loaded: {error}", _MEND) from error
        if loaded.missing:
            raise ModelError(f"{self._where} has no weights {list(loaded.missing[:3])}", _MEND)
        self._tokenizer, self._model, _, self._tokenizing = loaded
        if not self._tokenizer.is_fast:
            raise ModelError(f"{self._where} has no tokenizer.json", _MEND)
        config = self._model.config
        if config.problem_type == "regression":
            raise ModelError(f"{self._where} gives a regression and no probabilities", _MEND)
        self.labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        # As the text-classification pipeline of transformers decides it.
        self.exclusive = config.problem_type != "multi_label_classification" and config.num_labels > 1
        bounds = (self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
        self.max_tokens = int(min(bound for bound in bounds if bound))

    def toxic(self, texts: Sequence[str], toxic_labels: Sequence[str] = ()) -> list[float]:
        """The probability that each text is toxic; of a text longer than `max_tokens`, of its worst window.

        Of labels that may hold together it is the highest of a toxic one, of labels that exclude each other
        the sum over the toxic ones.

        Raises:
            ModelError: If it cannot be told which labels are toxic.
        """
        import torch

        chosen = self._chosen(toxic_labels)
        worst = [0.0] * len(texts)
        if not texts:
            return worst
        with self._tokenizing:
            rows = self._tokenizer(
                list(texts), truncation=True, max_length=self.max_tokens, return_overflowing_tokens=True
            )
        owner = rows.pop("overflow_to_sample_mapping")
        order = sorted(range(len(owner)), key=lambda i: len(rows["input_ids"][i]))
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                batch = order[start : start + _BATCH]
                padded = self._tokenizer.pad(
                    {key: [value[i] for i in batch] for key, value in rows.items()}, return_tensors="pt"
                )
                found = self._probability(self._model(**padded).logits, chosen)
                for index, probability in zip(batch, found.tolist(), strict=True):
                    worst[owner[index]] = max(worst[owner[index]], probability)
        return worst

    def _probability(self, logits: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        if self.exclusive:
            return logits.softmax(-1)[:, chosen].sum(-1).clamp(max=1.0)
        return logits.sigmoid()[:, chosen].amax(-1)

    def _chosen(self, toxic_labels: Sequence[str]) -> list[int]:
        """The places of the toxic labels."""
        labels = list(self.labels)
        if unknown := [label for label in toxic_labels if label not in labels]:
            raise ModelError(f"toxicity: toxic_labels: no label {unknown}", f"there are {labels}")
        mend = "say which are toxic in toxic_labels"
        if not toxic_labels and any(label.startswith("LABEL_") for label in labels):
            raise ModelError(f"{self._where} numbers its labels {labels}", mend)
        toxic = set(toxic_labels) or {label for label in labels if _plain(label) not in _HARMLESS}
        if not toxic or (self.exclusive and toxic == set(labels)):
            raise ModelError(
                f"{self._where}: of its labels {labels} {'all' if toxic else 'none'} are toxic", mend
            )
        return [place for place, label in enumerate(labels) if label in toxic]


def classifier(source: str, revision: str | None = None) -> Classifier:
    """A classifier, loaded once a process.

    Args:
        source: The absolute path of a folder, or a hub id.
        revision: Commit or tag of a hub id.

    Raises:
        ModelError: If it cannot be found or loaded.
    """
    with _loading:
        return _loaded(source, revision)


@cache
def _loaded(source: str, revision: str | None) -> Classifier:
    folder = Path(source).expanduser()
    if folder.is_absolute():
        return Classifier(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]  # no pickles
    try:
        return Classifier(Path(snapshot_download(source, revision=revision, allow_patterns=wanted)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"toxicity: model {source} is not to be had from the hub: {error}", _MEND) from error


def _plain(label: str) -> str:
    return "".join(c for c in label.lower() if c.isalnum())
