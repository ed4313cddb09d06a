"""`fused`: training and prefill in compiled loops."""
