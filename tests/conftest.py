"""Settings of all tests."""

import pytest
import torch

from minitune.checkpoint import save_model
from minitune.model import BertForMaskedLM
from minitune.tokenizer import Tokenizer

# The tensors here are tiny: a second thread gains nothing, and on a busy machine it is waited for.
torch.set_num_threads(1)


@pytest.fixture
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def tokenizer(request):
    """Learned from TEXTS of the test's module, as large as its CONFIG says."""
    return Tokenizer.train(request.module.TEXTS, vocab_size=request.module.CONFIG.vocab_size)


@pytest.fixture
def base(request, tmp_path, tokenizer):
    """The directory of a pretrained model of the shape in CONFIG of the test's module."""
    directory = tmp_path / "base"
    directory.mkdir()
    save_model(BertForMaskedLM(request.module.CONFIG), tokenizer, directory)
    return directory
