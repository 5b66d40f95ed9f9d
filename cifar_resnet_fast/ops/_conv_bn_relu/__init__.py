"""Convolution, normalisation, shortcut and ReLU: operation and implementations."""
