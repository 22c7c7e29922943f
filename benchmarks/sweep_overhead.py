"""What a sweep costs beyond training: each trial's wall-clock beside the same trial alone in one process.

The baseline runs the very trials one after another in this process, with a warm base and nothing recorded:
training, scoring and the timing of answers. The sweep runs them through Ray Tune and records them in MLflow;
its first trial, which finds a cold node, is shown apart. Then the same for trials in Ray Train, against their
own baseline. One trial runs at a time, on one core.

    python benchmarks/sweep_overhead.py --quick

The last line is one JSON object; `efficiency` is the sum of the baseline's times over the sweep's wall-clock.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples/utility-support"


def main() -> None:
    """Measure both kinds of trial and print the table and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="fewer trials: under five minutes on two cores")
    words.add_argument("--trials", type=int, help="inline trials; 12, with --quick 5")
    words.add_argument("--train-trials", type=int, help="trials in Ray Train; 5, with --quick 3")
    words.add_argument("--model", default="bundled:smollm2-135m-instruct", help="as in regraft.yaml")
    settings = words.parse_args()
    inline = settings.trials or (5 if settings.quick else 12)
    train = settings.train_trials or (3 if settings.quick else 5)
    from regraft.cluster.local import set_environment, start_local_ray, stop_local_ray
    from regraft.tracking.server import start_server, stop_server

    set_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = start_server(folder / "mlflow", "127.0.0.1", 0)
        cluster = start_local_ray(
            folder / "ray", num_cpus=2, num_gpus=None, dashboard_port=0,
            environment={"MLFLOW_TRACKING_URI": server.url},
        )  # fmt: skip
        try:
            import ray

            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            found = {
                kind: compare(kind, count, settings.model, server.url, folder)
                for kind, count in (("inline", inline), ("ray_train", train))
            }
            ray.shutdown()
        finally:
            stop_local_ray(cluster.pid)
            stop_server(server.pid)
    say(f"{'':10} {'alone s':>8} {'in the sweep s':>15} {'overhead s':>11} {'first s':>8} {'efficiency':>11}")
    for kind, row in found.items():
        say(
            f"{kind:10} {row['alone']:8.2f} {row['swept']:15.2f} {row['overhead']:11.2f} "
            f"{row['first']:8.1f} {row['efficiency']:11.0%}"
        )
    summary = {
        "overhead_s_per_trial": round(found["inline"]["overhead"], 3),
        "overhead_s_per_train_trial": round(found["ray_train"]["overhead"], 3),
        "efficiency": round(found["inline"]["efficiency"], 3),
        "first_trial_s": round(found["inline"]["first"], 2),
        "trials": inline,
        "train_trials": train,
    }
    sys.stdout.write(json.dumps(summary) + "\n")


def compare(kind: str, count: int, model: str, uri: str, folder: Path) -> dict[str, float]:
    """Mean seconds of a trial alone and in a sweep."""
    from regraft.config import Experiment
    from regraft.data.dataset import load_dataset
    from regraft.models import resolve
    from regraft.tuning.plan import plan_sweep
    from regraft.tuning.sweep import run_sweep

    rates = [round(1e-3 * (1 + i / 10), 6) for i in range(count)]
    experiment = Experiment.model_validate(
        {
            "name": f"overhead-{kind}",
            "model": {"source": model},
            "data": {
                "train": [str(EXAMPLE / "data/train.jsonl")],
                "evaluation": {"all": str(EXAMPLE / "data/evaluation.jsonl")},
            },
            "sweep": {
                "methods": [{"name": "lora", "rank": 8, "learning_rate": rates}],
                "epochs": 0.1, "tokens_per_batch": 512, "evaluations": 2, "loss_examples": 8,
                "stopping": None, "max_concurrent": 1, "ray_train": ["lora"] if kind == "ray_train" else [],
            },
            "evaluate": {"max_new_tokens": 4, "latency_prompts": 1},
        }
    )  # fmt: skip
    dataset = load_dataset(experiment.name, experiment.data)
    specs = plan_sweep(experiment, dataset, resolve(model), uri, storage=str(folder)).specs
    alone = baseline(specs, dataset)
    began = time.monotonic()
    swept = run_sweep(
        experiment, dataset, tracking_uri=uri, storage=str(folder), say=lambda line: say(f"  {line}")
    )
    wall = time.monotonic() - began
    seconds = [swept.seconds[spec.key] for spec in specs]
    warm = seconds[1:]
    return {
        "alone": statistics.fmean(alone),
        "swept": statistics.fmean(warm),
        "overhead": statistics.fmean(warm) - statistics.fmean(alone),
        "first": seconds[0],
        "efficiency": sum(alone) / wall,
    }


def baseline(specs: Any, dataset: Any) -> list[float]:
    """Seconds of each trial in this process, on one thread, after one that warms up."""
    import torch

    from regraft.training import trial as trials
    from regraft.training.candidate import BaseCache

    torch.set_num_threads(1)
    kept, trials._tracker = trials._tracker, Nowhere  # type: ignore[assignment]
    bases, times = BaseCache(), []
    try:
        for spec in (specs[0], *specs):
            began = time.monotonic()
            quiet = spec.model_copy(update={"storage": ""})
            trials.run_trial(quiet, dataset, report=lambda _: None, bases=bases)
            times.append(time.monotonic() - began)
    finally:
        trials._tracker = kept
    return times[1:]


class Nowhere:
    """Stands for the tracker and its run, and records nothing."""

    run_id = ""

    def __init__(self, *_: object) -> None:
        return

    def start_trial(self, *_: object, **__: object) -> Nowhere:
        """Itself."""
        return self

    def log_curve(self, points: object) -> None:
        """Nothing."""

    def log_adapter(self, folder: Path, **_: object) -> str:
        """Nothing."""
        return ""

    def finish(self, result: Any) -> Any:
        """The same."""
        return result


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
