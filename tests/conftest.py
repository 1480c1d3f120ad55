"""Settings of all tests."""

import pytest
import torch

import minitune.corpus
from minitune.checkpoint import save_model
from minitune.model import BertForMaskedLM
from minitune.tokenizer import Tokenizer

# The tensors here are tiny: a second thread gains nothing, and on a busy machine it is waited for.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory):
    """Corpora that a test tokenises, in another process too, do not go to data/cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minitune.corpus, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.setenv("MINITUNE_CACHE", str(minitune.corpus.CACHE))
        yield


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
