"""Reports about the compiled kernels and the tuner; none of them measures a training."""
