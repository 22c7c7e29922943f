"""Models and adapters with random weights, which cost what trained ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Of a chat model with random weights: small enough that an answer costs less than carrying it.
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough for answers that differ from version to version
}  # fmt: skip
#: Of published models, from their `config.json`: Llama 3.2 1B and 3B, Llama 3.1 8B.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "llama-3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128,
                 "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
                 "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
_LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_adapter(
    settings: dict[str, Any],
    base: Path,
    folder: Path,
    *,
    spread: float = 0.005,
    dtype: Any = "bfloat16",
    device: str = "cpu",
) -> Path:
    """An adapter with random weights, saved as a trial saves it.

    Args:
        settings: Of its method.
        base: Folder of the base model.
        folder: Where to save it.
        spread: Standard deviation of what is added to the weights that it begins with.
        dtype: Type of the frozen weights.
        device: Where to make it.
    """
    import torch

    from regraft.methods import parse_method
    from regraft.methods.base import trainable_parameters

    method = parse_method(settings)
    torch.manual_seed(5)
    model = method.apply(method.load_base(base, dtype, device))
    with torch.no_grad():
        for weights in trainable_parameters(model):
            weights.add_(torch.randn_like(weights) * spread)
    method.save(model, folder)
    return folder


def make_tiny(folder: Path) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    words = _make_tokenizer(folder)
    return _make_llama(folder, words, {"vocab_size": len(words), **TINY}, "cpu", "float32")


def make_shaped(shape: str, folder: Path, device: str) -> Path:
    """A random Llama in bf16 of a published model's shape, with the tiny one's tokenizer.

    Args:
        shape: One of `SHAPES`.
        folder: Where to save it.
        device: Where to make it: a CPU takes minutes.
    """
    return _make_llama(folder, _make_tokenizer(folder), {**_LLAMA_3, **SHAPES[shape]}, device, "bfloat16")


def _make_llama(folder: Path, tokenizer: Any, shape: dict[str, Any], device: str, dtype: str) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(pad_token_id=tokenizer.pad_token_id, dtype=dtype, **ends, **shape)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    model.save_pretrained(folder)
    return folder


def _make_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator([_TEMPLATE], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=special[0],
        eos_token=special[2],
        additional_special_tokens=special[1:2],
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer
