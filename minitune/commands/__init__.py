"""What the scripts do besides training: label and explain new texts, write pages, show lessons."""
