"""A checkpoint of ReLU² FFNs (the Arcee type) -> experts -> folders for other tools, by the command line's own verbs.

python examples/convert_arcee.py [folder to save in]
"""

import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import ArceeConfig, ArceeForCausalLM, AutoModelForCausalLM, PreTrainedTokenizerFast

import switchable
from switchable.cli import main

STEPS, LENGTH = 200, 64
out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
text = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]  # text that is on every machine

# In place of the checkpoint that you have: a small one, trained for a moment.
words = ByteLevelBPETokenizer()
words.train([str(path) for path in text], vocab_size=512, special_tokens=["<end>"], show_progress=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, bos_token="<end>", eos_token="<end>")
ids = torch.tensor(words.encode("".join(path.read_text(encoding="utf-8") for path in text[:20])).ids)
rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
held_out, rows = rows[-32:], rows[:-32]
torch.manual_seed(0)
model = ArceeForCausalLM(
    ArceeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
    )
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(STEPS):
    batch = rows[torch.randint(len(rows), (8,))]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(out / "checkpoint")
tokenizer.save_pretrained(out / "checkpoint")


def switch(*arguments: object) -> None:
    """`switchable ...` in a shell."""
    code = main([str(each) for each in arguments])
    if code:
        sys.exit(code)


switch(  # a model as little trained as this one fires more: let both layers take part; in earnest, leave the limit
    "convert", out / "checkpoint", "--data", *text, "--out", out / "converted", "--num-experts", 16,
    "--experts-per-token", 4, "--calibration-tokens", 20_000, "--eval-tokens", 4096, "--max-activation-ratio", 0.6,
)  # fmt: skip
for kind in ("dense", "sparse"):
    switch("export", out / "converted", "--to", kind, "--out", out / kind)

# Without anything of ours, the dense export is an Arcee model; the sparse one opens in either mode.
plain = AutoModelForCausalLM.from_pretrained(out / "dense")
opened, _ = switchable.load(out / "sparse")
with torch.no_grad():
    print(f"plain transformers: loss {plain(input_ids=held_out, labels=held_out).loss:.3f} nats per token")
    for mode in ("dense", "sparse"):
        with switchable.in_mode(opened, mode):
            print(f"{mode}: loss {opened(input_ids=held_out, labels=held_out).loss:.3f} nats per token")
print(f"saved in {out}: checkpoint, converted, and the exports dense and sparse")
