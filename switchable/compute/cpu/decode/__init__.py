"""`decode`: a few tokens without gradients."""
