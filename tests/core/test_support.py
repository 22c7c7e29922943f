"""What each method declares that it can do is tried: bases in four bits, merging, mixed batches, engines, packed
rows, activations computed again, several workers.

A method that is added to the union is tried without an edit here, and the table in docs/configuration.md is
written from the declarations that hold.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from regraft.config import SweepSection
from regraft.methods import METHOD_CLASSES, METHODS_BY_NAME, Method, parse_method
from regraft.methods.base import trainable_parameters
from regraft.training.batches import IGNORED, Encoded, collate, pack
from regraft.training.distributed import Workers, data_parallel
from regraft.training.kernels import fast_kernels
from regraft.training.loop import train
from regraft.training.loss import supervised_positions_only
from regraft.training.modes import checkpointing
from regraft.training.steps import LoopSettings

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINED = [c for c in METHOD_CLASSES if c.kind != "control"]
ADAPTERS = [c for c in TRAINED if c.kind == "adapter"]
PROMPTS = torch.tensor([[5, 9, 40, 77], [8, 200, 31, 6]])
NAMED = {"ids": lambda c: c.__name__}


def disturbed(kind: type[Method], folder: Path, seed: int) -> tuple[nn.Module, nn.Module]:
    """The base and the method on it, fp32, with random weights so large that they show."""
    method = plain(kind)
    torch.manual_seed(seed)
    base = method.load_base(folder, "float32", "cpu")
    model = method.apply(base).eval()
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return base, model


def plain(kind: type[Method]) -> Method:
    fields = kind.model_fields
    return kind(**({"initial_text": None} if "initial_text" in fields else {}))  # type: ignore[call-arg]


@torch.no_grad()
def logits(model: Any, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=PROMPTS, attention_mask=torch.ones_like(PROMPTS), **more).logits
    return found[:, -PROMPTS.shape[1] :]


def on_nf4(kind: type[Method], folder: Path, dtype: Any, *, in_full: bool) -> list[torch.Tensor]:
    """Loss and gradients on an NF4 base, or on its values held in full."""
    # A copy is not validated: also what is declared not to work is tried.
    method = plain(kind).model_copy(update={"quantise": "nf4"})
    base: Any = method.load_base(folder, dtype, "cpu")
    if in_full:
        base = base.dequantize().requires_grad_(False)
        method = method.model_copy(update={"quantise": None})
    torch.manual_seed(0)
    model = method.apply(base).train()
    trained = [
        p for _, p in sorted(model.named_parameters(), key=lambda n: n[0]) if p.requires_grad
    ]  # not always in one order
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss = model(input_ids=PROMPTS, labels=PROMPTS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in trained if p.grad is not None)]


def quantises(kind: type[Method], folder: Path) -> bool:
    """Whether training on an NF4 base is as on the same values in full: exactly in fp32, as near in bf16."""
    try:
        exact = on_nf4(kind, folder, "float32", in_full=True)
        found = {d: on_nf4(kind, folder, d, in_full=False) for d in ("float32", "bfloat16")}
        plain_bf16 = on_nf4(kind, folder, "bfloat16", in_full=True)
    except (TypeError, RuntimeError):
        return False

    def off(mine: list[torch.Tensor]) -> float:
        apart = sum(float((a - b).square().sum()) for a, b in zip(mine, exact, strict=True))
        return float((apart / sum(float(b.square().sum()) for b in exact)) ** 0.5)

    return off(found["float32"]) < 1e-4 and off(found["bfloat16"]) < 1.5 * off(plain_bf16) + 0.01


def packs(kind: type[Method], folder: Path) -> bool:
    """Whether a row of two examples gives the loss of each by itself."""
    base, model = disturbed(kind, folder, 1)
    model.train()
    losses = []
    with torch.no_grad(), supervised_positions_only(base):
        for batches in ([pack(rows()[:2])], [collate([r], 0) for r in rows()[:2]]):
            with fast_kernels(base, "cpu", packed=len(batches) == 1):
                losses.append(sum(float(model(**b.inputs).loss) for b in batches))
    return losses[0] == pytest.approx(losses[1], rel=1e-4)


def recomputes(kind: type[Method], folder: Path) -> bool:
    """Whether checkpointed activations give the same gradients."""
    found = []
    for again in (False, True):
        base, model = disturbed(kind, folder, 1)
        model.train()
        with supervised_positions_only(base), checkpointing(base, again):
            try:
                model(**collate(rows(), 0).inputs).loss.backward()
            except (ValueError, RuntimeError):
                return False
        found.append([p.grad for p in trainable_parameters(model)])
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*found, strict=True))


def merges(kind: type[Method], folder: Path) -> bool:
    _, model = disturbed(kind, folder, 1)
    before = logits(model)
    try:
        merged = model.merge_and_unload()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, ValueError):
        return False
    return torch.allclose(logits(merged), before, atol=1e-3)


def mixes(kind: type[Method], folder: Path, scratch: Path) -> bool:
    from peft import PeftModel

    method = plain(kind)
    for name, seed in (("one", 1), ("two", 2)):
        _, model = disturbed(kind, folder, seed)
        (scratch / name).mkdir()
        method.save(model, scratch / name)
    base = method.load_base(folder, "float32", "cpu")
    apart = [logits(method.attach(copy.deepcopy(base), scratch / name)) for name in ("one", "two")]
    model = PeftModel.from_pretrained(base, str(scratch / "one"), adapter_name="one")
    try:
        model.load_adapter(str(scratch / "two"), adapter_name="two")
        both = logits(model.eval(), adapter_names=["one", "two"])
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    wanted = torch.stack([apart[0][0], apart[1][1]])
    assert not torch.allclose(apart[0], apart[1], atol=1e-3)  # or nothing is shown
    return torch.allclose(both, wanted, atol=1e-3)


def is_plain_lora(kind: type[Method], folder: Path, scratch: Path) -> bool:
    """Whether the files are those that engines with LoRA kernels (vLLM) take."""
    _, model = disturbed(kind, folder, 1)
    plain(kind).save(model, scratch)
    config = json.loads((scratch / "adapter_config.json").read_text())
    return config["peft_type"] == "LORA" and not (
        config["use_dora"] or config["modules_to_save"] or config["rank_pattern"] or config["bias"] != "none"
    )


@pytest.mark.parametrize("kind", ADAPTERS, **NAMED)
def test_a_base_in_four_bits_trains_as_one_in_full_where_it_is_declared(
    kind: type[Method], tiny_model: Path
) -> None:
    assert kind.support.quantises == quantises(kind, tiny_model)


@pytest.mark.parametrize("kind", TRAINED, **NAMED)
def test_examples_share_a_row_where_it_is_declared(kind: type[Method], tiny_model: Path) -> None:
    assert kind.support.packs == packs(kind, tiny_model)


@pytest.mark.parametrize("kind", TRAINED, **NAMED)
def test_activations_are_computed_again_where_it_is_declared(kind: type[Method], tiny_model: Path) -> None:
    assert kind.support.recomputes == recomputes(kind, tiny_model)


@pytest.mark.parametrize("kind", ADAPTERS, **NAMED)
def test_merging_gives_the_same_model_where_it_is_declared(kind: type[Method], tiny_model: Path) -> None:
    # Merged into four bits, the weights are rounded again.
    assert kind.support.merges == (merges(kind, tiny_model) and not kind().quantised)


@pytest.mark.parametrize("kind", ADAPTERS, **NAMED)
def test_rows_of_one_batch_take_their_own_adapters_where_it_is_declared(
    kind: type[Method], tiny_model: Path, tmp_path: Path
) -> None:
    assert kind.support.mixes == mixes(kind, tiny_model, tmp_path)


@pytest.mark.parametrize("kind", ADAPTERS, **NAMED)
def test_files_are_plain_lora_where_it_is_declared(
    kind: type[Method], tiny_model: Path, tmp_path: Path
) -> None:
    assert kind.support.plain_lora == is_plain_lora(kind, tiny_model, tmp_path)


# Several workers


def rows() -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for length in (12, 14, 20, 16, 9, 11):
        ids = tuple(torch.randint(3, 300, (length,), generator=draw).tolist())
        made.append(Encoded(ids, (IGNORED,) * 4 + ids[4:]))
    return made


def curve(kind: type[Method], folder: Path, workers: Workers) -> list[float | None]:
    method = plain(kind)
    torch.manual_seed(0)
    base = method.load_base(folder, "float32", "cpu")
    model = method.apply(base)
    settings = LoopSettings(
        method.learning_rate, epochs=3, tokens_per_batch=32, evaluations=3, packing=kind.support.packs
    )
    outcome = train(
        model, base, rows(), rows(), settings, pad_id=0, device="cpu", report=lambda _: None, workers=workers,
        hooks=method.hooks(model),
    )  # fmt: skip
    return [p.eval_loss for p in outcome.points]


def work(rank: int, folder: Path, out: Path) -> None:
    """What each of two processes does: every method as replicas, and in parts."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    for kind in TRAINED:
        for way in ("replicas", "shards"):
            if not getattr(kind.support, way):
                continue
            found = curve(kind, folder, Workers(rank, 2, data_parallel, shard=way == "shards"))
            if rank == 0:
                (out / f"{plain(kind).name}-{way}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("support")
    code = "import sys; sys.path.insert(0, {!r}); import test_support as case; from pathlib import Path; "
    code += "case.work({}, Path({!r}), Path({!r}))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(str(Path(__file__).parent), rank, str(tiny_model), str(out))],
            stderr=(out / f"stderr-{rank}").open("w"),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        codes = [p.wait(timeout=300) for p in both]
    finally:
        for process in both:
            process.kill()
    assert codes == [0, 0], (out / "stderr-0").read_text()[-3000:] + (out / "stderr-1").read_text()[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED, **NAMED)
@pytest.mark.parametrize("way", ["replicas", "shards"])
def test_two_workers_train_what_one_does_where_it_is_declared(
    kind: type[Method], way: str, pair: Path, tiny_model: Path
) -> None:
    if not getattr(kind.support, way):
        pytest.skip("declared not to")
    one = curve(kind, tiny_model, Workers(requested=2))
    two = json.loads((pair / f"{plain(kind).name}-{way}").read_text())
    # Layers that are trained in parts travel in bf16.
    assert two == pytest.approx(one, rel=0.01 if kind.kind == "full" else 1e-5)


ASKED: dict[str, dict[str, Any]] = {
    "replicas": {"workers_per_trial": 2},
    "shards": {"workers_per_trial": 2, "shard": True},
    "packs": {"packing": True},
    "recomputes": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("way", ASKED)
@pytest.mark.parametrize("name", ["ia3", ["lora", "ia3"]], ids=["name", "list"])
def test_a_sweep_that_asks_for_more_is_refused(
    way: str, name: str | list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"methods": [{"name": "zero_shot"}, {"name": name}]} | ASKED[way]
    SweepSection.model_validate(asked)
    kind = METHODS_BY_NAME["ia3"]
    monkeypatch.setattr(kind, "support", kind.support._replace(**{way: False}))
    field = list(ASKED[way])[-1]
    with pytest.raises(ValidationError, match=rf"methods\.1: ia3 does not train with sweep\.{field}"):
        SweepSection.model_validate(asked)


def test_a_method_that_does_not_train_right_in_four_bits_is_refused() -> None:
    for kind in ADAPTERS:
        settings = {"name": plain(kind).name, "quantise": "nf4"}
        if kind.support.quantises:
            assert parse_method(settings).quantised
        else:
            with pytest.raises(ValidationError, match="does not train on a quantised base"):
                parse_method(settings)
