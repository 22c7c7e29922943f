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
from regraft.training.batches import encode
from regraft.training.checkpoints import Checkpoints
from regraft.training.distributed import Workers, data_parallel
from regraft.training.loop import LoopSettings, train

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {
    "lora": {"name": "lora", "rank": 4, "dropout": 0.2},
    "full": {"name": "full", "learning_rate": 1e-3},
    "pissa": {"name": "pissa", "rank": 4},
    "qlora": {"name": "qlora", "rank": 4},
    "p_tuning": {"name": "p_tuning", "virtual_tokens": 4, "encoder_hidden_size": 16},
    "dora": {"name": "dora", "rank": 4},
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
        checkpoints = Checkpoints(out / "checkpoints" / f"{of or name}-{key}", 0, workers)

    def report(point):
        points.append(point)
        if len(points) == stop_at:
            raise KeyboardInterrupt

    try:
        train(
            model, base, rows, rows, SETTINGS._replace(learning_rate=method.learning_rate * 10, **changes),
            pad_id=0, device="cpu", report=report, workers=workers, checkpoints=checkpoints,
        )  # fmt: skip
    except KeyboardInterrupt:
        return
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


def test_show(trained, alone):
    for name, key, _, _ in CASES:
        if (trained / f"{name}-{key}").exists():
            print(name, key, distance(trained / f"{name}-{key}", alone / f"one-{key}"))
    for key in ("lora", "full"):
        print("left", key, distance(trained / f"left-{key}", alone / f"one-{key}"))
        print(read(alone / f"one-{key}")[0])
    assert 0
