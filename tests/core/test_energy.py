"""Joules from counters that come round, that may not be read, or that are not there."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regraft.energy import WATTS_PER_CORE, EnergyMeter


def zone(root: Path, folder: str, name: str, microjoules: int, around: int = 1_000_000_000) -> Path:
    made = root / folder
    made.mkdir(parents=True, exist_ok=True)
    (made / "name").write_text(name + "\n")
    (made / "max_energy_range_uj").write_text(f"{around}\n")
    set_to(made, microjoules)
    return made


def set_to(folder: Path, microjoules: int) -> None:
    (folder / "energy_uj").write_text(f"{microjoules}\n")


def test_packages_and_memory_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    (tmp_path / "intel-rapl").mkdir()  # the kernel's control folder, which counts nothing
    with EnergyMeter(powercap=tmp_path) as meter:
        set_to(first, 8_000_000)
        set_to(second, 1_500_000)
        set_to(memory, 250_100)
        for other in others:
            set_to(other, 900_000_000)
        assert meter.so_far().joules == pytest.approx(4.75)
        set_to(first, 9_000_000)
    found = meter.so_far()
    assert found.joules == pytest.approx(5.75)
    assert found.watt_hours == pytest.approx(5.75 / 3600)
    assert found.how.startswith("measured: RAPL")
    assert all(name in found.how for name in ("package-0", "package-1", "dram", "whole machine"))
    set_to(first, 99_000_000)
    assert meter.so_far() == found  # it has stopped


def test_counter_that_comes_round_goes_on_counting(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, around=10_000_000)
    with EnergyMeter(powercap=tmp_path) as meter:
        set_to(package, 2_000_000)
        assert meter.so_far().joules == pytest.approx(3.0)
        set_to(package, 1_000_000)
    assert meter.so_far().joules == pytest.approx(12.0)


def test_without_counters_it_is_an_estimate_that_says_so(tmp_path: Path) -> None:
    with EnergyMeter(powercap=tmp_path) as meter:
        before = time.process_time()
        while time.process_time() - before < 0.02:
            pass
        used = time.process_time() - before
    found = meter.so_far()
    assert found.joules is not None
    assert found.joules >= used * WATTS_PER_CORE > 0
    assert found.how.startswith("estimated: CPU-seconds of this process")
    assert f"{WATTS_PER_CORE:g} W" in found.how
    assert str(tmp_path) in found.how


def test_counters_that_may_not_be_read_give_an_estimate_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    read = Path.read_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:  # a chmod does not stop a test run by root
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with EnergyMeter(powercap=tmp_path) as meter:
        pass
    found = meter.so_far()
    assert found.how.startswith("estimated:")
    assert "administrator" in found.how


def test_counter_that_goes_away_leaves_no_figure(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMeter(powercap=tmp_path) as meter:
        set_to(package, 5_000_000)
        assert meter.so_far().joules == pytest.approx(5.0)
        (package / "energy_uj").unlink()
    found = meter.so_far()
    assert found.joules is None
    assert found.watt_hours is None
    assert found.how.startswith("not counted:")


class Library:
    """NVML as far as it is asked, with the status codes of a card that has a counter, or a limit, or neither."""

    def __init__(self, counter: int = 0, limit: int = 0, known: int = 0) -> None:
        self.codes, self.millijoules = (counter, limit, known), 7_000
        self.asked: bytes = b""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, _: Any) -> int:
        self.asked = uuid
        return self.codes[2]

    def nvmlDeviceGetTotalEnergyConsumption(self, _: Any, into: Any) -> int:
        ctypes.cast(into, ctypes.POINTER(ctypes.c_ulonglong)).contents.value = self.millijoules
        return self.codes[0]

    def nvmlDeviceGetEnforcedPowerLimit(self, _: Any, into: Any) -> int:
        ctypes.cast(into, ctypes.POINTER(ctypes.c_uint)).contents.value = 350_000
        return self.codes[1]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="A card", uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def test_cuda_device_is_counted_beside_the_processor(card: None, tmp_path: Path) -> None:
    package, library = zone(tmp_path, "intel-rapl:0", "package-0", 0), Library()
    with EnergyMeter("cuda:0", powercap=tmp_path, nvml=library) as meter:
        library.millijoules += 40_000
        set_to(package, 2_000_000)
    found = meter.so_far()
    assert found.joules == pytest.approx(42.0)
    assert "NVML counter of A card" in found.how
    assert "RAPL" in found.how
    assert library.asked == b"GPU-1234"


def test_card_without_a_counter_is_estimated_by_its_power_limit(card: None, tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMeter("cuda", powercap=tmp_path, nvml=Library(counter=3)) as meter:
        set_to(package, 0)
    found = meter.so_far()
    assert found.joules is not None
    assert found.joules >= 350 * found.seconds > 0  # the card is read just before and just after
    assert "estimated: seconds times the power limit of A card, 350 W" in found.how


@pytest.mark.parametrize("library", [Library(counter=3, limit=3), Library(known=6)], ids=["mute", "unknown"])
def test_card_that_says_nothing_leaves_no_figure(card: None, tmp_path: Path, library: Library) -> None:
    with EnergyMeter("cuda", powercap=tmp_path, nvml=library) as meter:
        pass
    assert meter.so_far().joules is None
    assert "not counted: A card" in meter.so_far().how
