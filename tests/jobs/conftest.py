"""What the tests of whole stages share: an experiment on a tiny random model."""

from pathlib import Path

import pytest
import yaml

from regraft.data.chats import write_chats
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
