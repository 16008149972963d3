"""The main job on real input: LeNet-5 with and without batch norm. See `fastnorm demo --help`."""
