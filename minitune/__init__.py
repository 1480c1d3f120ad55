"""minitune: train a small BERT from scratch, fine-tune it, prompt it. Start at README.md."""

import os

# On a CPU, oneDNN compiles a kernel for every size of product it meets and keeps the last 1,024, up
# to a megabyte each. A training step needs a few dozen, and all steps together few others.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
