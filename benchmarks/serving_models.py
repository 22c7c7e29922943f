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
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_adapter(
    settings: dict[str, Any], base: Path, folder: Path, *, spread: float = 0.005, dtype: Any = "bfloat16"
) -> Path:
    """An adapter with random weights, saved as a trial saves it.

    Args:
        settings: Of its method.
        base: Folder of the base model.
        folder: Where to save it.
        spread: Standard deviation of what is added to the weights that it begins with.
        dtype: Type of the frozen weights.
    """
    import torch

    from regraft.methods import parse_method
    from regraft.methods.base import trainable_parameters

    method = parse_method(settings)
    torch.manual_seed(5)
    model = method.apply(method.load_base(base, dtype, "cpu"))
    with torch.no_grad():
        for weights in trainable_parameters(model):
            weights.add_(torch.randn_like(weights) * spread)
    method.save(model, folder)
    return folder


def make_tiny(folder: Path) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    torch.manual_seed(3)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ends, **TINY)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
