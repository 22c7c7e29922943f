"""How often the gate promotes what is no better, and what is: by simulation on real per-example scores.

The scores are those of trained candidates on the bundled example, kept in `gate_scores.json`. Two candidates
give a paired difference on every example. Centred, these differences are what noise looks like where neither
is better; with a shift added, where the challenger is better by that much. Each simulated evaluation draws
examples with replacement and puts the pair before the very gate that promotes.

    python benchmarks/gate.py --quick
    python benchmarks/gate.py --collect http://127.0.0.1:5000 utility-support   # new scores, from MLflow

The last line is one JSON object: `false_promotion_rate` is over all sizes, without a difference;
`power_3_rouge_l_n200` the share promoted of challengers that are 3 points of ROUGE-L better, at 200 examples;
`false_promotion_rate_best_of_many_…` of the best of seven that are no better, judged by the examples that it
was chosen by, and by unseen ones, as Regraft does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np

from regraft.records import EvalReport, ExampleScore
from regraft.selection.gate import Candidate, Rules, judge

SCORES = Path(__file__).parent / "gate_scores.json"
SIZES, EFFECTS = (50, 100, 200, 400), (0.0, 0.01, 0.02, 0.03, 0.05)
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def main() -> None:
    """Simulate, print the table and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument(
        "--quick", action="store_true", help="fewer simulations: under five minutes on two cores"
    )
    words.add_argument("--simulations", type=int, help="of each cell; 2000, with --quick 1000")
    words.add_argument("--level", type=float, default=0.95, help="select.confidence")
    words.add_argument(
        "--collect", nargs=2, metavar=("URI", "EXPERIMENT"), help="keep an experiment's scores"
    )
    settings = words.parse_args()
    if settings.collect:
        collect(*settings.collect)
        return
    count = settings.simulations or (1000 if settings.quick else 2000)
    pairs = read_pairs()
    spread = float(np.mean([np.std(after - before) for before, after in pairs]))
    say(f"{len(pairs)} pairs of candidates, paired differences of {spread:.3f} standard deviation on average")
    say(f"share promoted of {count} challengers a cell, by examples and true advantage in ROUGE-L:")
    say(f"{'examples':>9}" + "".join(f"{effect:+9.2f}" for effect in EFFECTS))
    table: dict[tuple[int, float], float] = {}
    for size in SIZES:
        for effect in EFFECTS:
            rng = np.random.default_rng([size, round(effect * 1000)])
            hits = sum(
                simulate(pairs[rng.integers(len(pairs))], size, effect, rng, settings.level)
                for _ in range(count)
            )
            table[size, effect] = hits / count
        say(f"{size:9d}" + "".join(f"{table[size, effect]:9.1%}" for effect in EFFECTS))
    say(
        "share promoted of the best of all candidates, none better than the incumbent, judged by the examples"
    )
    say("that it was chosen by, and by others:")
    same, unseen = [], []
    for size in SIZES:
        rng = np.random.default_rng([size, 8])
        found = [chosen(rng, size, settings.level) for _ in range(count)]
        same.append(float(np.mean([by_same for by_same, _ in found])))
        unseen.append(float(np.mean([by_others for _, by_others in found])))
        say(f"{size:9d}{same[-1]:9.1%}{unseen[-1]:9.1%}")
    summary = {
        "false_promotion_rate": round(float(np.mean([table[size, 0.0] for size in SIZES])), 4),
        "power_3_rouge_l_n200": table[200, 0.03],
        "false_promotion_rate_best_of_many_same_examples": round(float(np.mean(same)), 4),
        "false_promotion_rate_best_of_many_unseen_examples": round(float(np.mean(unseen)), 4),
        "pairs": len(pairs),
        "spread": round(spread, 4),
        "simulations": count,
        "level": settings.level,
    }
    sys.stdout.write(json.dumps(summary) + "\n")


@cache
def read_scores() -> list[Floats]:
    """The scores of each trained candidate, on the same examples."""
    kept = json.loads(SCORES.read_text())
    return [np.asarray(values, dtype=float) for values in kept["candidates"].values()]


def read_pairs() -> list[tuple[Floats, Floats]]:
    """The scores of every two of them."""
    return [pair for pair in itertools.permutations(read_scores(), 2)]


def simulate(
    pair: tuple[Floats, Floats], size: int, effect: float, rng: np.random.Generator, level: float
) -> bool:
    """Whether a challenger with this true advantage is promoted."""
    before, after = pair
    noise = after - before
    noise = noise - noise.mean()
    drawn = rng.integers(0, before.size, size=size)
    return promoted(before[drawn] + noise[drawn] + effect, before[drawn], level)


def chosen(rng: np.random.Generator, size: int, level: float) -> tuple[bool, bool]:
    """Whether the best of several, none better, is promoted: by what it was chosen by, and by others."""
    scores = read_scores()
    before = scores[int(rng.integers(len(scores)))]
    others = [before + (s - before) - (s - before).mean() for s in scores if s is not before]
    first, second = (rng.integers(0, before.size, size=size) for _ in range(2))
    best = max(others, key=lambda s: s[first].mean())
    return promoted(best[first], before[first], level), promoted(best[second], before[second], level)


def promoted(challenger: Floats, incumbent: Floats, level: float) -> bool:
    """The gate's word on these scores."""
    rules = Rules(objective="rougeL", margin=0.02, level=level, resamples=1000)
    decision = judge(Candidate("new", report(challenger)), Candidate("old", report(incumbent)), None, rules)
    return decision.outcome == "promote"


def report(scores: Floats) -> EvalReport:
    """Scores as the records that the gate takes."""
    examples = tuple(
        ExampleScore(example_id=str(i), prompt="", reference="", output="", scores={"rougeL": float(score)})
        for i, score in enumerate(scores)
    )
    return EvalReport(dataset_id="", split="evaluation", metric_versions={"rouge": 1}, examples=examples)


def collect(uri: str, experiment: str) -> None:
    """Keep the ROUGE-L of every trained candidate of an experiment's largest dataset of results."""
    from mlflow import MlflowClient

    from regraft.tracking.runs import Tracker

    client, tracker = MlflowClient(uri), Tracker(uri, experiment)
    runs = client.search_runs(
        [tracker.experiment_id],
        "tags.role = 'trial' AND tags.status = 'completed'",
    )
    datasets = [run.data.tags["dataset"] for run in runs]
    dataset = max(set(datasets), key=datasets.count)
    found: dict[str, list[float]] = {}
    ids: list[str] | None = None
    for result in tracker.results_on(dataset):
        if result.is_control or result.report is None:
            continue
        scores = {e.example_id: e.scores["rougeL"] for e in result.report.examples}
        ids = ids or sorted(scores)
        found[result.label] = [round(scores[key], 4) for key in ids]
    about = f"ROUGE-L of {len(found)} trained candidates of {experiment}, dataset {dataset}, by example"
    SCORES.write_text(json.dumps({"about": about, "candidates": found}, indent=1) + "\n")
    say(f"{about}: {SCORES}")


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
