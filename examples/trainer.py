"""transformers' Trainer: convert the model, add one callback.

python examples/trainer.py [folder to save in]
"""

import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from switchable import SwitchConfig, convert, in_mode
from switchable.integrations.hf_trainer import SwitchableCallback

STEPS, LENGTH = 160, 64
source = sorted(
    Path(sysconfig.get_path("stdlib")).glob("*.py")
)  # text that is on every machine, a byte a token
data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in source)), dtype=torch.uint8)
rows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH).long()
held_out, rows = rows[-32:], rows[:-32]

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, activation_function="relu",
        bos_token_id=0, eos_token_id=0,
    )
)  # fmt: skip
config = SwitchConfig(  # a run as short as this one joins at once; leave the limits alone in a real one
    num_experts=16, experts_per_token=3, recipe="early", monitor_every=20, min_dense_fraction=0.5,
    max_activation_ratio=1.0, min_mass_caught=0.0,
)  # fmt: skip
print(convert(model, config))
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=20, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows[: 8 * STEPS]],
        callbacks=[SwitchableCallback(held_out[:8], config)],
    )
    trainer.train()

model.eval()
for mode in ("dense", "sparse"):
    with torch.no_grad(), in_mode(model, mode):
        loss = model(input_ids=held_out, labels=held_out).loss
        print(f"{mode}: loss {loss:.3f} nats per byte")
if len(sys.argv) > 1:
    model.save_pretrained(sys.argv[1])
    print(f"saved in {sys.argv[1]}: a GPT-2 of transformers, and the routers beside its weights")
