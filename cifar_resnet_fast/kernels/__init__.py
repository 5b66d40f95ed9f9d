"""Triton kernels and their launchers (layer 0): they check nothing, ``ops`` does."""
