"""Sentence embeddings of texts, each text embedded once: kept in the process and, if wished, in a folder.

A folder of vectors says something of the texts that they were made from: keep it as you keep the texts.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regraft.embeddings import Precision, embedder, quickest
from regraft.errors import DataError

Vectors = NDArray[np.float32]
#: Vectors kept in the process; 384 numbers of four bytes each make 77 MB.
KEPT = 50_000

_kept: dict[str, Vectors] = {}
_read: set[Path] = set()
_lock = threading.Lock()


def vectors(texts: Sequence[str], model: str, folder: Path | None = None) -> Vectors:
    """Embed texts, in their order, each distinct text once.

    They are computed in what is quickest on this machine (`regraft.embeddings.quickest`), and kept apart by
    it. A vector depends on the texts embedded in the same call only by rounding (`Embedder`).

    Args:
        texts: Any texts.
        model: As `regraft.embeddings.embedder` takes it.
        folder: Where vectors are kept between processes; made if missing. Several processes may share it.

    Returns:
        A row of unit length for each text.

    Raises:
        DataError: If a file of the folder cannot be read.
        ModelError: If the model cannot be had.
    """
    precision = quickest()
    keys = [_key(text, model, precision) for text in texts]
    with _lock:
        found = {key: _kept[key] for key in keys if key in _kept}
        if folder is not None and len(found) < len(set(keys)):
            _load(folder)
            found = {key: _kept[key] for key in keys if key in _kept}
    new = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
    if new or not keys:
        made = embedder(model, precision=precision).encode(list(new.values()))
        if not keys:
            return made
        found |= dict(zip(new, made, strict=True))
        with _lock:
            _keep({key: found[key] for key in new})
            if folder is not None:
                _save(folder, list(new), made)
    return np.stack([found[key] for key in keys])


def _key(text: str, model: str, precision: Precision) -> str:
    how = "" if precision == "float32" else f"{precision}\0"
    return hashlib.sha256(f"{how}{model}\0{text}".encode()).hexdigest()


def _keep(made: dict[str, Vectors]) -> None:
    _kept.update(made)
    for key in list(_kept)[: max(0, len(_kept) - KEPT)]:
        del _kept[key]


def _load(folder: Path) -> None:
    for file in sorted(folder.glob("*.npz")):
        if file in _read:
            continue
        try:
            with np.load(file, allow_pickle=False) as stored:
                _keep(dict(zip(stored["keys"].tolist(), stored["vectors"], strict=True)))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{file}: not a file of vectors: {error}", "delete it: it is made anew"
            ) from error
        _read.add(file)


def _save(folder: Path, keys: list[str], made: Vectors) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:32]}.npz"
    # A reader sees a whole file or none.
    partial = folder / f"{target.stem}.{os.getpid()}.partial"
    with partial.open("wb") as stream:
        np.savez(stream, keys=np.array(keys), vectors=made)
    partial.replace(target)
    _read.add(target)
