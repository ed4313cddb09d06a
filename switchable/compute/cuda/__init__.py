"""Expert compute on CUDA."""
