"""What lies on disk: run folders, checkpoints, exports, and how they are opened."""
