"""Two workers train what one trains: as replicas, sharded, cut short, and fewer than were asked for.

All that needs two processes runs in one pair of them, started once; the tests look at what it left.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regraft.methods import parse_method
from regraft.models import load_tokenizer
from regraft.records import Example, Message
from regraft.training.batches import Encoded
from regraft.training.checkpoints import Checkpoints
from regraft.training.distributed import Workers, data_parallel
from regraft.training.encoding import encode
from regraft.training.loop import train
from regraft.training.steps import LoopSettings, plan_steps
from regraft.training.storage import Versions

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {
    "lora": {"name": "lora", "rank": 4, "dropout": 0.2, "learning_rate": 5e-3},
    "full": {"name": "full", "learning_rate": 1e-3},
    "pissa": {"name": "pissa", "rank": 4, "learning_rate": 5e-4},
    "qlora": {"name": "qlora", "rank": 4, "learning_rate": 5e-4},
    "p_tuning": {"name": "p_tuning", "virtual_tokens": 4, "encoder_hidden_size": 16},
    "dora": {"name": "dora", "rank": 4, "learning_rate": 5e-4},
}
SETTINGS = LoopSettings(5e-3, epochs=4, tokens_per_batch=40, evaluations=3)
CHATS = [
    ("When is the reading due?", "On the first."),
    ("Who pays?", "We do."),
    ("Hello", "How can I help?"),
    ("Is the line down?", "No."),
    ("And now?", "Still not, as far as we know."),
]
#: Run by both processes, in this order: name, method, whether sharded, what else.
CASES = [
    ("replicas", "lora", False, {}),
    ("replicas", "full", False, {}),
    ("shards", "lora", True, {}),
    ("shards", "full", True, {}),
    ("shards", "pissa", True, {}),
    ("shards", "qlora", True, {}),
    ("shards", "p_tuning", True, {}),
    ("shards", "dora", True, {}),
    ("recomputed", "full", True, {"gradient_checkpointing": True}),
    ("recomputed", "lora", True, {"gradient_checkpointing": True}),
    ("cut", "lora", False, {"stop_at": 2}),
    ("resumed", "lora", False, {"of": "cut"}),
    ("cut-shards", "full", True, {"stop_at": 2}),
    ("resumed-shards", "full", True, {"of": "cut-shards"}),
    ("cut-shards", "lora", True, {"stop_at": 2}),
    ("resumed-shards", "lora", True, {"of": "cut-shards"}),
    ("lost", "full", True, {"stop_at": 2}),
    ("lost", "lora", False, {"stop_at": 2}),
]


class Noting(Checkpoints):
    """Remembers what it found."""

    found = None

    def restore(self, *args):
        self.found = super().restore(*args)
        return self.found


def run(model_folder, out, name, key, workers, *, stop_at=None, of=None, **changes):
    """Train a method; the first worker leaves its curve and its files under `out`."""
    method = parse_method(METHODS[key])
    tokenizer = load_tokenizer(model_folder)
    rows = [
        encode(
            tokenizer,
            Example(id=q, messages=(Message(role="user", content=q), Message(role="assistant", content=a))),
            128,
        )
        for q, a in CHATS
    ]
    torch.manual_seed(0)
    base = method.load_base(model_folder, "float32", "cpu")
    model = method.apply(base)
    points, kept = [], out / f"{name}-{key}"
    checkpoints = None
    if stop_at or of:
        checkpoints = Noting(Versions(str(out / "checkpoints" / f"{of or name}-{key}")), 0, workers)

    def report(point):
        points.append(point)
        if len(points) == stop_at:
            raise KeyboardInterrupt

    try:
        train(
            model, base, rows, rows, SETTINGS._replace(learning_rate=method.learning_rate, **changes),
            pad_id=0, device="cpu", report=report, workers=workers, checkpoints=checkpoints,
        )  # fmt: skip
    except KeyboardInterrupt:
        return
    if of:
        assert checkpoints.found.step > SETTINGS.epochs
    if workers.rank == 0:
        kept.mkdir(parents=True)
        method.save(model, kept)
        (kept / "curve.json").write_text(json.dumps([p.model_dump() for p in points]))


def work(rank, model_folder, out):
    """What each of the two processes does."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    for name, key, shard, settings in CASES:
        run(model_folder, out, name, key, Workers(rank, 2, data_parallel, shard=shard), **settings)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("workers")
    code = "import sys; sys.path.insert(0, {!r}); import test_workers as case; from pathlib import Path; "
    code += "case.work({}, Path({!r}), Path({!r}))"
    here = str(Path(__file__).parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(here, rank, str(tiny_model), str(out))],
            stderr=(out / f"stderr-{rank}").open("w"), env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        codes = [p.wait(timeout=180) for p in pair]
    finally:
        for process in pair:
            process.kill()
    assert codes == [0, 0], (out / "stderr-0").read_text()[-3000:] + (out / "stderr-1").read_text()[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(trained, tiny_model, tmp_path_factory):
    """The same on one worker that does the work of two."""
    out = tmp_path_factory.mktemp("alone")
    for key in METHODS:
        run(tiny_model, out, "one", key, Workers(requested=2))
    for key, shard in (("full", True), ("lora", False)):
        out_of_two = Workers(requested=2, shard=shard)
        run(tiny_model, trained, "left", key, out_of_two, of="lost")
    return out


def read(folder):
    """Curve, and every tensor that was saved."""
    from safetensors.torch import load_file

    curve = json.loads((folder / "curve.json").read_text())
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return curve, tensors


def distance(a, b):
    """The largest difference of two runs: of losses, relative; of weights, to the largest."""
    (curve, tensors), (other_curve, other_tensors) = read(a), read(b)
    assert [p["step"] for p in curve] == [p["step"] for p in other_curve]
    assert [p["tokens_seen"] for p in curve] == [p["tokens_seen"] for p in other_curve]
    assert tensors.keys() == other_tensors.keys()
    losses = max(
        abs(p[k] / q[k] - 1)
        for p, q in zip(curve, other_curve, strict=True)
        for k in ("train_loss", "eval_loss")
    )
    weights = max(
        float((t.float() - other_tensors[k].float()).abs().max() / t.float().abs().max().clamp(min=1e-9))
        for k, t in tensors.items()
    )
    return losses, weights


@pytest.mark.parametrize("key", ["lora", "full"])
def test_two_replicas_train_what_one_worker_trains_in_twice_the_micro_batches(trained, alone, key):
    losses, weights = distance(trained / f"replicas-{key}", alone / f"one-{key}")
    assert losses < 1e-5
    assert weights < 1e-4


@pytest.mark.parametrize("key", ["lora", "pissa", "qlora", "p_tuning", "dora"])
def test_adapters_on_a_sharded_base_are_those_on_a_whole_one(trained, alone, key):
    losses, weights = distance(trained / f"shards-{key}", alone / f"one-{key}")
    assert losses < 1e-5
    assert weights < 1e-4


def test_sharded_weights_are_saved_whole_and_differ_by_the_rounding_of_norms_alone(trained, alone):
    losses, weights = distance(trained / "shards-full", alone / "one-full")
    assert losses < 5e-3  # measured: 1.4e-3; layers travel in bf16, norms among them
    assert weights < 2e-2
    files = [
        sorted(f.name for f in folder.iterdir()) for folder in (trained / "shards-full", alone / "one-full")
    ]
    assert files[0] == files[1]
    assert (trained / "shards-full" / "config.json").read_text() == (
        alone / "one-full" / "config.json"
    ).read_text()


@pytest.mark.parametrize("key", ["lora", "full"])
def test_activations_are_computed_again_in_a_sharded_model(trained, key):
    assert max(distance(trained / f"recomputed-{key}", trained / f"shards-{key}")) < 1e-4


@pytest.mark.parametrize(
    ("name", "key", "whole"),
    [
        ("resumed", "lora", "replicas"),
        ("resumed-shards", "lora", "shards"),
        ("resumed-shards", "full", "shards"),
        ("left", "lora", "replicas"),
        ("left", "full", "shards"),
    ],
)
def test_a_run_cut_short_goes_on_with_two_workers_or_with_the_one_that_is_left(
    trained, alone, name, key, whole
):
    losses, weights = distance(trained / f"{name}-{key}", trained / f"{whole}-{key}")
    # One worker alone has nothing to shard, so its layers do not travel in bf16.
    assert losses < (5e-3 if (name, key) == ("left", "full") else 1e-5)
    assert weights < (2e-2 if (name, key) == ("left", "full") else 1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_steps_are_the_same_whoever_is_there_to_do_them(size):
    rows = [Encoded((1,) * n, (1,) * n) for n in range(3, 12)]
    settings = LoopSettings(1e-3, epochs=2, tokens_per_batch=12, accumulate=2)
    asked = plan_steps(rows, settings, Workers(0, 1, requested=4))
    there = [plan_steps(rows, settings, Workers(rank, size, requested=4)) for rank in range(size)]
    for step, parts in zip(asked, zip(*there, strict=True), strict=True):
        assert {(p.supervised, p.tokens) for p in parts} == {(step.supervised, step.tokens)}
        assert len({len(p.groups) for p in parts}) == 1  # all run forward equally often
        done = [g for p in parts for g in p.groups if any(e.supervised for e in g)]
        assert sorted(done) == sorted(step.groups)
