"""Whether loops that are compiled on the spot may stand in for torch's operations on a CPU."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Any

import torch

from regraft.errors import ConfigError

#: Environment variable: 0 leaves everything to torch, 1 is the default.
SWITCH = "REGRAFT_KERNELS"

#: The types that loops work on, and whether they have half of fp32's bits.
HALF = {torch.bfloat16: True, torch.float32: False}

#: How far a trial may be from the module, as a share of its largest number: rounding stays below, and another
#: formula far above.
_APART = {torch.bfloat16: 0.02, torch.float32: 1e-4}

_log = logging.getLogger(__name__)


def kernels(base: Any) -> Any:
    """The module of compiled loops if it can work for this model; else None.

    Args:
        base: The transformers model.

    Raises:
        ConfigError: If the environment says neither 0 nor 1.
    """
    said = os.environ.get(SWITCH, "1")
    if said not in {"0", "1"}:
        raise ConfigError(f"{SWITCH} is {said!r}", "set it to 0 or 1")
    if said == "0" or base.device.type != "cpu" or base.dtype not in HALF:
        return None
    if find_spec("numba") is None:
        _log.info("decodes without compiled loops: numba is not installed (pip install 'regraft[fast]')")
        return None
    from serving.engines import kernels as loops

    return loops


def alike(wanted: Any, found: Any) -> bool:
    """Whether two answers are the same but for rounding."""
    wanted, found = (answer[0] if isinstance(answer, tuple) else answer for answer in (wanted, found))
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return bool((found - wanted).abs().max() <= _APART[wanted.dtype] * wanted.abs().max())
