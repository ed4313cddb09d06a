"""Which neurons go together; knows nothing of layers."""
