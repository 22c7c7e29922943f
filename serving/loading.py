"""From a registered version to an engine that answers with it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from regraft.errors import ModelError
from regraft.methods import parse_method
from regraft.methods.base import DTypeName
from regraft.records import ModelVersion
from serving.engines.base import Engine, EngineLimits


def load_engine(
    version: ModelVersion,
    folder: Path,
    *,
    dtype: DTypeName,
    device: Literal["auto", "cpu", "cuda"],
    limits: EngineLimits,
) -> Engine:
    """Load a version. Slow, and meant for a thread.

    Args:
        version: What to load.
        folder: The files of its logged model.
        dtype: Type of the frozen weights.
        device: Where to hold it.
        limits: How much the engine may take on.

    Raises:
        ModelError: If the base model is not the one the version was trained on.
    """
    from regraft.models import load_tokenizer, pick_device, resolve
    from serving.engines.static import StaticEngine

    base = resolve(version.base_model, version.base_revision)
    if base.revision != version.base_revision:
        raise ModelError(
            f"{version.served_id} was trained on {version.base_model} at {version.base_revision}, "
            f"but here it is at {base.revision}",
            "put that revision of the base model back, or retrain",
        )
    model = parse_method(version.method).load(base.path, folder, dtype, pick_device(device))
    return StaticEngine(model, load_tokenizer(base.path), limits)
