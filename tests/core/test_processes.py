"""Local services: their ports, their start and their end, with real processes."""

import socket
import subprocess
import sys

import psutil
import pytest

from regraft.errors import ServiceError
from regraft.processes import end_process, free_port, wait_until_it_answers, with_large_pages

PARENT_OF_ONE = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
{then}
"""
STUBBORN = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"


def started(then: str) -> tuple[subprocess.Popen, psutil.Process]:
    """A process in a group of its own, and a child of it that ignores a polite end."""
    code = PARENT_OF_ONE.format(child=STUBBORN, then=then)
    head = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert head.stdout is not None
    return head, psutil.Process(int(head.stdout.readline()))


def test_a_port_in_use_is_refused_by_number_and_field():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} on 127.0.0.1 .* in use\n  mend: .*serve\.port"):
            free_port(port, "serve.port")


def test_a_host_that_is_not_this_machines_is_refused():
    with pytest.raises(ServiceError, match=r"cannot listen on 192\.0\.2\.1"):  # a documentation address
        free_port(0, "serve.port", "192.0.2.1")


def test_a_free_port_lies_below_what_the_system_hands_out_by_itself():
    assert 20000 <= free_port(0, "") < 32000


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr("regraft.processes._END_SECONDS", 0.5)


def test_the_end_of_a_process_is_the_end_of_its_children(short_patience):
    head, child = started("signal.pause()")
    end_process(head.pid)
    assert head.poll() is not None
    assert not child.is_running()


def test_a_child_whose_parent_died_first_is_ended_too(short_patience):
    head, child = started("")
    head.wait()
    assert child.is_running()
    end_process(head.pid)
    assert not child.is_running()


def test_a_process_of_another_name_is_left_alone():
    bystander = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        end_process(bystander.pid, named="mlflow")
        assert bystander.poll() is None
    finally:
        bystander.communicate()


def test_a_service_that_dies_while_starting_shows_the_end_of_its_log(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", "print('no such database'); raise SystemExit(3)"], stdout=stream
        )
    with pytest.raises(ServiceError, match=r"Thing ended with status 3(?s:.*)no such database"):
        wait_until_it_answers("Thing", process, "http://x", log, lambda: "not yet", seconds=60)


def test_waiting_ends_with_the_first_answer_or_the_time(tmp_path):
    log = tmp_path / "log"
    log.touch()
    answers = iter(["refused", "refused", ""])
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        wait_until_it_answers("Thing", process, "http://x", log, lambda: next(answers), seconds=60)
        with pytest.raises(ServiceError, match="did not answer at http://x within 0 s"):
            wait_until_it_answers("Thing", process, "http://x", log, lambda: "refused", seconds=0)
        process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.perturb=3", "glibc.malloc.perturb=3:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
    ids=str,
)
def test_settings_of_memory_that_somebody_made_are_kept(made: str | None, expected: str) -> None:
    given = {"PATH": "/bin", **({"GLIBC_TUNABLES": made} if made else {})}
    found = with_large_pages(given)
    assert found == {"PATH": "/bin", "GLIBC_TUNABLES": expected, "MALLOC_ARENA_MAX": "1"}
    assert with_large_pages(found) == found
