"""Joules of a stretch of work: from the machine's counters where they can be read, else by an estimate.

Counters belong to a machine or a card, not to a process: what else ran there is in them. Every figure comes
with a sentence that says what was counted or assumed. Memory (unless it has a counter), disks, cooling and
the power supply's losses are in no figure.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

#: Watts of a busy core, where there is no counter: thermal design power by core of server processors, which
#: is 6.3 for Intel's Xeon Platinum 8480+ (350 W, 56 cores), 4.4 for AMD's EPYC 7763 (280 W, 64 cores) and 3.8
#: for the EPYC 9654 (360 W, 96 cores).
WATTS_PER_CORE = 5.0
#: RAPL counters start again after some 65 kJ or more: three minutes of the largest machines.
_SAMPLE_SECONDS = 30.0
_POWERCAP = Path("/sys/class/powercap")


class Energy(NamedTuple):
    """Joules of some seconds, and how they were measured or estimated; None if a part can be neither."""

    joules: float | None
    seconds: float
    how: str

    @property
    def watt_hours(self) -> float | None:
        """The same in Wh."""
        return None if self.joules is None else self.joules / 3600


class EnergyMeter:
    """Counts from `start`, or from entering it as a context, until `stop`; `so_far` reads it meanwhile.

    Args:
        device: Where the work is done: `cpu`, or a CUDA device, which is counted beside the processor.
        powercap: Folder of the RAPL counters.
        nvml: NVIDIA's management library; it is looked for if not given.
    """

    def __init__(self, device: str = "cpu", *, powercap: Path = _POWERCAP, nvml: Any = None) -> None:
        self._parts: list[_Rapl | _Cores | _Card] = []
        if device.startswith("cuda"):
            self._parts.append(_Card(device, nvml))
        self._parts.append(_processor(powercap))
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._joules = [0.0] * len(self._parts)
        self._began = self._seconds = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to count."""
        for part in self._parts:
            part.joules()  # from here
        self._began = time.monotonic()
        threading.Thread(target=self._sample, name="regraft-energy", daemon=True).start()

    def so_far(self) -> Energy:
        """What was used since the start, or between start and stop."""
        with self._lock:
            if not self._stopped.is_set():
                self._seconds = time.monotonic() - self._began
                for index, part in enumerate(self._parts):
                    try:
                        self._joules[index] += part.joules()
                    except (OSError, ValueError, RuntimeError) as error:  # work goes on without the figure
                        part.known, part.how = False, f"not counted: {error}"
            known = all(part.known for part in self._parts)
            how = "; ".join(part.how for part in self._parts)
            return Energy(sum(self._joules) if known else None, self._seconds, how)

    def stop(self) -> Energy:
        """Count no further; gives what was used."""
        found = self.so_far()
        self._stopped.set()
        return found

    def _sample(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self.so_far()


class _Cores:
    """The estimate for a processor without counters."""

    known = True

    def __init__(self, why: str) -> None:
        self.how = (
            f"estimated: CPU-seconds of this process times {WATTS_PER_CORE:g} W a core, the design power of "
            f"common servers; {why}"
        )
        self._last = time.process_time()

    def joules(self) -> float:
        """Since the last call."""
        now = time.process_time()
        before, self._last = self._last, now
        return (now - before) * WATTS_PER_CORE


class _Rapl:
    """The processor's own counters, in microjoules, of packages and of memory that has one beside them."""

    known = True

    def __init__(self, counters: list[Path]) -> None:
        self._counters = counters
        self._last = [_number(folder / "energy_uj") for folder in counters]
        self._range = [_number(folder / "max_energy_range_uj") for folder in counters]
        names = ", ".join(_name(folder) for folder in counters)
        self.how = f"measured: RAPL counters {names}, of the whole machine and not of this process alone"

    def joules(self) -> float:
        """Since the last call, of which there must be one before a counter comes round twice."""
        now = [_number(folder / "energy_uj") for folder in self._counters]
        last, self._last = self._last, now
        used = (
            new - old if new >= old else new + around - old
            for new, old, around in zip(now, last, self._range, strict=True)
        )
        return sum(used) / 1e6


def _processor(powercap: Path) -> _Rapl | _Cores:
    """Counters of the processor if they can be read, else the estimate."""
    # Cores and graphics are parts of their package, `psys` holds all packages, and `intel-rapl-mmio` shows
    # the same package again. Memory is a part of nothing.
    folders = sorted(f for f in powercap.glob("*rapl*:*") if not f.name.startswith("intel-rapl-mmio"))
    try:
        counters = [f for f in folders if _name(f).startswith(("package", "dram"))]
        if not any(_name(f).startswith("package") for f in counters):
            return _Cores(f"there are no RAPL counters in {powercap}")
        return _Rapl(counters)
    except PermissionError:
        return _Cores(f"the RAPL counters in {powercap} are readable by an administrator alone")
    except (OSError, ValueError) as error:
        return _Cores(f"the RAPL counters in {powercap} cannot be read: {error}")


def _number(file: Path) -> int:
    return int(file.read_text())


def _name(folder: Path) -> str:
    return (folder / "name").read_text().strip()


class _Card:
    """A CUDA device: its counter, else the time by its power limit."""

    def __init__(self, device: str, nvml: Any) -> None:
        self._read: Callable[[], float] = lambda: 0.0
        self._last, self.known = 0.0, True
        name, found = _nvml_handle(device, nvml)
        if found is None:
            self.known = False
            self.how = f"not counted: {name}, as NVIDIA's management library cannot be asked"
            return
        library, handle = found
        milli = ctypes.c_ulonglong()
        limit = ctypes.c_uint()
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(milli)) == 0:
            self._read = lambda: _energy(library, handle)
            self.how = f"measured: NVML counter of {name}, of the whole card and not of this process alone"
        elif library.nvmlDeviceGetEnforcedPowerLimit(handle, ctypes.byref(limit)) == 0:
            watts = limit.value / 1000
            self._read = lambda: time.monotonic() * watts
            self.how = f"estimated: seconds times the power limit of {name}, {watts:g} W; it has no counter"
        else:
            self.known = False
            self.how = f"not counted: {name}, which has neither a counter nor a power limit"
        self._last = self._read()

    def joules(self) -> float:
        """Since the last call."""
        now = self._read()
        before, self._last = self._last, now
        return now - before


def _energy(library: Any, handle: Any) -> float:
    """Joules since the driver was loaded.

    Raises:
        RuntimeError: If the card no longer answers.
    """
    milli = ctypes.c_ulonglong()
    if code := library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(milli)):
        raise RuntimeError(f"NVML: the energy counter cannot be read any more, error {code}")
    return milli.value / 1000


def _nvml_handle(device: str, library: Any) -> tuple[str, tuple[Any, Any] | None]:
    """A device's name, and NVML with its handle of it; None if there is no NVML, or it knows it not."""
    import torch

    found = torch.cuda.get_device_properties(torch.device(device))
    handle = ctypes.c_void_p()
    try:
        library = library or ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return found.name, None
    # By its UUID: CUDA counts the devices that a process may see, NVML counts them all.
    uuid = f"GPU-{found.uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return found.name, None
    return found.name, (library, handle)
