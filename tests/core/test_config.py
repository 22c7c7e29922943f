from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from regraft.config import Experiment
from regraft.errors import ConfigError

YAML = """\
name: support
model:
  source: bundled:smollm2-135m-instruct
data:
  train: data/train.jsonl
  evaluation: data/evaluation.jsonl
sweep:
  methods:
    - {name: zero_shot}
    - {name: lora, rank: 8}
  epochs: 1
evaluate:
  metrics:
    - {name: rouge}
select:
  maximise: rougeL
  subject_to:
    - "latency_p95_ms <= 4000"
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the YAML with one part replaced."""

    def _write(old: str = "", new: str = "") -> Path:
        assert old in YAML
        path = tmp_path / "regraft.yaml"
        path.write_text(YAML.replace(old, new, 1) if old else YAML, encoding="utf-8")
        return path

    return _write


def load_lora(write: Write, settings: str, extra: str = "") -> list[str]:
    experiment = Experiment.load(write("{name: lora, rank: 8}", settings + extra))
    return [m.label for m in experiment.sweep.expanded() if m.trains]


def test_example_loads_with_absolute_paths_that_exist(example_folder: Path) -> None:
    experiment = Experiment.load(example_folder / "regraft.yaml")
    assert experiment == Experiment.load(example_folder)
    names = {m.name for m in experiment.sweep.expanded()}
    assert names == {"zero_shot", "full", "lora", "qlora", "prompt_tuning", "p_tuning"}
    files = [*experiment.data.train, *experiment.data.evaluation.values(), experiment.retrain.reviewed]
    files += experiment.retrain.evaluation.values()
    assert all(file is not None and file.is_absolute() and file.is_file() for file in files)


# What is replaced, by what, the line of the mistake, the field, what the message must say.
MISTAKES = {
    "wrong key": ("epochs: 1", "epoch: 1", 11, "sweep.epoch", "did you mean 'epochs'"),
    "wrong section": ("select:", "selects:", 15, "selects", "did you mean 'select'"),
    "missing key": (
        "  source: bundled:smollm2-135m-instruct",
        "  dtype: float32",
        2,
        "model.source",
        "required",
    ),
    "wrong type": ("epochs: 1", "epochs: many", 11, "sweep.epochs", "number"),
    "value out of range": ("epochs: 1", "epochs: 0", 11, "sweep.epochs", "greater than 0"),
    "unknown method": ("name: lora", "name: lorra", 10, "sweep.methods.1.name", "did you mean 'lora'"),
    "method without a name": (
        "name: lora, ",
        "",
        10,
        "sweep.methods.1.name",
        "zero_shot, few_shot, endpoint, full, lora",
    ),
    "unknown field of a method": ("rank: 8", "ranc: 8", 10, "sweep.methods.1.ranc", "did you mean 'rank'"),
    "field of a method out of range": ("rank: 8", "rank: 0", 10, "sweep.methods.1.rank", "greater than"),
    "one bad value of a list": ("rank: 8", "rank: [8, 0]", 10, "sweep.methods.1.rank", "greater than"),
    "empty list": ("rank: 8", "rank: []", 10, "sweep.methods.1.rank", "empty list"),
    "range the wrong way round": (
        "rank: 8",
        "learning_rate: {loguniform: [0.1, 0.001]}",
        10,
        "sweep.methods.1.learning_rate",
        "low < high",
    ),
    "unknown kind of range": (
        "rank: 8",
        "learning_rate: {normal: [0.1, 1.0]}",
        10,
        "sweep.methods.1.learning_rate",
        "loguniform, uniform",
    ),
    "range of one number": (
        "rank: 8",
        "learning_rate: {uniform: [0.1]}",
        10,
        "sweep.methods.1.learning_rate",
        "two numbers",
    ),
    "unknown metric": ("name: rouge", "name: rogue", 14, "evaluate.metrics.0", "'rouge', 'exact_match'"),
    "objective that no metric gives": (
        "maximise: rougeL",
        "maximise: token_f1",
        16,
        "select.maximise",
        "rougeL",
    ),
    "constraint without a sense": (" <= 4000", " < 4000", 17, "select.subject_to", "write for instance"),
    "constraint without a number": (" <= 4000", " <= fast", 18, "select.subject_to.0.bound", "number"),
    "constraint on what no trial records": (
        "latency_p95_ms <= 4000",
        "latency_p59_ms <= 4000",
        18,
        "select.subject_to.0",
        "did you mean 'latency_p95_ms'",
    ),
    "evaluation set named train": (
        "evaluation: data/evaluation.jsonl",
        "evaluation: {train: data/train.jsonl}",
        6,
        "data.evaluation",
        "cannot be named 'train'",
    ),
    "port out of range": ("name: support", "name: support\nserve: {port: 70000}", 2, "serve.port", "65535"),
    "method that is not swept": (
        "  epochs: 1",
        "  ray_train: [full]",
        11,
        "sweep.ray_train",
        "name one of ['lora', 'zero_shot']",
    ),
}


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(m, id=m) for m in MISTAKES],
)
def test_mistake_is_reported_with_file_line_field_and_mend(write: Write, mistake: str) -> None:
    old, new, line, field, words = MISTAKES[mistake]
    path = write(old, new)
    with pytest.raises(ConfigError) as caught:
        Experiment.load(path)
    assert f"{path}:{line}: {field}: " in caught.value.problem
    assert words in str(caught.value)
    assert caught.value.mend


def test_all_wrong_keys_are_reported_at_once(write: Write) -> None:
    path = write("epochs: 1\n", "epoch: 1\n  sead: 3\n")
    with pytest.raises(ConfigError) as caught:
        Experiment.load(path)
    assert len(caught.value.problem.splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: [", "not valid YAML"),
        (b"", "top level must be a mapping"),
        (b"- a\n", "top level must be a mapping"),
        pytest.param(
            b"name: caf\xe9\n",
            "UTF-8",
        ),
    ],
)
def test_file_that_is_no_experiment_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "regraft.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        Experiment.load(path)
    assert str(path) in caught.value.problem
    assert caught.value.mend


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"regraft\.yaml: No such file") as caught:
        Experiment.load(tmp_path)
    assert caught.value.mend


def test_lists_are_a_grid_in_their_order(write: Write) -> None:
    labels = load_lora(write, "{name: lora, rank: [8, 4], learning_rate: [0.002, 0.001]}")
    assert labels == [
        "lora rank=8 lr=0.002",
        "lora rank=8 lr=0.001",
        "lora rank=4 lr=0.002",
        "lora rank=4 lr=0.001",
    ]


def test_every_list_of_modules_is_one_value(write: Write) -> None:
    entry = "{name: ia3, target_modules: [k_proj, down_proj], feedforward_modules: [down_proj]}"
    experiment = Experiment.load(write("{name: lora, rank: 8}", entry))
    assert [getattr(m, "feedforward_modules", None) for m in experiment.sweep.expanded()] == [
        None,
        ("down_proj",),
    ]


def test_list_of_target_modules_is_one_value(write: Write) -> None:
    experiment = Experiment.load(write("rank: 8", "target_modules: [q_proj, v_proj]"))
    assert [getattr(m, "target_modules", None) for m in experiment.sweep.expanded()] == [
        None,
        ("q_proj", "v_proj"),
    ]


def test_ranges_are_drawn_within_bounds_and_the_same_for_the_same_seed(write: Write) -> None:
    settings = "{name: lora, rank: [4, 8], learning_rate: {loguniform: [0.00001, 0.01]}}"
    labels = load_lora(write, settings, "\n  samples: 5")
    rates = [float(label.rpartition("=")[2]) for label in labels]
    assert len(set(rates)) == 10
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert load_lora(write, settings, "\n  samples: 5") == labels
    assert load_lora(write, settings, "\n  samples: 5\n  seed: 1") != labels


def test_samples_repeat_nothing_where_there_is_no_range(write: Write) -> None:
    assert load_lora(write, "{name: lora, rank: [4, 8]}", "\n  samples: 5") == [
        "lora rank=4 lr=0.002",
        "lora rank=8 lr=0.002",
    ]


def test_method_listed_twice_is_tried_once(write: Write) -> None:
    twice = "{name: lora, rank: 8}\n    - {rank: [8, 16], name: lora}\n    - {name: lora}"
    assert load_lora(write, twice) == ["lora rank=8 lr=0.002", "lora rank=16 lr=0.002"]


def test_range_is_accepted_as_the_error_message_writes_it(write: Write) -> None:
    assert len(load_lora(write, "{name: lora, learning_rate: {loguniform: [1e-5, 1e-3]}}")) == 1


def test_whole_number_field_can_be_a_range(write: Write) -> None:
    assert len(load_lora(write, "{name: lora, rank: {uniform: [4, 64]}}", "\n  samples: 3")) == 3


def test_range_beyond_what_the_field_allows_is_a_config_error(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.methods\.1\.learning_rate"):
        load_lora(write, "{name: lora, learning_rate: {loguniform: [0.00001, 9.0]}}", "\n  samples: 8")


def test_mistake_beside_a_list_of_names_is_a_config_error(write: Write) -> None:
    with pytest.raises(ConfigError, match="full has no field 'rank'"):
        load_lora(write, "{name: [lora, full], rank: 8}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("shard: true", "sweep.shard: needs sweep.workers_per_trial of 2 or more"),
        ("min_workers: 2", "sweep.min_workers: is 2, more than sweep.workers_per_trial = 1"),
    ],
)
def test_settings_of_several_workers_want_several(write: Write, settings: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        Experiment.load(write("  epochs: 1", f"  epochs: 1\n  {settings}"))
    Experiment.load(write("  epochs: 1", f"  epochs: 1\n  workers_per_trial: 2\n  {settings}"))
