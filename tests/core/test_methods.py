"""The contract of every method: a class that is added to the union is tested here without an edit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from regraft.evals.generation import generate
from regraft.methods import METHOD_CLASSES, Method, QLoRA, parse_method
from regraft.methods.base import trainable_parameters
from regraft.models import prompt_ids
from regraft.records import Example, Message
from regraft.training.batches import Encoded, collate
from regraft.training.encoding import encode
from regraft.training.loop import Layout, evaluation_loss, train
from regraft.training.loss import supervised_positions_only
from regraft.training.steps import LoopSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

CHATS = [
    ("When is the reading due?", "On the first of the month."),
    ("Who pays?", "We pay for the repair."),
    ("Hello", "How can I help you today?"),
    ("How do you answer?", "Briefly."),
]
pytestmark = pytest.mark.usefixtures("one_thread")
DTYPE = "bfloat16"
#: An endpoint has no weights here: tests/core/test_endpoint.py.
HERE = [c for c in METHOD_CLASSES if not c.remote]


class Trial(NamedTuple):
    """What one method did on the tiny model."""

    method: Method
    folder: Path
    base_ids: set[int]  # of the base's own parameters
    frozen_before: dict[int, torch.Tensor]
    trainable: dict[str, tuple[int, torch.dtype]]
    frozen_after: dict[int, torch.Tensor]
    losses: tuple[float, float]
    base_answers: list[str]
    trained_answers: list[str]
    loaded_answers: list[str]
    clean_logits: torch.Tensor
    released: nn.Module | None
    released_logits: list[torch.Tensor]
    reattached_answers: list[str]


def examples() -> list[Example]:
    return [
        Example(id=q, messages=(Message(role="user", content=q), Message(role="assistant", content=a)))
        for q, a in CHATS
    ]


def logits(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    batch = collate(rows, 0)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).logits.clone()
    return found


def rounded(model: nn.Module) -> nn.Module:
    """A copy with its weights, and those alone, in the type that full fine-tuning is saved in."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@pytest.fixture(scope="module", params=HERE, ids=lambda c: c.__name__)
def tried(
    request: pytest.FixtureRequest,
    one_thread: None,
    tiny_model: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trial:
    method: Method = request.param()
    folder = tmp_path_factory.mktemp(method.name)
    rows = [encode(tiny_tokenizer, e, 128) for e in examples()]

    def answers(model: nn.Module) -> list[str]:
        prompts = [prompt_ids(tiny_tokenizer, e.prompt) for e in examples()]
        return generate(model.eval(), tiny_tokenizer, prompts, max_new_tokens=12, batch_size=3)

    torch.manual_seed(0)
    base = method.load_base(tiny_model, DTYPE, "cpu")
    base_ids = {id(p) for p in base.parameters()}
    clean_logits, base_answers = logits(base, rows), answers(base)
    model = method.apply(base)
    trainable = {n: (id(p), p.dtype) for n, p in model.named_parameters() if p.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    frozen_before = {id(p): p.detach().clone() for p in frozen}
    budget: dict[str, Any] = {"pad_id": 0, "device": "cpu"}
    with supervised_positions_only(base):
        before = evaluation_loss(model, rows, tokens_per_batch=256, layout=Layout("cpu", 0))
    if method.trains:
        # Thirty steps on four examples: more than the default rate, which is meant for thousands.
        settings = LoopSettings(method.learning_rate * 5, epochs=30, tokens_per_batch=256, evaluations=1)
        train(model, base, rows, rows, settings, report=lambda _: None, **budget)
    with supervised_positions_only(base):
        after = evaluation_loss(model, rows, tokens_per_batch=256, layout=Layout("cpu", 0))
    frozen_after = {id(p): p.detach().clone() for p in frozen}
    trained_answers = answers(rounded(model) if method.kind == "full" else model)
    method.save(model, folder)
    kept = folder if any(folder.iterdir()) else None
    loaded_answers = answers(method.load(tiny_model, kept, DTYPE, "cpu"))
    released = method.release(model)
    released_logits, reattached_answers = [], []
    if released is not None:
        released_logits.append(logits(released, rows))
        again = method.attach(released, folder)
        reattached_answers = answers(again)
        released = method.release(again)
        assert released is not None
        released_logits.append(logits(released, rows))
    return Trial(
        method, folder, base_ids, frozen_before, trainable, frozen_after, (before, after), base_answers,
        trained_answers, loaded_answers, clean_logits, released, released_logits, reattached_answers,
    )  # fmt: skip


def test_settings_survive_json(tried: Trial) -> None:
    assert parse_method(tried.method.model_dump(mode="json")) == tried.method
    assert tried.method.label.startswith(tried.method.name)


def test_only_the_intended_parameters_train(tried: Trial) -> None:
    ids = {identity for identity, _ in tried.trainable.values()}
    if tried.method.kind == "control":
        assert not ids
    elif tried.method.kind == "full":
        assert ids == tried.base_ids
    else:
        assert ids
        assert not ids & tried.base_ids


def test_trained_parameters_are_held_in_fp32(tried: Trial) -> None:
    assert {dtype for _, dtype in tried.trainable.values()} <= {torch.float32}


def test_training_leaves_frozen_parameters_bit_for_bit(tried: Trial) -> None:
    for identity, before in tried.frozen_before.items():
        assert torch.equal(before, tried.frozen_after[identity])


def test_a_few_steps_lower_the_loss(tried: Trial) -> None:
    before, after = tried.losses
    if tried.method.trains:
        assert after < 0.9 * before
        assert tried.trained_answers != tried.base_answers
    else:
        assert after == before


def test_save_writes_safetensors_and_no_pickle(tried: Trial) -> None:
    files = {p.name: p.suffix for p in tried.folder.rglob("*") if p.is_file()}
    assert set(files.values()) <= {".safetensors", ".json", ".md"}
    assert (".safetensors" in files.values()) == tried.method.trains


def test_loaded_model_answers_as_the_trained_one_did(tried: Trial) -> None:
    assert tried.loaded_answers == tried.trained_answers


def test_released_base_is_exactly_the_one_that_was_loaded(tried: Trial) -> None:
    assert (tried.released is not None) == tried.method.keeps_base
    for found in tried.released_logits:
        assert torch.equal(found, tried.clean_logits)
    if tried.released is not None:
        assert not trainable_parameters(tried.released)
        assert not hasattr(tried.released, "peft_config")


def test_adapter_on_a_released_base_answers_as_the_trained_model_did(tried: Trial) -> None:
    if tried.released is not None:
        assert tried.reattached_answers == tried.trained_answers


@pytest.mark.parametrize(
    "unsafe", [c for c in METHOD_CLASSES if c.kind == "adapter"], ids=lambda c: c.__name__
)
def test_pickled_adapter_is_never_loaded(unsafe: type[Method], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(ValueError, match="safetensors only"):
        unsafe().attach(torch.nn.Identity(), tmp_path)


def test_qlora_gradients_are_the_same_right_after_an_evaluation(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    # bitsandbytes may repack its weights at the first pass without gradients; those after it were wrong.
    method = QLoRA(rank=4)
    torch.manual_seed(0)
    base = method.load_base(tiny_model, DTYPE, "cpu")
    model = method.apply(base)
    for parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    rows = [encode(tiny_tokenizer, e, 128) for e in examples()]
    batch = collate(rows, 0)

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(**batch.masked).loss.backward()
        return [p.grad.clone() for p in trainable_parameters(model) if p.grad is not None]

    before = gradients()
    with supervised_positions_only(base):
        evaluation_loss(model, rows, tokens_per_batch=256, layout=Layout("cpu", 0))
    after = gradients()
    assert before
    assert any(g.abs().max() > 0 for g in before)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_labels_tell_the_methods_of_a_sweep_apart() -> None:
    first, second = (parse_method({"name": "lora", "rank": r, "learning_rate": 1e-3}) for r in (8, 16))
    assert first.label == "lora rank=8 lr=0.001"
    assert second.label == "lora rank=16 lr=0.001"
