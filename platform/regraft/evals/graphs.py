"""Decoding steps as CUDA graphs: recorded once, and started again as a whole.

On a GPU a step of a few rows takes as long as the launches of its many small kernels; a recorded one is
launched at once: 4.5 instead of 13.1 ms for 32 rows of a model of 1.7B parameters on an H100. A graph has
fixed shapes and reads from fixed addresses: rows and columns are filled up to sizes that repeat, what is too
much is masked, and what differs from step to step lies in tensors that stay. It knows nothing of what the
rows say; `Slots` does the step itself.

Imports torch when imported: import it where it is used.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from regraft.errors import ConfigError

if TYPE_CHECKING:
    from regraft.evals.slots import Slots

#: Environment variable: 0 turns graphs off, 1 is the default.
SWITCH = "REGRAFT_CUDA_GRAPHS"
#: Columns that a graph covers are a multiple of this.
COLUMNS = 256
#: Rows that a graph covers are a power of two up to this, and a multiple of it above.
_ROWS = 16
#: Graphs that are kept; each holds some MiB.
_KEPT = 32
#: Recording takes about two steps, and a graph saves more than half of one: so many go by before.
_STEPS_BEFORE = 2
#: How far the first recorded step may be from a plain one, as a share of the largest logit: rounding stays
#: far below, and a model that makes something else of the mask far above.
_APART = 0.1

_log = logging.getLogger(__name__)
#: Steps are recorded one at a time: on one stream.
_recording = threading.Lock()
#: Models that were tried in vain: they are not tried again.
_refused: weakref.WeakSet[Any] = weakref.WeakSet()


class PerRow(Protocol):
    """What a model's layers read for each row beside its token, such as which adapter it has."""

    @property
    def tables(self) -> object | None:
        """What all rows share; a graph is good for as long as this is the same object."""

    @property
    def places(self) -> Sequence[int]:
        """Each row's place in the tables; may be empty if there are none."""

    def reading(self, places: torch.Tensor) -> AbstractContextManager[None]:
        """While open, the layers read the rows' places from this tensor."""


class Fixed(NamedTuple):
    """A step's inputs, at addresses that stay.

    Attributes:
        rows: Rows that it covers; those beyond the slots in use are not looked at.
        columns: Columns that it covers, from the first of the buffers.
        end: The column that the step writes, of shape (1).
        used: Slots in use, of shape (1).
        tokens: Of shape (rows).
        positions: Of shape (rows).
    """

    rows: int
    columns: int
    end: torch.Tensor
    used: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor


class _Key(NamedTuple):
    tables: weakref.ref[object] | None
    rows: int
    columns: int


def wanted(base: Any) -> bool:
    """Whether a model's steps are recorded: if it is on one CUDA device and nobody has turned it off.

    Raises:
        ConfigError: If the environment says neither 0 nor 1.
    """
    said = os.environ.get(SWITCH, "1")
    if said not in {"0", "1"}:
        raise ConfigError(f"{SWITCH} is {said!r}", "set it to 0 or 1")
    if said == "0" or base.device.type != "cuda" or base in _refused:
        return False
    return len({weights.device for weights in base.parameters()}) == 1


class Graphs:
    """The recorded steps of one `Slots`. On a CPU, for tests, steps are done over in place of being recorded.

    Args:
        base: The transformers model.
        count: Slots.
        per_row: What its layers read for each row, if they do.
    """

    def __init__(self, base: Any, count: int, per_row: PerRow | None) -> None:
        self._base, self._count, self._per_row = base, count, per_row
        # Of a step: the column it writes, slots in use; then tokens, positions and places of all slots.
        self._inputs = torch.zeros(2 + 3 * count, dtype=torch.long, device=base.device)
        # Where they come from; two, as one may still be on its way when the next is written.
        self._staged = [torch.zeros(2 + 3 * count, dtype=torch.long) for _ in range(2)]
        if base.device.type == "cuda":
            self._staged = [staged.pin_memory() for staged in self._staged]
        self._logits: torch.Tensor | None = None
        #: The likeliest token of each row after the last recorded step; the next one overwrites them.
        self.likeliest = torch.zeros(count, dtype=torch.long, device=base.device)
        #: Those used last come last.
        self._graphs: dict[_Key, Callable[[], None]] = {}
        self._seen: dict[_Key, int] = {}
        self._checked = False
        #: Memory that the graphs share: a step is over before the next one begins.
        self._pool: Any = None
        #: Whether the model turned out to be one whose steps cannot be recorded.
        self.failed = False

    def step(self, slots: Slots, tokens: Sequence[int]) -> torch.Tensor | None:
        """Say a token in every row by a recorded step; see `Slots.step`.

        Returns:
            The logits, which the next step overwrites; None if this step is better done without.
        """
        key = self._key(slots)
        if key not in self._graphs:
            if key not in self._seen:
                self._forget_dead()
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= _STEPS_BEFORE:
                return None
        self._write(slots, tokens)
        try:
            graph = self._graphs.pop(key, None) or self._record(slots, key)
            if not self._checked:
                self._check(graph, slots, tokens)
        except Exception as error:  # whatever it is, a plain step tells whether the model itself is broken
            reason = next(iter(str(error).splitlines()), "")
            _log.warning("decodes without CUDA graphs: %s: %s", type(error).__name__, reason)
            _refused.add(self._base)
            self.failed = True
            self.drop()
            return None
        self._graphs[key] = graph
        graph()
        assert self._logits is not None
        return self._logits[: slots.used]

    def follow(self, slots: Slots) -> bool:
        """Have the device say in every row what the last step made likeliest, and do not wait for it.

        Returns:
            Whether it does; it cannot where that step is not recorded yet.
        """
        graph = self._graphs.get(self._key(slots)) if self._checked else None
        if graph is None:
            return False
        self._write(slots, None)
        graph()
        return True

    def drop(self) -> None:
        """Forget what was recorded: what it reads has moved."""
        self._graphs.clear()
        self._seen.clear()

    def _forget_dead(self) -> None:
        """Forget what was recorded for tables that nobody holds any more."""
        self._graphs = {k: g for k, g in self._graphs.items() if k.tables is None or k.tables() is not None}
        self._seen = {k: n for k, n in self._seen.items() if k.tables is None or k.tables() is not None}

    def _key(self, slots: Slots) -> _Key:
        tables = self._per_row.tables if self._per_row else None
        return _Key(
            None if tables is None else weakref.ref(tables),
            row_bucket(slots.used, self._count),
            -(-(slots.end + 1) // COLUMNS) * COLUMNS,
        )

    def _write(self, slots: Slots, tokens: Sequence[int] | None) -> None:
        """Put a step's inputs where graphs read them, in one copy; tokens that are not given are there."""
        places = self._per_row.places if self._per_row else ()
        values = [slots.end, slots.used]
        for some in (tokens or (), slots.positions, places):
            values += [*some, *[0] * (self._count - len(some))]
        self._staged.reverse()
        self._staged[0].copy_(torch.tensor(values))
        self._inputs.copy_(self._staged[0], non_blocking=True)
        if tokens is None:
            self._inputs[2 : 2 + self._count].copy_(self.likeliest)

    def _record(self, slots: Slots, key: _Key) -> Callable[[], None]:
        while len(self._graphs) >= _KEPT:
            self._graphs.pop(next(iter(self._graphs)))

        def run() -> None:
            self._run(slots, key)

        if self._base.device.type != "cuda":
            return run
        # A pool is no good any more when its last graph is gone.
        self._pool = self._pool if self._graphs else torch.cuda.graph_pool_handle()
        return _recorded(run, self._base.device, self._pool)

    def _run(self, slots: Slots, key: _Key) -> None:
        each = self._inputs[2:].view(3, self._count)[:, : key.rows]
        fixed = Fixed(key.rows, key.columns, self._inputs[:1], self._inputs[1:2], each[0], each[1])
        with self._per_row.reading(each[2]) if self._per_row else nullcontext():
            logits = slots.step_fixed(fixed)
        if self._logits is None:
            self._logits = logits.new_zeros(self._count, logits.shape[1])
        self._logits[: key.rows].copy_(logits)
        self.likeliest[: key.rows].copy_(logits.max(-1).indices)  # quicker than `argmax`, and the same

    def _check(self, graph: Callable[[], None], slots: Slots, tokens: Sequence[int]) -> None:
        graph()
        assert self._logits is not None
        plain = slots.step_plain(tokens)
        apart = (self._logits[: slots.used] - plain).abs().max() / plain.abs().max()
        if not apart <= _APART:
            raise RuntimeError(f"a recorded step is {apart:.2g} of the largest logit from a plain one")
        self._checked = True


def row_bucket(used: int, count: int) -> int:
    """Rows that a graph for so many slots in use covers, of so many that there are."""
    size = 1 << (used - 1).bit_length() if used <= _ROWS else -(-used // _ROWS) * _ROWS
    return min(size, count)


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """Where steps are recorded, as the usual stream cannot be; for good, as cuBLAS holds memory for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _recorded(run: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """What a function has the device do, as one launch.

    Raises:
        Exception: What the function raises when it is recorded, such as for waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    side, now = _side(device), torch.cuda.current_stream(device)
    with _recording:
        side.wait_stream(now)
        with torch.cuda.stream(side):
            run()  # what is made at first use is made now
            # Other threads may use the device meanwhile: they load adapters.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
                graph.capture_end()
            except Exception:
                with suppress(RuntimeError):  # as there was the error that is raised below
                    graph.capture_end()
                # torch (2.11) now holds its random numbers to be recorded still: until a recording ends well.
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                torch.zeros(1, device=device)
                graph.capture_end()
                raise
        now.wait_stream(side)
    return graph.replay
