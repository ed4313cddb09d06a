"""HOW GOOD A TRAINED MODEL IS, in each way its FFNs can multiply: on text, on tasks, and how fast."""
