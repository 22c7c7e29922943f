"""What a trial will need is found without weights, and holds for the model with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from regraft.errors import InfeasibleTrialError, ModelError
from regraft.methods import METHOD_CLASSES, Full, LoRA, Method, PromptTuning, QLoRA, ZeroShot
from regraft.methods.base import trainable_parameters
from regraft.training.batches import IGNORED, Encoded, split
from regraft.training.loop import train
from regraft.training.memory import require_memory
from regraft.training.preflight import (
    CARDS,
    GIB,
    Batching,
    flops_per_token,
    mend,
    micro_tokens,
    on_card,
    predict,
    shape_of,
    trained_by,
)
from regraft.training.steps import LoopSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The published sizes of Llama 3 (Grattafiori et al., arXiv:2407.21783, table 3).
LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 128_256, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
TRAINING = [c for c in METHOD_CLASSES if c.kind != "control"]


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-70b")
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return folder


def gib(method: Method, folder: Path, batching: Batching, device: str = "cuda") -> float:
    return predict(method, folder, "bfloat16", device, batching).training_gib


def test_sizes_are_those_of_the_loaded_model(tiny_model: Path) -> None:
    model = ZeroShot().load_base(tiny_model, "bfloat16", "cpu")
    assert shape_of(tiny_model).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", TRAINING, ids=lambda c: c.__name__)
def test_trained_parameters_are_counted_without_weights(
    kind: Callable[[], Method], tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    method = kind()
    model = method.apply(method.load_base(tiny_model, "bfloat16", "cpu"))
    assert trained_by(method, tiny_model) == sum(p.numel() for p in trainable_parameters(model))


@pytest.mark.parametrize("kind", TRAINING, ids=lambda c: c.__name__)
def test_more_at_once_needs_more(kind: Callable[[], Method], llama_70b: Path) -> None:
    method = kind()
    if "initial_text" in type(method).model_fields:
        method = method.model_copy(update={"initial_text": None})
    small, large = Batching(1024, 512), Batching(4096, 512)
    assert gib(method, llama_70b, small) < gib(method, llama_70b, large)
    assert gib(method, llama_70b, large._replace(gradient_checkpointing=True)) < gib(method, llama_70b, large)
    assert gib(method, llama_70b, small._replace(shards=8)) < gib(method, llama_70b, small)


def test_a_70b_model_in_four_bits_needs_the_room_that_four_bits_need(llama_70b: Path) -> None:
    shape = shape_of(llama_70b)
    assert shape.parameters == 70_553_706_496  # as published for Llama 3 70B
    # Linear layers at 4 + 8/64 + 32/(64*256) bits, embeddings and head in bf16: by hand, 37.1 GiB.
    linear = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert shape.linear == linear
    by_hand = (linear * (4 + 0.125 + 32 / 16384) / 8 + 2 * 2 * 128_256 * 8192) / GIB
    found = predict(QLoRA(rank=16), llama_70b, "bfloat16", "cuda", Batching(1024, 1024, True))
    assert found.weights / GIB == pytest.approx(by_hand, rel=0.001)
    fits = {name: on_card(QLoRA(), llama_70b, Batching(4096, 1024), size) for name, size in CARDS.items()}
    assert fits["24 GB"].startswith("sharded over")
    assert not fits["80 GB"].startswith(("sharded", "no"))
    # 16 bytes a parameter are 1.05 TiB.
    assert on_card(Full(), llama_70b, Batching(4096, 1024), 80e9) in ("sharded over 16", "sharded over 32")


def test_a_mend_is_one(llama_70b: Path) -> None:
    wanted = Batching(16_384, 1024)
    limit = gib(QLoRA(), llama_70b, wanted) * 0.6
    said = mend(QLoRA(), llama_70b, "bfloat16", "cuda", wanted, limit)
    tokens = micro_tokens(QLoRA(), llama_70b, "bfloat16", "cuda", wanted, limit)
    assert f"micro-batches of {tokens} tokens" in said
    assert gib(QLoRA(), llama_70b, wanted._replace(tokens_per_batch=tokens)) <= limit
    assert gib(QLoRA(), llama_70b, wanted._replace(tokens_per_batch=2 * tokens)) > limit
    assert mend(QLoRA(), llama_70b, "bfloat16", "cuda", wanted, 10) == (
        "does not fit with smaller batches either"
    )


def test_operations_of_a_token_follow_what_is_computed(llama_70b: Path) -> None:
    shape, batching = shape_of(llama_70b), Batching()
    full, lora = (flops_per_token(m, llama_70b, batching) for m in (Full(), LoRA()))
    assert 6 * shape.linear < full < 6.5 * shape.linear
    assert 4 * shape.linear < lora < 4.5 * shape.linear
    again = flops_per_token(LoRA(), llama_70b, batching._replace(gradient_checkpointing=True))
    assert again - lora == 2 * shape.linear


def test_a_config_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match=r"no-such-model"):
        shape_of(tmp_path)


def test_a_refusal_names_what_is_needed_and_the_mend(llama_70b: Path) -> None:
    with pytest.raises(InfeasibleTrialError) as refused:
        require_memory(QLoRA(), llama_70b, "bfloat16", "cuda", 24, Batching(4096, 1024))
    assert "memory: qlora" in refused.value.problem
    assert "24" in refused.value.problem


def test_pieces_hold_what_the_batch_held() -> None:
    rows = [Encoded(tuple(range(n)), (IGNORED,) * n) for n in (9, 7, 5, 3)]
    assert split(rows, 0) == [rows]
    assert split(rows, 18) == [rows[:2], rows[2:]]
    assert split(rows, 5) == [[r] for r in rows]  # a row is never cut


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("settings", [{"name": "lora"}, {"name": "full"}], ids=lambda s: s["name"])
def test_micro_batches_train_what_whole_batches_train(settings: dict[str, Any], tiny_model: Path) -> None:
    import torch

    from regraft.methods import parse_method

    draw = torch.Generator().manual_seed(0)
    lengths = [12, 14, 20, 31, 8, 26]
    rows = []
    for length in lengths:
        ids = tuple(torch.randint(3, 300, (length,), generator=draw).tolist())
        rows.append(Encoded(ids, (IGNORED,) * (length // 2) + ids[length // 2 :]))
    curves, passed = [], []
    for micro in (0, 32):
        method = parse_method(settings)
        torch.manual_seed(0)
        base = method.load_base(tiny_model, "float32", "cpu")
        model = method.apply(base)
        widths: list[int] = []
        hook = base.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
            lambda _, inputs, widths=widths: (
                widths.append(inputs[0].numel()) if torch.is_grad_enabled() else None
            )
        )
        loop = LoopSettings(1e-3, 3, 128, evaluations=3, micro_tokens=micro)
        outcome = train(model, base, rows, rows, loop, pad_id=0, device="cpu", report=lambda _: None)
        hook.remove()
        curves.append([(p.train_loss, p.eval_loss) for p in outcome.points])
        passed.append(max(widths))
    assert passed[1] <= 32 < passed[0]
    # Full fine-tuning computes in bf16 under autocast: the order of sums shows.
    assert torch.tensor(curves[1]) == pytest.approx(torch.tensor(curves[0]), rel=0.01)


def test_methods_with_virtual_tokens_count_them(tiny_model: Path) -> None:
    few, many = (PromptTuning(virtual_tokens=n, initial_text=None) for n in (4, 64))
    assert gib(few, tiny_model, Batching()) < gib(many, tiny_model, Batching())
