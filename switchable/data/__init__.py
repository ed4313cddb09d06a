"""TEXT -> TOKENS -> BATCHES.

    config.py      what text is read, and how it becomes tokens
    corpora.py     where text comes from: the embedded default, files and folders, Hugging Face datasets
    sources.py     which files a name stands for, what form each has, and what is skipped
    packing.py     files unpacked: gzip, bzip2, xz, Zstandard
    readers.py     what is in a file: plain text, JSON lines or an array, Parquet
    split.py       which documents are for validation, by a hash of their text
    tokenizers.py  text -> token ids: a byte-level BPE trained on the spot, or a given tokenizer
    encoding.py    texts -> token ids with any tokenizer, many at once
    tokens.py      documents -> two flat token files and their meta.json
    batches.py     token file -> the batch of a given index, the same on every machine and after every resume
    objectives/    what is predicted of a batch: the next token, masked tokens, spans
    glue.py        examples of GLUE's tasks, for fine-tuning

Import from the modules themselves: only `batches` needs torch.
"""
