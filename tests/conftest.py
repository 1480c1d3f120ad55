"""Settings of all tests."""

import torch

# The tensors here are tiny: a second thread gains nothing, and on a busy machine it is waited for.
torch.set_num_threads(1)
