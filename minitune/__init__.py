"""minitune: train a small BERT from scratch, fine-tune it, prompt it. Start at README.md."""
