"""Answers are those that `generate` gives to each prompt alone, however many are answered together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from regraft.evals.generation import base_of, end_ids, generate, measure_speed, new_tokens
from regraft.evals.slots import Slots, understands
from regraft.methods import parse_method
from regraft.methods.base import trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {},
    "lora": {"rank": 4},
    "qlora": {"rank": 4},
    "ia3": {},
    "prompt_tuning": {"virtual_tokens": 5},
    "p_tuning": {"virtual_tokens": 5},
    "prefix_tuning": {"virtual_tokens": 5},
}
LENGTHS = (3, 40, 7, 7, 90, 1, 12, 25, 60, 5, 18)


def prompts_of(vocabulary: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in lengths]


def alone(model: Any, prompt: Sequence[int], longest: int, ends: Sequence[int]) -> list[int]:
    """What `generate` of transformers or PEFT answers to one prompt, without what ends it."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
            max_new_tokens=longest, eos_token_id=list(ends), pad_token_id=0,
        )[0].tolist()  # fmt: skip
    found = out[len(prompt) :] if out[: len(prompt)] == list(prompt) else out
    at = next((i for i, token in enumerate(found) if token in ends), len(found))
    return found[:at]


def some_end(answers: Sequence[Sequence[int]]) -> int:
    """A token that would end some of these answers early, and not all."""
    counts = Counter(token for answer in answers for token in set(answer[1:]))
    return next(token for token, count in counts.most_common() if count <= len(answers) * 2 / 3)


def cut(answers: Sequence[Sequence[int]], end: int) -> list[list[int]]:
    return [list(itertools.takewhile(lambda token: token != end, answer)) for answer in answers]


def small(family: str) -> Any:
    """A random model that looks back, so that its answers are of many kinds."""
    config = transformers.AutoConfig.for_model(family, **(SMALL | FAMILIES[family][0]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module", params=METHODS, ids=str)
def adapted(request: pytest.FixtureRequest, one_thread: None, tiny_model: Path) -> Any:
    method = parse_method({"name": request.param} | METHODS[request.param])
    torch.manual_seed(0)
    model = method.apply(method.load_base(tiny_model, "float32", "cpu"))
    for parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_answers_are_those_of_generate_one_by_one(
    adapted: Any, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = prompts_of(len(tiny_tokenizer))
    config = base_of(adapted).generation_config
    assert understands(base_of(adapted))
    end = int(tiny_tokenizer.eos_token_id)
    whole = [alone(adapted, p, 16, [end]) for p in prompts]
    config.eos_token_id = [end, some_end(whole)]
    try:
        wanted = [alone(adapted, p, 16, config.eos_token_id) for p in prompts]
        assert wanted == cut(whole, config.eos_token_id[1])
        assert len({len(answer) for answer in wanted}) > 2, "some end early, at different places"
        for size in (3, 50):
            found = new_tokens(adapted, tiny_tokenizer, prompts, max_new_tokens=16, batch_size=size)
            assert found == wanted
        lone = new_tokens(adapted, tiny_tokenizer, prompts[:1], max_new_tokens=16, batch_size=8)
        assert lone == wanted[:1]
        first = new_tokens(adapted, tiny_tokenizer, prompts, max_new_tokens=1, batch_size=4)
        assert first == [answer[:1] for answer in wanted]
    finally:
        config.eos_token_id = end


def test_wherever_answers_end_the_others_are_the_same(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = parse_method({"name": "zero_shot"}).load(tiny_model, None, "float32", "cpu")
    prompts = prompts_of(len(tiny_tokenizer))
    end = int(tiny_tokenizer.eos_token_id)
    whole = [alone(model, p, 40, [end]) for p in prompts]
    # The first tokens of answers too: those end where they begin, some as soon as they are let in.
    for early in {some_end(whole), *(answer[0] for answer in whole[:6])}:
        model.generation_config.eos_token_id = [end, early]
        wanted = cut(whole, early)
        for size in (1, 2, 3, 5):
            done: list[int] = []
            found = new_tokens(
                model, tiny_tokenizer, prompts, max_new_tokens=40, batch_size=size, progress=done.append
            )
            assert found == wanted
            assert done == list(range(1, len(prompts) + 1))


def test_no_prompts_have_no_answers(tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = parse_method({"name": "zero_shot"}).load(tiny_model, None, "float32", "cpu")
    assert generate(model, tiny_tokenizer, [], max_new_tokens=4, batch_size=2) == []


SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 140, "tie_word_embeddings": False,
}  # fmt: skip
#: Positions that are rotated, learned (and at their end with the longest prompt), and biases of attention;
#: then what is left to `generate`: windows, and inputs that a model prepares itself.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "qwen3": ({"head_dim": 8}, True),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 110}, True),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 110}, True),
    "bloom": ({"n_layer": 2, "n_head": 4}, True),
    "mistral": ({"sliding_window": 8}, False),
    "phi3": ({}, False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_position_and_cache_is_answered_alike(
    family: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = small(family)
    assert understands(model) == FAMILIES[family][1]
    prompts = prompts_of(300)
    ends = sorted(end_ids(model, tiny_tokenizer))
    wanted = [alone(model, p, 20, ends) for p in prompts]
    assert len({tuple(answer[-6:]) for answer in wanted}) > len(wanted) // 2
    for size in (3, 6):
        assert new_tokens(model, tiny_tokenizer, prompts, max_new_tokens=20, batch_size=size) == wanted


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("repetition_penalty", 1.5),
        ("suppress_tokens", [5, 9]),
        ("min_new_tokens", 6),
        ("forced_eos_token_id", 2),
    ],
)
def test_what_a_model_asks_of_every_token_is_left_to_generate(
    setting: str, value: Any, tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = parse_method({"name": "zero_shot"}).load(tiny_model, None, "float32", "cpu")
    assert understands(model)
    setattr(model.generation_config, setting, value)
    assert not understands(model)
    prompts = prompts_of(len(tiny_tokenizer))[:4]
    wanted = [alone(model, p, 12, [int(tiny_tokenizer.eos_token_id)]) for p in prompts]
    assert new_tokens(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=2) == wanted


def test_sampling_that_a_model_asks_for_is_left_out(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = parse_method({"name": "zero_shot"}).load(tiny_model, None, "float32", "cpu")
    prompts = prompts_of(len(tiny_tokenizer))[:4]
    wanted = new_tokens(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=2)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=1.0)
    assert understands(model)
    assert new_tokens(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=2) == wanted


def test_a_place_that_is_free_goes_to_the_next_prompt(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = parse_method({"name": "zero_shot"}).load(tiny_model, None, "float32", "cpu")
    prompts = prompts_of(len(tiny_tokenizer), lengths=[8] * 40)
    end = some_end([alone(model, p, 40, [2]) for p in prompts])
    model.generation_config.eos_token_id = [int(tiny_tokenizer.eos_token_id), end]
    rows: list[int] = []
    step = Slots.step

    def counted(self: Slots, tokens: Sequence[int]) -> Any:
        rows.append(self.used)
        return step(self, tokens)

    monkeypatch.setattr(Slots, "step", counted)
    found = new_tokens(model, tiny_tokenizer, prompts, max_new_tokens=40, batch_size=6)
    static = sum(max(len(answer) for answer in found[i : i + 6]) for i in range(0, 40, 6))
    assert max(rows) == 6
    assert rows[-1] < 6, "places are given up when no prompts wait"
    assert len(rows) < 0.8 * static


def test_a_free_place_does_not_run_out_of_learned_positions(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = small("gpt2")
    prompts = prompts_of(300, lengths=[91] * 40)  # and 19 new tokens to read: all 110 positions
    end = some_end([alone(model, p, 20, [2]) for p in prompts])
    model.generation_config.eos_token_id = [2, end]
    wanted = [alone(model, p, 20, [2, end]) for p in prompts]
    assert {len(answer) for answer in wanted} > {20}
    for size in (8, 12):
        assert new_tokens(model, tiny_tokenizer, prompts, max_new_tokens=20, batch_size=size) == wanted


def test_speed_tells_the_first_token_from_those_after_it(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = parse_method({"name": "zero_shot"}).load(tiny_model, None, "float32", "cpu")
    prompts = prompts_of(len(tiny_tokenizer))[:3]
    found = measure_speed(model, tiny_tokenizer, prompts, max_new_tokens=8, threads=1)
    assert found.first_token_p95_ms is not None
    assert found.token_p50_ms is not None
    assert found.token_p95_ms is not None
    assert 0 < found.token_p50_ms <= found.token_p95_ms < found.latency_p95_ms
    assert 0 < found.first_token_p50_ms <= found.first_token_p95_ms < found.latency_p95_ms
    assert found.how.startswith("3 prompts one by one")
    assert found.how.endswith(".")
    lone = measure_speed(model, tiny_tokenizer, prompts, max_new_tokens=1, threads=1)
    assert lone.token_p50_ms is None
    assert "token_p50_ms" not in lone.figures
    assert lone.figures["first_token_p95_ms"] > 0
