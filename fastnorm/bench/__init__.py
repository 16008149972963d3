"""The benchmark beside PyTorch and others, over the memory floor. See `fastnorm bench --help`."""
