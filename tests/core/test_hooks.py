"""What methods do in the loop beside taking gradients: AdaLoRA's budget of ranks, QLoRA's optimiser."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.adalora import AdaLoraModel

from regraft.errors import InfeasibleTrialError
from regraft.methods import AdaLoRA, QLoRA
from regraft.methods.base import trainable_parameters
from regraft.training.batches import IGNORED, Encoded, collate
from regraft.training.loop import train
from regraft.training.steps import LoopSettings

pytestmark = pytest.mark.usefixtures("one_thread")
METHOD = AdaLoRA(rank=2, initial_rank=4, learning_rate=2e-2)
SETTINGS = LoopSettings(2e-2, epochs=10, tokens_per_batch=60, evaluations=1)


def rows() -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for length in (30, 28, 25, 22, 20):
        ids = tuple(torch.randint(3, 300, (length,), generator=draw).tolist())
        made.append(Encoded(ids, (IGNORED,) * 4 + ids[4:]))
    return made


def trained(folder: Path, method: AdaLoRA = METHOD, settings: LoopSettings = SETTINGS) -> Any:
    torch.manual_seed(0)
    base = method.load_base(folder, "float32", "cpu")
    model = method.apply(base)
    train(
        model, base, rows(), rows()[:1], settings, pad_id=0, device="cpu", report=lambda _: None,
        hooks=method.hooks(model),
    )  # fmt: skip
    return model


def ranks(model: Any) -> list[int]:
    return [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name]


def test_training_ends_with_as_many_ranks_as_asked_for_shared_out_unevenly(tiny_model: Path) -> None:
    found = ranks(trained(tiny_model))
    assert sum(found) == METHOD.rank * len(found)
    assert len(set(found)) > 1
    assert max(found) <= METHOD.start_rank


def test_ranks_fall_over_the_middle_of_the_run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = AdaLoraModel.update_and_allocate

    def noting(self: Any, step: int) -> None:
        plain(self, step)
        seen.append(sum(ranks(self.model)))

    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", noting)
    layers = len(ranks(trained(tiny_model)))
    steps = len(seen)
    first, last = int(METHOD.first_share * steps), int(METHOD.last_share * steps)
    assert seen[:first] == [METHOD.start_rank * layers] * first
    assert seen[-last - 1 :] == [METHOD.rank * layers] * (last + 1)
    assert all(a >= b for a, b in itertools.pairwise(seen))
    assert len(set(seen)) > 5


def test_the_penalty_is_that_of_peft_and_counts_once_a_step(tiny_model: Path) -> None:
    method = METHOD.model_copy(update={"orthogonality": 0.5})
    base = method.load_base(tiny_model, "float32", "cpu")
    model: Any = method.apply(base)
    batch = collate(rows(), 0).masked
    with torch.no_grad():
        theirs = AdaLoraModel.forward(model.base_model, **batch).loss - model(**batch).loss
    mine = method.hooks(model).penalty()
    assert mine is not None
    assert float(mine.detach()) == pytest.approx(float(theirs), rel=1e-4)
    # A batch that passes in parts takes the same step.
    strong = METHOD.model_copy(update={"orthogonality": 5.0})
    whole, parts = (
        trained(tiny_model, strong, SETTINGS._replace(micro_tokens=micro, epochs=2)) for micro in (0, 30)
    )
    for a, b in zip(trainable_parameters(whole), trainable_parameters(parts), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_rank_that_scales_is_not_trained(tiny_model: Path) -> None:
    base = METHOD.load_base(tiny_model, "bfloat16", "cpu")
    trained = [name for name, p in METHOD.apply(base).named_parameters() if p.requires_grad]
    assert trained
    assert not any("ranknum" in name for name in trained)


def test_a_run_too_short_to_share_out_ranks_is_infeasible(tiny_model: Path) -> None:
    with pytest.raises(InfeasibleTrialError, match="3 steps are too few to share out ranks, it takes 4"):
        trained(tiny_model, settings=SETTINGS._replace(epochs=1))


def test_the_paged_optimiser_is_left_to_cuda(tiny_model: Path) -> None:
    base = QLoRA().load_base(tiny_model, "float32", "cpu")
    model = QLoRA().apply(base)
    groups = [{"params": trainable_parameters(model)}]
    assert QLoRA().hooks(model).optimiser(groups, 1e-3) is None
