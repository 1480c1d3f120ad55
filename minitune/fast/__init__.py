"""Code that makes minitune fast and computes nothing new; a reader may skip it."""
