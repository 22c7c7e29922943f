"""The Kubernetes files: what they name exists, and they agree with each other and with Regraft's own defaults."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
import typer
import yaml

from jobs.cli import app
from jobs.monitor import ALARM
from monitoring.schedule import EPOCH, due, next_tick, settling
from regraft.config import ClusterSection, MonitorSection, ServeSection

ROOT = Path(__file__).parents[2]
CLUSTER, CRON = ROOT / "deploy/raycluster.yaml", ROOT / "deploy/monitor-cronjob.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict:
    _, found = yaml.safe_load_all(CLUSTER.read_text())
    return found


@pytest.fixture(scope="module")
def cron() -> dict:
    return yaml.safe_load(CRON.read_text())


@pytest.fixture(scope="module")
def pods(cluster: dict, cron: dict) -> list[dict]:
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    return [*(g["template"]["spec"] for g in groups), cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]]


def experiment_yaml() -> dict:
    """What the comment says that regraft.yaml needs."""
    lines = re.findall(r"^#   ((?:cluster|serve): .*)$", CLUSTER.read_text(), re.MULTILINE)
    assert len(lines) == 2
    return yaml.safe_load("\n".join(lines))


def test_every_regraft_command_exists(cron: dict):
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    called = [
        container["command"],
        *(m.split() for m in re.findall(r"-- (regraft .*)$", CLUSTER.read_text(), re.M)),
    ]
    assert len(called) == 2
    for program, *words, folder in called:
        assert program == "regraft"
        command = typer.main.get_command(app)
        for word in words:
            command = command.commands[word]  # type: ignore[attr-defined]
        assert folder == "/regraft/experiment"


def test_all_run_one_image_of_this_release_with_this_ray(cluster: dict, pods: list[dict]):
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    ray = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    images = {c["image"] for pod in pods for c in pod["containers"]}
    assert images == {f"registry.example.com/regraft:{version}"}
    assert f"docker build -t {images.pop()} " in CLUSTER.read_text()
    assert cluster["spec"]["rayVersion"] == ray
    assert f"FROM rayproject/ray:{ray}-py311" in CLUSTER.read_text()


def test_what_regraft_yaml_has_to_say_is_understood_and_reachable(cluster: dict, cron: dict):
    said = experiment_yaml()
    section = ClusterSection.model_validate(said["cluster"])
    ServeSection.model_validate(said["serve"])
    ports = {
        p["name"]: p["containerPort"]
        for p in cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    head = f"{cluster['metadata']['name']}-head-svc"  # as KubeRay names it
    assert section.jobs == f"http://{head}:{ports['dashboard']}"
    assert ports["serve"] == ServeSection().port
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    env = {e["name"]: e for e in container["env"]}
    assert env["RAY_ADDRESS"]["value"] == f"ray://{head}:{ports['client']}"


def test_secrets_are_named_and_never_given(cluster: dict, pods: list[dict]):
    secret = re.compile("URI|USER|PASSWORD|TOKEN|KEY|SECRET")
    found = set()
    for pod in pods:
        for container in pod["containers"]:
            for variable in container["env"]:
                if secret.search(variable["name"]):
                    assert "value" not in variable
                    found.add((variable["name"], variable["valueFrom"]["secretKeyRef"]["name"]))
    # KubeRay keeps the token in a secret that has the cluster's name.
    assert ("RAY_AUTH_TOKEN", cluster["metadata"]["name"]) in found
    assert cluster["spec"]["authOptions"]["mode"] == "token"


def test_pods_share_the_volume_with_experiment_and_workspace(cluster: dict, pods: list[dict]):
    claim = next(iter(yaml.safe_load_all(CLUSTER.read_text())))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods:
        assert pod["volumes"] == [
            {"name": "regraft", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
        ]
        for container in pod["containers"]:
            assert container["volumeMounts"] == [{"name": "regraft", "mountPath": "/regraft"}]
            env = {e["name"]: e.get("value") for e in container["env"]}
            assert env["REGRAFT_WORKSPACE"] == "/regraft/workspace"
            assert env["REGRAFT_HOME"] == "/regraft/home"
            assert container["resources"]["limits"]["memory"]


def test_the_monitor_runs_when_a_window_is_whole_one_at_a_time_and_not_again_on_an_alarm(cron: dict):
    spec = cron["spec"]
    minute, *rest = spec["schedule"].split()
    assert rest == ["*"] * 4
    every = timedelta(seconds=MonitorSection().every_seconds)
    settle = settling(ServeSection.model_validate(experiment_yaml()["serve"]))
    tick = next_tick(EPOCH, every)
    assert due(tick - every, tick + timedelta(minutes=int(minute)), every, settle=settle)[-1] == tick
    assert spec["concurrencyPolicy"] == "Forbid"
    job = spec["jobTemplate"]["spec"]
    assert timedelta(seconds=job["activeDeadlineSeconds"]) < every
    assert timedelta(seconds=spec["startingDeadlineSeconds"]) < every
    (rule,) = [r for r in job["podFailurePolicy"]["rules"] if r["action"] == "FailJob"]
    pod = job["template"]["spec"]
    assert rule["onExitCodes"] == {
        "containerName": pod["containers"][0]["name"], "operator": "In", "values": [ALARM],
    }  # fmt: skip
    assert pod["restartPolicy"] == "Never", "a failure policy asks for it"
