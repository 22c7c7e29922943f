"""Compiled loops compute what torch does, and stand in only for modules that compute what they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regraft.errors import ConfigError
from regraft.methods import parse_method

loops = pytest.importorskip("serving.engines.kernels", exc_type=ImportError)

from serving.engines.attention import attention  # noqa: E402
from serving.engines.compiled import kernels  # noqa: E402
from serving.engines.plain import replace_plain  # noqa: E402


@pytest.fixture(autouse=True)
def loops_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere tests decode as without numba, which is the default."""
    monkeypatch.setenv("REGRAFT_KERNELS", "1")


BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    share = 1e-5 if wanted.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, rtol=share, atol=share)


@BOTH
@pytest.mark.parametrize(("heads", "group", "width"), [(3, 3, 64), (2, 1, 24), (1, 4, 6)])
@pytest.mark.parametrize("masked", [True, False])
def test_rows_attend_to_what_they_may_see(
    heads: int, group: int, width: int, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values are views into larger buffers, and what stands beside them is no number."""
    torch.manual_seed(0)
    rows, columns = 5, 19
    q = torch.randn(rows, heads * group, 1, width).to(dtype)
    k, v = (torch.full((7, heads, 40, width), torch.nan, dtype=dtype) for _ in "kv")
    k, v = (b[:rows, :, 3 : 3 + columns].copy_(torch.randn(rows, heads, columns, width)) for b in (k, v))
    mask = torch.rand(rows, 1, 1, columns) > 0.4 if masked else None
    if mask is not None:
        mask[..., -1] = True
        k[0, :, 0], v[0, :, 0], mask[0, ..., 0] = torch.nan, torch.nan, False
    wanted = torch.stack([
        nn.functional.scaled_dot_product_attention(
            q[row].float(),
            *(t[row][:, slice(None) if mask is None else mask[row, 0, 0]].float().repeat_interleave(group, 0) for t in (k, v)),
        )
        for row in range(rows)
    ]).to(dtype).transpose(1, 2)  # fmt: skip

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this was for the loop")

    monkeypatch.setattr("serving.engines.attention.sdpa_attention_forward", refuse)
    close(attention(None, q, k, v, mask)[0], wanted)


def test_what_is_not_plain_goes_to_torch() -> None:
    torch.manual_seed(0)
    module = type("Module", (), {"num_key_value_groups": 1})()
    q, k, v = (torch.randn(2, 3, n, 8) for n in (4, 4, 4))
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    close(attention(module, q, k, v, None)[0], wanted)
    added = torch.randn(2, 1, 1, 4)
    wanted = nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v, attn_mask=added).transpose(1, 2)
    close(attention(module, q[:, :, :1], k, v, added)[0], wanted)
    with pytest.raises(ValueError, match="softcap"):
        attention(module, q[:, :, :1], k, v, None, softcap=1.0)


@BOTH
@pytest.mark.parametrize("shift", [-5, 0, 5])
def test_the_likeliest_is_the_first_of_the_highest(shift: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    some = torch.randn(6, 2, 1001).add(shift).to(dtype)[:, 1]
    some[2, [17, 900]] = 50
    some[3] = -torch.inf
    found = torch.empty(6, dtype=torch.long)
    loops.highest(dtype is torch.bfloat16)(some.data_ptr(), found.data_ptr(), (6, 1001, some.stride(0)))
    assert found.tolist() == [int((row == row.max()).nonzero()[0]) for row in some]


def step_of(base: Any) -> Callable[[], torch.Tensor]:
    ids = torch.tensor([[5, 9, 11, 7], [4, 4, 8, 1]])

    def step() -> torch.Tensor:
        with torch.inference_mode():
            past = base(input_ids=ids, use_cache=True).past_key_values
            mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
            at = torch.tensor([[4], [2]])
            out = base(input_ids=ids[:, :1], attention_mask=mask, position_ids=at, past_key_values=past)
        return out.logits[:, -1]  # type: ignore[no-any-return]

    return step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_loops_says_what_it_said(dtype: str, base_folder: Path) -> None:
    base: Any = parse_method({"name": "zero_shot"}).load_base(base_folder, dtype, "cpu")
    step = step_of(base)
    wanted = step()
    layers = base.config.num_hidden_layers
    assert replace_plain(base) == 4 * layers + 1  # two norms, attention and a gated layer in each, and a norm
    apart = (step() - wanted).abs().max() / wanted.abs().max()
    assert apart < (1e-5 if dtype == "float32" else 0.05)


def test_a_module_of_another_formula_stays_as_it_is(base_folder: Path) -> None:
    """Gemma adds 1 to the weights of its norms; others have another activation, or turn neighbours."""
    base: Any = parse_method({"name": "zero_shot"}).load_base(base_folder, "float32", "cpu")
    layer = base.model.layers[0]

    class OtherRMSNorm(type(layer.input_layernorm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().forward(x)
            return found + found / self.weight

    layer.input_layernorm.__class__ = OtherRMSNorm
    layer.mlp.act_fn = nn.GELU()
    layer.self_attn.k_proj.register_forward_hook(lambda _, __, out: out.flip(-1))
    wanted = step_of(base)()
    assert replace_plain(base) == 4 * base.config.num_hidden_layers + 1 - 2
    assert "forward" not in vars(layer.input_layernorm) and "forward" not in vars(layer.mlp)
    close(step_of(base)(), wanted)


def test_an_attention_that_is_written_otherwise_keeps_its_code(base_folder: Path) -> None:
    base: Any = parse_method({"name": "zero_shot"}).load_base(base_folder, "float32", "cpu")
    some = base.model.layers[0].self_attn

    class Other(type(some)):  # type: ignore[misc]
        def forward(self, *given: Any, **more: Any) -> Any:
            out, weights = super().forward(*given, **more)
            return out * 2, weights

    some.__class__ = Other
    wanted = step_of(base)()
    replace_plain(base)
    assert "forward" not in vars(some)
    close(step_of(base)(), wanted)


def test_a_module_that_reads_something_else_stays_as_it_is(base_folder: Path) -> None:
    base: Any = parse_method({"name": "zero_shot"}).load_base(base_folder, "float32", "cpu")
    layer = base.model.layers[0]
    mlp = layer.mlp
    mlp.forward = lambda x, *, share: type(mlp).forward(mlp, x) * share
    before = mlp.forward
    replace_plain(base)
    assert mlp.forward is before


def test_loops_can_be_turned_off(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = parse_method({"name": "zero_shot"}).load_base(base_folder, "float32", "cpu")
    assert kernels(base) is loops
    monkeypatch.setenv("REGRAFT_KERNELS", "0")
    assert kernels(base) is None
    assert replace_plain(base) == 0
    monkeypatch.setenv("REGRAFT_KERNELS", "off")
    with pytest.raises(ConfigError, match="REGRAFT_KERNELS"):
        kernels(base)
