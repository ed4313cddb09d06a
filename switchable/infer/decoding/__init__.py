"""A decoding path with little Python per token, for the usual families of causal models."""
