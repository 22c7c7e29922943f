"""What the tests of whole stages share: an experiment on a tiny random model, and a cluster of two nodes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from regraft.cluster.local import set_environment
from regraft.data.chats import write_chats
from regraft.processes import free_port
from regraft.records import Example, Message


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with regraft.yaml and data; the model answers nonsense, but everything runs."""
    folder = tmp_path_factory.mktemp("experiment")

    def chats(name: str, words: list[str]) -> None:
        rows = [
            Example(
                id=f"{name}-{i}",
                messages=(
                    Message(role="user", content=f"What is the {w} {name} number {i}?"),
                    Message(role="assistant", content=f"The {w} is {i}."),
                ),
            )
            for i, w in enumerate(words)
        ]
        write_chats(folder / "data" / f"{name}.jsonl", rows)

    chats("train", ["fee", "rate", "date", "term", "plan", "bill", "card", "bank"] * 2)
    chats("evaluation", ["meter", "outage", "credit", "notice", "office", "phone"] * 2)
    experiment = {
        "name": "tiny",
        "model": {"source": str(tiny_model), "dtype": "float32"},
        "data": {"train": "data/train.jsonl", "evaluation": "data/evaluation.jsonl"},
        "sweep": {
            "methods": [
                {"name": "zero_shot"},
                {"name": "lora", "rank": [2, 4], "learning_rate": 0.01},
                {"name": "full", "learning_rate": 0.001},
                {"name": "prompt_tuning", "virtual_tokens": 4, "learning_rate": 0.01},
            ],
            "epochs": 1,
            "tokens_per_batch": 256,
            "evaluations": 2,
            "stopping": None,
            "ray_train": ["full"],
        },
        "evaluate": {"max_new_tokens": 8, "latency_prompts": 1},
        "cluster": {"num_cpus": 2, "dashboard_port": 0},
        "tracking": {"port": 0},
        "serve": {"port": 0},
    }
    (folder / "regraft.yaml").write_text(yaml.safe_dump(experiment))
    return folder


@pytest.fixture
def variant(tiny_experiment: Path) -> Callable[..., Path]:
    """Writes the experiment under another name, with other settings of its sweep; gives the file."""

    def write(folder: Path, name: str, **sweep: object) -> Path:
        experiment = yaml.safe_load((tiny_experiment / "regraft.yaml").read_text())
        experiment["name"] = name
        experiment["sweep"] |= {"ray_train": []} if "full" not in str(sweep) else {}
        experiment["sweep"] |= sweep
        experiment["data"] = {
            "train": str(tiny_experiment / "data/train.jsonl"),
            "evaluation": str(tiny_experiment / "data/evaluation.jsonl"),
        }
        folder.mkdir(exist_ok=True)
        file = folder / "regraft.yaml"
        file.write_text(yaml.safe_dump(experiment))
        return file

    return write


def _add_node(cluster: Any, **settings: Any) -> None:
    """Add a node; again, if the machine is so busy that Ray gives up on it after its 30 seconds."""
    for left in (2, 1, 0):
        try:
            cluster.add_node(**settings)
        except Exception as error:  # Ray raises no other
            if not left or "timed out during startup" not in str(error):
                raise
        else:
            return


@pytest.fixture(scope="session")
def cluster_of_two() -> Iterator[Any]:
    """A cluster of two nodes of one core; a node that is gone is noticed soon."""
    set_environment()
    from ray.cluster_utils import Cluster

    quick = {
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 3000,
        "health_check_failure_threshold": 4,
    }
    cluster = Cluster()
    # Without the dashboard an early stop leaks the placement group of a Ray Train trial.
    _add_node(
        cluster,
        num_cpus=1,
        include_dashboard=True,
        dashboard_port=free_port(0, ""),
        _system_config=quick,
    )
    _add_node(cluster, num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def two_nodes(cluster_of_two: Any) -> Iterator[Any]:
    """The cluster, joined, with both of its nodes, whatever became of them in other tests."""
    import ray

    ray.init(address=cluster_of_two.address, log_to_driver=False, logging_level="ERROR")
    if sum(node["Alive"] for node in ray.nodes()) < 2:
        _add_node(cluster_of_two, num_cpus=1)
    yield cluster_of_two
    ray.shutdown()
