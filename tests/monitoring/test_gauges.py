from __future__ import annotations

import socket
import urllib.request

import pytest
from made import QUALITY, decision, report, stream
from prometheus_client.parser import text_string_to_metric_families

from monitoring.gauges import Gauges
from monitoring.timeline import metric_points
from regraft.errors import ConfigError, ServiceError

Series = dict[tuple[str, tuple[str, ...]], float]


def scrape(port: int) -> Series:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return parsed(answer.read().decode())


def parsed(text: str) -> Series:
    """Values by name and label values, the model's left out."""
    return {
        (s.name, tuple(v for k, v in sorted(s.labels.items()) if k != "model")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_a_scrape_shows_the_last_check_and_counts_all():
    gauges = Gauges()
    port = gauges.serve()
    assert scrape(port) == {}
    checks = stream([0.5, 1e-4, 1e-4, 1e-4], quality=QUALITY)
    for check in checks:
        gauges.update(check, decision(check, "collect" if check.alarms else "watch"), at=1000.0)
    gauges.failed("shop", 3)
    gauges.failed("shop")
    found = scrape(port)
    assert found[("regraft_drift_p_value", ("3",))] == 1e-4
    assert found[("regraft_drift_effect", ("3",))] == 0.21
    assert found[("regraft_drift_window_rows", ("3",))] == 200
    assert found[("regraft_drift_last_check_timestamp_seconds", ("3",))] == 1000.0
    assert found[("regraft_drift_evidence", ("drift", "3"))] == checks[-1].evidence["drift"].value
    assert found[("regraft_drift_alarm", ("drift", "3"))] == 1
    verdicts = {labels[0]: v for (name, labels), v in found.items() if name == "regraft_drift_last_verdict"}
    assert verdicts == {"drift": 1, "stable": 0, "suspected": 0, "insufficient": 0}
    assert found[("regraft_quality", ("refusal_rate", "3"))] == 0.2
    assert found[("regraft_quality_reference", ("feedback_score", "3"))] == 0.4
    assert ("regraft_quality", ("feedback_score", "3")) not in found
    assert found[("regraft_monitor_checks_total", ("drift", "3"))] == 2
    assert found[("regraft_monitor_checks_total", ("stable", "3"))] == 2
    assert found[("regraft_monitor_decisions_total", ("collect", "3"))] == 2
    assert found[("regraft_monitor_failures_total", ("3",))] == 1
    assert found[("regraft_monitor_failures_total", ("",))] == 1


def test_an_alarm_goes_with_the_version_that_raised_it():
    gauges = Gauges()
    gauges.update(stream([1e-4] * 4)[-1])
    gauges.update(report(9, None, 0.5, model_version=4, p_value=None, effect=None, status="insufficient"))
    gauges.update(report(9, None, 0.5, model="other"))
    port = gauges.serve()
    found = scrape(port)
    assert {labels[-1] for (name, labels) in found if name == "regraft_drift_alarm"} == {"3", "4"}
    assert [v for (name, _), v in found.items() if name == "regraft_drift_alarm"] == [0, 0]
    assert ("regraft_drift_p_value", ("4",)) not in found
    # What was counted stays: a counter that vanishes looks like one that began again.
    assert found[("regraft_monitor_checks_total", ("drift", "3"))] == 1


def test_the_file_holds_the_gauges_and_no_counter(tmp_path):
    gauges = Gauges()
    gauges.update(report(), decision(report()))
    path = tmp_path / "deep" / "regraft.prom"
    gauges.write(path)
    gauges.write(path)
    found = parsed(path.read_text())
    assert found[("regraft_drift_last_verdict", ("stable", "3"))] == 1
    assert not [name for name, _ in found if name.endswith("_total")]
    assert [file.name for file in path.parent.iterdir()] == ["regraft.prom"]
    with pytest.raises(ConfigError, match=r"monitor\.metrics_file: regraft\.txt does not end in \.prom"):
        gauges.write(tmp_path / "regraft.txt")


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ServiceError, match=rf"monitor\.metrics_port: cannot listen on 127\.0\.0\.1:{port}"
        ):
            Gauges().serve(port=port)


def test_points_of_a_check_lie_where_its_window_ended_however_often_they_are_made():
    first, second = stream([0.5, 0.2], quality=QUALITY)
    points = {p.name: p for p in metric_points(second)}
    assert metric_points(second) == metric_points(second)
    assert points["drift/p_value"].value == 0.2
    assert points["drift/evidence"].value == second.evidence["drift"].value
    assert points["drift/alarm"].value == 0
    assert points["quality/refusal_rate"].value == 0.2
    assert points["quality/refusal_rate_reference"].value == 0.02
    assert "quality/feedback_score" not in points
    assert {p.step - q.step for p in metric_points(second) for q in metric_points(first)} == {60}
    assert points["drift/effect"].timestamp_ms == points["drift/effect"].step * 60_000
    assert metric_points(second.model_copy(update={"window_end": ""})) == ()
