"""The benchmark beside PyTorch and others, in units of the memory floor. See `fastnorm bench --help`."""
