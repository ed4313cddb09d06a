"""`triton`: our own kernels, used when asked for by name."""
