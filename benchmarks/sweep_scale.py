"""A thousand trials that only wait: what recording them in MLflow costs beside Ray Tune alone.

The baseline is Ray Tune at its best: the same waits and reports from reused actors, every configuration known
beforehand, nothing recorded. The sweep is Regraft's: it proposes, keeps its books, and records parameters,
data, curve, figures and the whole record of every trial in a real MLflow server on the same machine. With
`--callback` the same trials run with the MLflow callback that Ray Tune brings, which records less.

    python benchmarks/sweep_scale.py --quick

The last line is one JSON object; `wall_vs_tune` is the sweep's wall-clock over the baseline's, `efficiency`
the trials' own waiting over wall-clock times slots.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from regraft.records import EvalReport, ExampleScore, LossPoint, TrialResult
from regraft.training.attempt import Attempt

EXAMPLE = Path(__file__).parents[1] / "examples/utility-support"
POINTS = 3


def main() -> None:
    """Run both, print the table and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="shorter trials: under five minutes on two cores")
    words.add_argument("--trials", type=int, default=1000)
    words.add_argument("--slots", type=int, default=8, help="trials at once")
    words.add_argument("--seconds", type=float, help="that a trial waits; 2, with --quick 0.9")
    words.add_argument("--callback", action="store_true", help="also Tune with its own MLflow callback")
    settings = words.parse_args()
    seconds = settings.seconds or (0.9 if settings.quick else 2.0)
    os.environ["REGRAFT_BENCH_SECONDS"] = str(seconds)
    from regraft.cluster.local import set_environment, start_local_ray, stop_local_ray
    from regraft.tracking.server import start_server, stop_server

    set_environment()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = start_server(folder / "mlflow", "127.0.0.1", 0)
        cluster = start_local_ray(
            folder / "ray", num_cpus=settings.slots, num_gpus=None, dashboard_port=0,
            environment={"REGRAFT_BENCH_SECONDS": str(seconds)},
        )  # fmt: skip
        try:
            import ray

            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
            runs = {"tune": partial(tune_alone, settings.trials, seconds, str(folder))}
            if settings.callback:
                runs["tune with its callback"] = partial(
                    tune_alone, settings.trials, seconds, str(folder), uri=server.url
                )
            runs["regraft"] = partial(regraft, settings.trials, server.url, folder)
            for what, run in runs.items():
                began = time.monotonic()
                run()
                found[what] = time.monotonic() - began
                say(f"{what:24} {found[what]:8.1f} s")
            counted = check(server.url, settings.trials)
            ray.shutdown()
        finally:
            stop_local_ray(cluster.pid)
            stop_server(server.pid)
    waiting = settings.trials * seconds / settings.slots
    say(f"{'waiting alone':24} {waiting:8.1f} s")
    summary = {
        "wall_vs_tune": round(found["regraft"] / found["tune"], 3),
        "overhead_s_per_trial": round((found["regraft"] - found["tune"]) / settings.trials, 4),
        "efficiency": round(waiting / found["regraft"], 3),
        "tune_s": round(found["tune"], 1),
        "regraft_s": round(found["regraft"], 1),
        "trials": settings.trials,
        "recorded": counted,
        "slots": settings.slots,
        "seconds": seconds,
    }
    if settings.callback:
        summary["callback_vs_tune"] = round(found["tune with its callback"] / found["tune"], 3)
    sys.stdout.write(json.dumps(summary) + "\n")


def waits(config: dict[str, Any]) -> None:
    """A trial of Ray Tune's."""
    from ray import tune

    for point in range(1, POINTS + 1):
        time.sleep(config["seconds"] / POINTS)
        tune.report({"eval_loss": 1.0 / point + config["rate"], "point": point})


def tune_alone(trials: int, seconds: float, storage: str, uri: str = "") -> None:
    """The baseline."""
    from ray import tune

    callbacks = []
    if uri:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks = [MLflowLoggerCallback(tracking_uri=uri, experiment_name="callback")]
    rates = [1e-5 * (1 + i) for i in range(trials)]
    found = tune.Tuner(
        tune.with_resources(waits, {"CPU": 1}),
        param_space={"rate": tune.grid_search(rates), "seconds": seconds},
        tune_config=tune.TuneConfig(metric="eval_loss", mode="min", reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"scale-{bool(uri)}", storage_path=storage, verbose=0, callbacks=callbacks
        ),
    ).fit()
    if len(found) != trials or found.num_errors:
        raise RuntimeError(f"{len(found)} trials, {found.num_errors} failed")


class Waits(Attempt):
    """Between start and record, waits as often and as long."""

    def go(self) -> TrialResult:
        """Report made-up points, and give a made-up record."""
        seconds, rate = float(os.environ["REGRAFT_BENCH_SECONDS"]), self.spec.parsed.learning_rate
        for point in range(1, POINTS + 1):
            time.sleep(seconds / POINTS)
            loss = 1.0 / point + rate
            self._on_point(
                LossPoint(
                    step=point, tokens_seen=1000 * point, train_loss=loss, eval_loss=loss, learning_rate=rate
                )
            )
        examples = tuple(
            ExampleScore(
                example_id=str(i), prompt=f"question {i}", reference=f"answer {i}", output=f"answer {i + 1}",
                scores={"rougeL": ((i * 37) % 10) / 10},
            )
            for i in range(20)
        )  # fmt: skip
        report = EvalReport(
            dataset_id=self.spec.dataset_id,
            split="evaluation",
            metric_versions={"rougeL": 1},
            examples=examples,
        )
        return self.result("completed").model_copy(update={"report": report})


def regraft(trials: int, uri: str, folder: Path) -> None:
    """The sweep."""
    from regraft.config import Experiment
    from regraft.data.dataset import load_dataset
    from regraft.tuning.sweep import run_sweep

    experiment = Experiment.model_validate(
        {
            "name": "scale",
            "model": {"source": "bundled:smollm2-135m-instruct", "device": "cpu"},
            "data": {
                "train": [str(EXAMPLE / "data/train.jsonl")],
                "evaluation": {"all": str(EXAMPLE / "data/evaluation.jsonl")},
            },
            "sweep": {
                "methods": [
                    {"name": "lora", "learning_rate": [round(1e-5 * (1 + i), 6) for i in range(trials)]}
                ],
                "evaluations": POINTS, "stopping": None,
            },
        }
    )  # fmt: skip
    dataset = load_dataset(experiment.name, experiment.data)
    swept = run_sweep(
        experiment, dataset, tracking_uri=uri, storage=str(folder), say=lambda _: None, work=Waits
    )
    completed = sum(r.status == "completed" for r in swept.results)
    if completed != trials:
        raise RuntimeError(f"{completed} of {trials} trials completed")


def check(uri: str, trials: int) -> int:
    """How many trials stand in MLflow with their record; all of them, or the benchmark is void."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    where = client.get_experiment_by_name("scale")
    runs, token = [], None
    while True:
        page = client.search_runs(
            [where.experiment_id], "tags.role = 'trial' AND attributes.status = 'FINISHED'", page_token=token
        )
        runs += list(page)
        if not (token := page.token):
            break
    for run in (runs[0], runs[-1]):
        if len(client.get_metric_history(run.info.run_id, "eval/loss")) != POINTS + 1:
            raise RuntimeError("a curve is not whole")
        if "trial_result.json" not in {f.path for f in client.list_artifacts(run.info.run_id)}:
            raise RuntimeError("a record is missing")
    if len(runs) != trials:
        raise RuntimeError(f"{len(runs)} of {trials} trials are recorded")
    return len(runs)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
