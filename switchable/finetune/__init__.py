"""A trained model learns a classification task, with transformers' own head and Trainer.

config.py     the settings
classify.py   model + head -> Trainer -> scores in both modes
"""
