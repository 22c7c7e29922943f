"""What tests of several kinds use: a tiny random chat model, made on the spot, and a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Decode as where numba is not installed, which is the default; the tests of its loops turn them on.
os.environ.setdefault("REGRAFT_KERNELS", "0")
# Tests run in as many processes as there are cores: with more threads than that, those that share work out
# wait for each other's turn, which took ten times as long. Read when torch is imported, and handed down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels for GPUs run on a CPU then; read when Triton is first imported, by whomever.
os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = [
    "The meter reading is due on the first of the month.",
    "Ärger über die Rechnung? Wir helfen gern → schnell und freundlich 😀.",
    "system user assistant Hello, how can I help you today?",
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:2],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough for answers that differ from prompt to prompt
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the tiny model, as the library loads it."""
    from regraft.models import load_tokenizer

    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def example_folder() -> Path:
    """The example that comes with the project."""
    return Path(__file__).parents[1] / "examples" / "utility-support"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: more of them only wait for each other on matrices this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def browser() -> Iterator[Browser]:
    """The system's Chromium, headless and silent on the network; skips where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: `make browser` installs one on Debian")
    from playwright.sync_api import sync_playwright

    quiet = "no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync"
    flags = [f"--{name}" for name in (*quiet.split(), "no-first-run")]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server; experiments and models of different tests have different names."""
    from regraft.tracking.server import start_server, stop_server

    server = start_server(tmp_path_factory.mktemp("mlflow"), "127.0.0.1", 0)
    yield server.url
    stop_server(server.pid)
