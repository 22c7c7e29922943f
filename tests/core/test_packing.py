"""Examples that share a row: each sees itself alone, and training computes what it would for padded rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from regraft.errors import InfeasibleTrialError
from regraft.methods import METHOD_CLASSES, LoRA, Method
from regraft.methods.base import trainable_parameters
from regraft.training.batches import IGNORED, Encoded, collate, pack, shared_prefix
from regraft.training.kernels import blocks, fast_kernels
from regraft.training.loop import train
from regraft.training.loss import supervised_positions_only
from regraft.training.modes import checkpointing
from regraft.training.packing import may_share, require_packable
from regraft.training.steps import LoopSettings

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
PACKING = [c for c in METHOD_CLASSES if c.kind != "control" and c.support.packs]


def row(length: int, seed: int, prompt: int = 3) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(3, 300, (length,), generator=draw).tolist())
    return Encoded(ids, (IGNORED,) * prompt + ids[prompt:])


#: Of several groups of like length, one of them longer than a block of queries.
ROWS = [row(n, n) for n in (150, 140, 40, 31, 12, 7)]


def states(base: Any, inputs: dict[str, Any], device: str = "cpu", *, packed: bool = True) -> torch.Tensor:
    body_inputs = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad(), fast_kernels(base, device, packed=packed):
        found: torch.Tensor = base.get_decoder()(**body_inputs, use_cache=False).last_hidden_state
    return found


def loss_and_gradients(
    model: nn.Module, base: nn.Module, batches: list[dict[str, Any]], *, packed: bool
) -> tuple[float, list[torch.Tensor]]:
    total = 0.0
    with supervised_positions_only(base), fast_kernels(base, "cpu", packed=packed):
        for inputs in batches:
            loss = model(**inputs).loss
            loss.backward()
            total += float(loss.detach())
    found = [p.grad.clone() for p in trainable_parameters(model) if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return total, found


@pytest.mark.parametrize("kind", PACKING, ids=lambda c: c.__name__)
def test_a_packed_row_gives_the_gradients_of_its_examples_one_by_one(
    kind: type[Method], tiny_model: Path
) -> None:
    method = kind()
    base = method.load_base(tiny_model, "float32", "cpu")
    torch.manual_seed(0)
    model = method.apply(base).train()
    alone = [collate([r], 0).inputs for r in ROWS]
    right = loss_and_gradients(model, base, alone, packed=False)
    loss, found = loss_and_gradients(model, base, [pack(ROWS).inputs], packed=True)
    assert loss == pytest.approx(right[0], rel=1e-5)
    for mine, theirs in zip(found, right[1], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_the_cpu_kernel_gives_the_gradients_of_the_examples_one_by_one(tiny_model: Path) -> None:
    """In bf16, where the kernel works: as near as padded rows are to rows one by one."""
    base = LoRA().load_base(tiny_model, "bfloat16", "cpu")
    torch.manual_seed(0)
    model = LoRA().apply(base).train()
    right = loss_and_gradients(model, base, [collate([r], 0).inputs for r in ROWS], packed=False)
    found = loss_and_gradients(model, base, [pack(ROWS).inputs], packed=True)
    assert found[0] == pytest.approx(right[0], rel=2e-3)
    for mine, theirs in zip(found[1], right[1], strict=True):
        assert float((mine - theirs).norm()) <= 0.03 * float(theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_one_example_reaches_another(tiny_model: Path, dtype: torch.dtype) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).eval()
    changed = [*ROWS[:2], row(40, 99), *ROWS[3:]]
    before, after = (states(base, pack(rows).inputs)[0] for rows in (ROWS, changed))
    start, end = 290, 330
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.allclose(before[start:end], after[start:end], atol=0.1)


BEGUN = row(30, 77, prompt=30)


def begun_alike(lengths: tuple[int, ...] = (120, 40, 31, 12, 7)) -> list[Encoded]:
    """Examples behind the same system turn; the token behind it differs, and is not supervised."""
    return [
        Encoded((*BEGUN.ids, 3 + n, *r.ids), (*BEGUN.labels, IGNORED, *r.labels))
        for n, r in enumerate(row(n, n) for n in lengths)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [True, False])
def test_what_examples_begin_with_alike_is_computed_once_with_the_same_gradients(
    dtype: Any, kept: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "KEPT_LENGTH", 512 if kept else 0)
    rows = begun_alike()
    base = LoRA().load_base(tiny_model, dtype, "cpu")
    torch.manual_seed(0)
    model = LoRA().apply(base).train()
    for parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.05)
    once = pack(rows, share=True)
    assert once.prefix == len(BEGUN.ids)
    assert once.input_ids.shape[1] == sum(len(r.ids) for r in rows) - 4 * once.prefix
    right = loss_and_gradients(model, base, [collate([r], 0).inputs for r in rows], packed=False)
    found = loss_and_gradients(model, base, [once.inputs], packed=True)
    assert found[0] == pytest.approx(right[0], rel=1e-5 if dtype == "float32" else 2e-3)
    for mine, theirs in zip(found[1], right[1], strict=True):
        off = float((mine - theirs).norm() / theirs.norm())
        assert off < (1e-4 if dtype == "float32" else 0.03)


def test_a_packed_row_can_be_computed_again(tiny_model: Path) -> None:
    found = []
    for again in (False, True):
        base = LoRA().load_base(tiny_model, "bfloat16", "cpu")
        torch.manual_seed(0)
        model = LoRA().apply(base).train()
        with checkpointing(base, again):
            found.append(
                loss_and_gradients(model, base, [pack(begun_alike(), share=True).inputs], packed=True)
            )
    assert found[0][0] == found[1][0]
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(mine, theirs)


def test_only_what_no_loss_is_taken_on_is_shared() -> None:
    same = (5, 6, 7, 8, 9, 10)
    first = Encoded((*same, 11, 12), (IGNORED,) * 6 + (11, 12))
    assert shared_prefix([first, Encoded((*same, 13), (IGNORED,) * 6 + (13,))]) == 5  # 10 asks for 11 and 13
    assert shared_prefix([first, Encoded((*same, 11, 12), (IGNORED,) * 4 + (9, 10, 11, 12))]) == 0  # too few
    assert shared_prefix([first, Encoded((*same, 11), (IGNORED,) * 7)]) == 5
    assert shared_prefix([first, Encoded((9, *same), (IGNORED,) * 7)]) == 0
    assert shared_prefix([first]) == 0


def test_dropout_and_other_attention_share_nothing(tiny_model: Path) -> None:
    base = LoRA().load_base(tiny_model, "bfloat16", "cpu")
    assert may_share(base, base, ROWS, "cpu")
    assert not may_share(base, base, ROWS, "cuda")
    dropped = LoRA(dropout=0.1).apply(base)
    assert not may_share(dropped, base, ROWS, "cpu")
    base.config._attn_implementation = "eager"
    assert not may_share(base, base, ROWS, "cpu")


def test_learnt_positions_begin_anew_with_each_example() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=512, n_embd=32, n_layer=1, n_head=2, initializer_range=0.5)
    ).eval()
    together = states(base, pack(ROWS).inputs)[0]
    alone = torch.cat([states(base, collate([r], 0).inputs, packed=False)[0] for r in ROWS])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_packed_run_trains_what_a_padded_one_does(tiny_model: Path) -> None:
    curves = []
    for packing in (False, True):
        base = LoRA().load_base(tiny_model, "float32", "cpu")
        torch.manual_seed(0)
        model = LoRA().apply(base)
        settings = LoopSettings(5e-3, 4, 200, evaluations=4, packing=packing)
        rows = begun_alike()
        done = train(model, base, rows, rows[3:], settings, pad_id=0, device="cpu", report=lambda _: None)
        curves.append([(p.step, p.tokens_seen, p.train_loss, p.eval_loss) for p in done.points])
    for packed, padded in zip(*curves, strict=True):
        assert packed == pytest.approx(padded, rel=1e-4)


def test_the_first_token_of_an_example_is_not_asked_of_the_one_before() -> None:
    batch = pack([Encoded((5, 6, 7), (5, 6, 7)), Encoded((8, 9), (8, 9))])
    assert batch.labels.tolist() == [[IGNORED, 6, 7, IGNORED, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 3, 5]


def test_a_model_that_carries_a_state_along_is_refused() -> None:
    torch.manual_seed(0)
    base = MambaForCausalLM(
        MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=8, initializer_range=0.5)
    )
    with pytest.raises(
        InfeasibleTrialError, match=r"packing: this model (gives other results|does not take)"
    ):
        require_packable(base, ROWS, "cpu")


def test_a_model_that_looks_back_over_a_few_tokens_is_refused(tiny_model: Path) -> None:
    """As layers with a short convolution do: the first tokens of an example see the end of the one before."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    def look_back(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.5 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    base.model.layers[0].mlp.register_forward_hook(look_back)
    base.config.regraft_test = "looks back"  # another kind of model than the plain one
    with pytest.raises(InfeasibleTrialError, match="gives other results for examples that share a row"):
        require_packable(base, ROWS, "cpu")


def mistral(window: int) -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=window,
        )
    ).bfloat16()  # fmt: skip


def test_a_window_shorter_than_an_example_is_refused_and_a_longer_one_is_not() -> None:
    with pytest.raises(InfeasibleTrialError, match="attends within 100 tokens, and an example has 150"):
        require_packable(mistral(100), ROWS, "cpu")
    require_packable(mistral(150), ROWS, "cpu")


def test_a_window_counts_in_padded_rows(tiny_model: Path) -> None:
    base = mistral(20).eval()
    plain = base.get_decoder()(input_ids=torch.tensor([ROWS[0].ids]), use_cache=False).last_hidden_state
    found = states(base, collate(ROWS[:1], 0).inputs, packed=False)
    assert torch.allclose(found, plain, atol=0.05)
    whole = states(mistral(200).eval(), collate(ROWS[:1], 0).inputs, packed=False)
    assert not torch.allclose(whole, plain, atol=0.05)


def test_flash_attention_by_bounds_is_asked_for_what_the_mask_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel is CUDA's alone: here a plain one takes its place, and is called as it would be."""
    from regraft.training.kernels import attention

    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int,
        max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> torch.Tensor:  # fmt: skip
        assert (cu_q.dtype, max_q, max_k, window_size, enable_gqa) == (torch.int32, 5, 5, (-1, 0), True)
        assert torch.equal(cu_q, cu_k)
        found = []
        for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
            parts = (t[None, start:end].transpose(1, 2) for t in (q, k, v))
            one = torch.nn.functional.scaled_dot_product_attention(
                *parts, is_causal=True, scale=scale, enable_gqa=enable_gqa
            )
            found.append(one[0].transpose(0, 1))
        return torch.cat(found)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    found = attention._flash_by_bounds(q, k, v, bounds, 5, 0.3)
    mask = attention._seen(12, 12, bounds, 0, "cpu")
    right = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(found, right.transpose(1, 2), atol=1e-5)
