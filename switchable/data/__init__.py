"""TEXT -> TOKENS -> BATCHES.

    text       corpora.py -> sources.py (which files) -> packing.py, readers.py (what is in them) -> split.py
    tokens     tokenizers.py, encoding.py -> tokens.py (two flat files)
    batches    batches.py -> objectives/ (what is predicted);   glue.py: examples for fine-tuning

Import from the modules themselves: only `batches` needs torch.
"""
