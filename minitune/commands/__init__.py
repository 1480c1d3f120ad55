"""What the scripts do besides training: label, explain, examine, write pages, show lessons."""
