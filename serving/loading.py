"""From a registered version to an engine that answers with it, on a base that versions share if they can."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regraft.methods import Method, parse_method
from regraft.methods.base import DTypeName
from regraft.models import ResolvedModel
from regraft.records import ModelVersion
from serving.engines.base import Engine, EngineLimits
from serving.settings import EndpointSettings
from serving.shelf import Loader, VersionFiles, in_process

if TYPE_CHECKING:
    from serving.engines.slots import SlotsBase

logger = logging.getLogger(__name__)
Key = tuple[str, ...]


class Bases:
    """The bases of this process by what they were loaded as, each as long as a version is on it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Key, SlotsBase] = {}
        self._users: dict[Key, int] = {}

    def use(self, key: Key, load: Callable[[], SlotsBase]) -> SlotsBase:
        """A base, loaded if it is not here; give it back with `release`."""
        with self._lock:  # of two that want the same one waits: a base is large
            if key not in self._held:
                self._held[key] = load()
                self._users[key] = 0
            self._users[key] += 1
            return self._held[key]

    def release(self, key: Key) -> None:
        """Give a base back; the last to do so frees it."""
        with self._lock:
            self._users[key] -= 1
            unused = self._held.pop(key) if not self._users[key] else None
        if unused is not None:
            unused.close()


_BASES = Bases()


def make_loader(settings: EndpointSettings, files: VersionFiles) -> Loader:
    """How a process that holds models loads a version.

    Args:
        settings: Of the endpoint.
        files: The registry.
    """

    def load(version: ModelVersion, folder: Path) -> Engine:
        return load_engine(
            version, folder, dtype=settings.dtype, device=settings.device, limits=settings.limits
        )

    return in_process(files, load, dtype=settings.dtype)


def load_engine(
    version: ModelVersion,
    folder: Path,
    *,
    dtype: DTypeName,
    device: Literal["auto", "cpu", "cuda"],
    limits: EngineLimits,
) -> Engine:
    """Load a version. Slow, and meant for a thread.

    A version whose adapter may share a batch with others is put on a base that is in memory already, or comes
    to be; one that may not, or whose base the slots do not understand, gets a static engine with a base of
    its own. Which, and why, is logged.

    Args:
        version: What to load.
        folder: The files of its logged model.
        dtype: Type of the frozen weights.
        device: Where to hold it.
        limits: How much an engine may take on; versions on one base share it.

    Raises:
        ModelError: If the base model is not the one the version was trained on.
    """
    from regraft.models import load_tokenizer, pick_device, resolve_trained_on
    from serving.engines.static import StaticEngine

    base = resolve_trained_on(version.base_model, version.base_revision, version.served_id)
    method, where = parse_method(version.method), pick_device(device)
    found = _in_slots(method, base, folder, dtype, where, limits)
    if isinstance(found, Engine):
        logger.info("%s is served in slots of the base it shares", version.served_id)
        return found
    logger.info("%s is served by the static engine: %s", version.served_id, found)
    model = method.load(base.path, folder, dtype, where)
    return StaticEngine(model, load_tokenizer(base.path), limits)


def _in_slots(
    method: Method, base: ResolvedModel, folder: Path, dtype: DTypeName, device: str, limits: EngineLimits
) -> Engine | str:
    """The version in slots, or why not."""
    from regraft.evals.slots import understands
    from serving.engines.adapters import Adapter, UnmixableError, read_adapter
    from serving.engines.slots import SlotEngine

    own = method.kind == "full"  # weights that are no other version's
    key: Key = (str(folder if own else base.path), dtype, device, str(getattr(method, "quantise", None)))
    key += tuple(map(str, (limits.max_batch, limits.max_queued, limits.threads)))

    def load() -> Any:
        return (
            method.load(base.path, folder, dtype, device)
            if own
            else method.load_base(base.path, dtype, device)
        )

    shared = _BASES.use(key, partial(_slots_base, load, base, limits))
    try:
        if understands(shared.base):
            adapter = read_adapter(folder, shared.base) if method.kind == "adapter" else Adapter()
            return SlotEngine(shared, adapter, partial(_BASES.release, key))
        why = "its base keeps more than keys and values, or asks for more than likely tokens"
    except UnmixableError as error:
        why = str(error)
    except BaseException:
        _BASES.release(key)
        raise
    _BASES.release(key)
    return why


def _slots_base(load: Callable[[], Any], base: ResolvedModel, limits: EngineLimits) -> SlotsBase:
    from regraft.models import load_tokenizer
    from serving.engines.slots import SlotsBase

    return SlotsBase(load(), load_tokenizer(base.path), limits)
