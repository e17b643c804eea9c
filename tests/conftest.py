"""Makes `import vectors` work from every test folder, and keeps tests off the network."""

import os
import sys
from pathlib import Path

# Before torch starts its threads: several test processes on few cores must not wait by spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line has it

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A tiny random BERT and its tokenizer."""
    import tiny

    return tiny.save_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def pooled_folder(tmp_path_factory):
    """The same as a sentence-transformers folder that averages its token states."""
    import tiny

    return tiny.save_bert(tmp_path_factory.mktemp("models") / "tiny-pooled", pooled=True)


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory):
    """96 labelled sentences in a jsonl file."""
    import tiny

    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "two.jsonl", tiny.sentences(96))
