"""A TRAINED MODEL LEARNS A CLASSIFICATION TASK, with transformers' own head and Trainer."""
