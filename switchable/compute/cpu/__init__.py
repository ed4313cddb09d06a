"""Expert compute on the CPU."""
