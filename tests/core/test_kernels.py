"""The kernels against what they stand in for: the same loss and gradients, in fp32 exactly, in bf16 as near."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from regraft.methods import METHODS_BY_NAME, LoRA, parse_method
from regraft.methods.base import trainable_parameters
from regraft.records import Example, Message
from regraft.training.batches import IGNORED, Batch, Encoded, collate
from regraft.training.encoding import encode
from regraft.training.kernels import fast_kernels
from regraft.training.kernels.cross_entropy import linear_cross_entropy
from regraft.training.kernels.norm import fused_norms
from regraft.training.loop import train
from regraft.training.loss import supervised_positions_only
from regraft.training.steps import LoopSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batch(tiny_tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Rows of several lengths, the longest of more than one block of queries."""
    rows = []
    for count in (1, 3, 12):
        turns = [Message(role=r, content="When is it due? " * 2) for r in ("user", "assistant") * count]
        rows.append(encode(tiny_tokenizer, Example(id=str(count), messages=tuple(turns)), 2000))
    assert max(len(r.ids) for r in rows) > 2 * 64
    return collate(rows, 0)


def loss_and_gradients(model: Any, call: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**call).loss
    loss.backward()
    return float(loss.detach()), [p.grad.double() for p in trainable_parameters(model) if p.grad is not None]


def distance(found: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    apart = sum(float((a - b).square().sum()) for a, b in zip(found, right, strict=True))
    return float((apart / sum(float(b.square().sum()) for b in right)) ** 0.5)


def test_padding_on_the_right_needs_no_mask(tiny_model: Path, batch: Batch) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    with supervised_positions_only(base):
        masked = loss_and_gradients(base, batch.masked)
        free = loss_and_gradients(base, batch.inputs)
    assert free[0] == pytest.approx(masked[0], rel=1e-6)
    assert distance(free[1], masked[1]) < 1e-5


@pytest.mark.parametrize("name", [n for n, m in METHODS_BY_NAME.items() if m.kind != "control"])
def test_gradients_are_as_near_the_exact_ones_as_the_libraries_own(
    name: str, tiny_model: Path, batch: Batch
) -> None:
    """Exact: the same model in fp64 without any kernel. The libraries' own: bf16 without any kernel."""
    from regraft.training.modes import autocast

    method = parse_method({"name": name})
    base = method.load_base(tiny_model, "bfloat16", "cpu")
    torch.manual_seed(0)
    model = method.apply(base).train()
    if method.kind == "adapter":
        for parameter in trainable_parameters(model):
            parameter.data += 0.02 * torch.randn_like(parameter)
    with autocast(model, "cpu"), supervised_positions_only(base):
        with fast_kernels(base, "cpu"):
            loss, ours = loss_and_gradients(model, batch.inputs)
        for module in model.modules():
            vars(module).pop("forward", None) if module is not base else None
        loss_of_theirs, theirs = loss_and_gradients(model, batch.masked)
    if method.quantised:  # bitsandbytes has no fp64
        assert loss == pytest.approx(loss_of_theirs, rel=2e-3)
        assert distance(ours, theirs) < 0.03
        return
    exact_model = copy.deepcopy(model).double()
    exact = exact_model if exact_model.__class__ is type(base) else exact_model.get_base_model()
    exact.config.dtype = torch.float64
    with supervised_positions_only(exact):
        exact_loss, right = loss_and_gradients(exact_model, batch.masked)
    assert loss == pytest.approx(exact_loss, rel=3e-3)
    assert distance(ours, right) < max(0.03, 2 * distance(theirs, right))


@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_in_parts_is_the_whole_one(bias: bool) -> None:
    torch.manual_seed(0)
    vocabulary, width, positions = 49_152, 8, 150  # more than two parts
    hidden, weight, shift = (
        torch.randn(*s) for s in ((positions, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(0, vocabulary, (positions,))

    def run(own: bool) -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        b = shift.clone().requires_grad_() if bias else None
        if own:
            loss = linear_cross_entropy(h, w, b, targets)
        else:
            loss = F.cross_entropy(F.linear(h, w, b), targets, reduction="sum")
        (loss * 0.5).backward()
        return [loss.detach(), *(t.grad for t in (h, w, b) if t is not None and t.grad is not None)]

    for found, right in zip(run(True), run(False), strict=True):
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-4)


def test_cross_entropy_of_an_impossible_token_is_finite() -> None:
    weight = torch.zeros(10, 1)
    weight[0] = 1.0
    loss = linear_cross_entropy(torch.full((1, 1), 500.0), weight, None, torch.tensor([3]))
    assert float(loss) == pytest.approx(500.0)


def test_cross_entropy_of_bf16_is_not_rounded() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16).bfloat16(), torch.randn(100, 16).bfloat16()
    targets = torch.randint(0, 100, (300,))
    right = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")
    assert float(linear_cross_entropy(hidden, weight, None, targets)) == pytest.approx(float(right), rel=1e-5)


def test_kernels_leave_nothing_behind(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).requires_grad_(False)
    with fast_kernels(base, "cpu"):
        assert base.config._attn_implementation == "regraft_blocks"
        assert "forward" in vars(base.model.norm)
    assert base.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(m) for m in base.modules())


def test_copied_fused_layer_computes_with_its_own_weights(tiny_model: Path) -> None:
    method = LoRA(rank=4)
    torch.manual_seed(0)
    model = method.apply(method.load_base(tiny_model, "float32", "cpu")).train()
    twin = copy.deepcopy(model)
    for parameter in trainable_parameters(twin):
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.tensor([[5, 6, 7]])
    fused = twin(input_ids=ids).logits
    assert torch.allclose(fused, twin.eval()(input_ids=ids).logits, atol=1e-4)
    assert not torch.allclose(fused, model(input_ids=ids).logits, atol=1e-2)


def test_dropout_goes_the_libraries_way(tiny_model: Path) -> None:
    method = LoRA(rank=4, dropout=0.5)
    model = method.apply(method.load_base(tiny_model, "float32", "cpu")).train()
    for parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_norm_that_only_bears_the_name_is_left_alone() -> None:
    class ShiftedRMSNorm(torch.nn.Module):
        """As Gemma's: the weight is a difference from one."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.zeros(8), requires_grad=False), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = F.rms_norm(x, (8,), 1 + self.weight, self.variance_epsilon)
            return found

    norm = ShiftedRMSNorm()
    with fused_norms(norm):
        assert "forward" not in vars(norm)


@pytest.mark.slow
def test_compiled_layers_train_what_the_others_do_and_are_plain_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as for a compiler, and run without one: that takes a minute here."""
    plain, called = torch.nn.Module.compile, []

    def traced(self: torch.nn.Module, **settings: Any) -> None:
        called.append(type(self).__name__)
        plain(self, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    curves = []
    for wanted in (False, True):
        base = LoRA(rank=4).load_base(tiny_model, "float32", "cpu")
        torch.manual_seed(0)
        model = LoRA(rank=4).apply(base)
        rows = [Encoded(tuple(range(3, 3 + n)), (IGNORED,) * 2 + tuple(range(5, 3 + n))) for n in (20, 18, 9)]
        settings = LoopSettings(5e-3, 2, 24, evaluations=1, compile=wanted)
        done = train(model, base, rows, rows, settings, pad_id=0, device="cpu", report=lambda _: None)
        curves.append([p.eval_loss for p in done.points])
        assert all(layer._compiled_call_impl is None for layer in base.model.layers)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert called == ["LlamaDecoderLayer"] * 2


def test_freed_memory_is_kept_while_training_and_then_given_back() -> None:
    """In a process of its own, whose heap nobody else has filled."""
    code = """
import psutil, torch
from regraft.training.memory import freed_memory_kept, _glibc
def used(): return psutil.Process().memory_info().rss / 2**20
torch.ones(2**20).sum()
before = used()
with freed_memory_kept("cpu"):
    held = [torch.ones(2**20) for _ in range(64)]
    full = used()
    del held
    inside = used()
print(int(_glibc() is not None), full - before, inside - before, used() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    known, full, inside, after = map(float, done.stdout.split())
    assert full > 240
    if known:
        assert inside > 240
        assert after < 60
