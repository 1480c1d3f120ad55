"""minitune: train a small BERT from scratch, fine-tune it, prompt it. Start at README.md."""

import os

# On a CPU, oneDNN compiles a kernel for every size of product it meets and keeps the last 1,024, scratch
# memory included: gigabytes, where lengths vary. A training step needs a few dozen.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
