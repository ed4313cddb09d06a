"""How good a trained model is, in each way its FFNs can multiply.

ways.py      dense, and sparse with a range of K
text.py      loss, perplexity and bits per byte of text
tasks.py     our task files (tasks/*.yaml) with local data
harness.py   lm-eval on the live model
scores.py    a score with its standard error; the table and the JSON of many
"""
