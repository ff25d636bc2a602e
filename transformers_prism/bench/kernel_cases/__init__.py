"""Calls of each kernel, one file a kernel: what `bench kernels` compiles, counts the traffic of, checks and times."""
