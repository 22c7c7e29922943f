"""From a registered version to an engine that answers with it, on a base that versions share if they can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regraft.methods import Method, parse_method
from regraft.methods.base import DTypeName
from regraft.models import ResolvedModel
from regraft.records import ModelVersion
from regraft.serve_sections import VllmSection
from serving.engines.base import Engine, EngineLimits
from serving.settings import EndpointSettings
from serving.shared import Key, Shared
from serving.shelf import Loader, VersionFiles, in_process

if TYPE_CHECKING:
    from serving.engines.slots import SlotsBase
    from serving.engines.vllm import VllmServer

logger = logging.getLogger(__name__)

_BASES: Shared[SlotsBase] = Shared()
_SERVERS: Shared[VllmServer] = Shared()


def make_loader(settings: EndpointSettings, files: VersionFiles) -> Loader:
    """How a process that holds models loads a version.

    Args:
        settings: Of the endpoint.
        files: The registry.
    """

    def load(version: ModelVersion, folder: Path) -> Engine:
        return load_engine(
            version,
            folder,
            dtype=settings.dtype,
            device=settings.device,
            limits=settings.limits,
            vllm=settings.serve.vllm,
        )

    return in_process(files, load, dtype=settings.dtype)


def load_engine(
    version: ModelVersion,
    folder: Path,
    *,
    dtype: DTypeName,
    device: Literal["auto", "cpu", "cuda"],
    limits: EngineLimits,
    vllm: VllmSection | None = None,
) -> Engine:
    """Load a version. Slow, and meant for a thread.

    What vLLM is to serve, and serves as it was evaluated, goes there. Of the others, a version whose adapter
    may share a batch with others is put on a base that is in memory already, or comes to be; one that may
    not, or whose base the slots do not understand, gets a static engine with a base of its own. Which, and
    why, is logged.

    Args:
        version: What to load.
        folder: The files of its logged model.
        dtype: Type of the frozen weights.
        device: Where to hold it.
        limits: How much an engine may take on; versions on one base share it.
        vllm: Where vLLM is, and what it serves; without it nothing goes there.

    Raises:
        ModelError: If the base model is not the one the version was trained on.
    """
    from regraft.models import load_tokenizer, pick_device, resolve_trained_on
    from serving.engines.static import StaticEngine

    base = resolve_trained_on(version.base_model, version.base_revision, version.served_id)
    method, where = parse_method(version.method), pick_device(device)
    if vllm is not None and vllm.python is not None:
        served = _on_vllm(version, method, base, folder, dtype, where, limits, vllm)
        if isinstance(served, Engine):
            logger.info("%s is served by vLLM", version.served_id)
            return served
        logger.info("%s is not served by vLLM: %s", version.served_id, served)
    found = _in_slots(method, base, folder, dtype, where, limits)
    if isinstance(found, Engine):
        logger.info("%s is served in slots of the base it shares", version.served_id)
        return found
    logger.info("%s is served by the static engine: %s", version.served_id, found)
    model = method.load(base.path, folder, dtype, where)
    return StaticEngine(model, load_tokenizer(base.path), limits)


def _on_vllm(
    version: ModelVersion,
    method: Method,
    base: ResolvedModel,
    folder: Path,
    dtype: DTypeName,
    device: str,
    limits: EngineLimits,
    section: VllmSection,
) -> Engine | str:
    """The version on a vLLM server, or why not."""
    from serving.engines.vllm import VllmEngine, VllmServer
    from serving.engines.vllm_support import NotForVllmError, vllm_serves, vllm_takes

    if why := vllm_serves(method):
        return why
    takes = vllm_takes(method)
    wanted = ("plain", "lora") if device.startswith("cuda") else ("plain",)
    if takes not in (wanted if section.serves == "auto" else section.serves):
        return f"serve.vllm.serves is {section.serves!r}, which leaves {takes} on {device} to this project"
    model = folder if method.kind == "full" else base.path
    key: Key = (str(model), dtype, device, takes)

    def start() -> VllmServer:
        log = folder.parent / f"vllm-{version.logged_model_id}.log"
        logger.info("starting vLLM for %s, which writes to %s", model, log)
        return VllmServer(
            model, base.path, section, limits, dtype=dtype, device=device, log=log, takes=takes,
            died=lambda: logger.error("vLLM for %s has ended; see %s", model, log),
        )  # fmt: skip

    server, release = _SERVERS.use(key, start)
    try:
        return VllmEngine(server, method, version.logged_model_id, folder, release)
    except NotForVllmError as error:
        release()
        return str(error)
    except BaseException:
        release()
        raise


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

    shared, release = _BASES.use(key, partial(_slots_base, load, base, limits))
    try:
        if understands(shared.base):
            adapter = read_adapter(folder, shared.base) if method.kind == "adapter" else Adapter()
            return SlotEngine(shared, adapter, release)
        why = "its base keeps more than keys and values, or asks for more than likely tokens"
    except UnmixableError as error:
        why = str(error)
    except BaseException:
        release()
        raise
    release()
    return why


def _slots_base(load: Callable[[], Any], base: ResolvedModel, limits: EngineLimits) -> SlotsBase:
    from regraft.models import load_tokenizer
    from serving.engines.slots import SlotsBase

    return SlotsBase(load(), load_tokenizer(base.path), limits)
