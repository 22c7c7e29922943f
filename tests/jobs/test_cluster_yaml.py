"""The cluster launcher's file, held against Ray's own loader and schema."""

import copy
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def _load(text: str) -> dict:
    full = prepare_config(copy.deepcopy(yaml.safe_load(text)))
    validate_config(full)
    return full


def test_ray_accepts_the_cluster_file():
    full = _load(CLUSTER.read_text())
    assert full["available_node_types"]["gpu_worker"]["resources"]["GPU"] == 1
    assert "--autoscaling-config" in " ".join(full["head_start_ray_commands"])
    assert full["available_node_types"]["head"]["resources"]["CPU"] == 0


def test_the_dashboard_is_on_and_stays_on_loopback():
    start = " ".join(_load(CLUSTER.read_text())["head_start_ray_commands"])
    assert "--include-dashboard=true" in start
    assert "--dashboard-host=127.0.0.1" in start


def test_ray_refuses_a_misspelt_key():
    with pytest.raises(Exception, match="idle_timeout_minute"):
        _load(CLUSTER.read_text().replace("idle_timeout_minutes", "idle_timeout_minute"))
