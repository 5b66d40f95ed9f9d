"""Weights in files: networks of this package, and files that others have published."""
