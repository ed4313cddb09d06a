"""accelerate: convert before `prepare`, give the controller what `prepare` returns.

python examples/with_accelerate.py [folder to save in]
"""

import sys
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from switchable import Controller, SwitchConfig, convert, in_mode

STEPS, LENGTH = 80, 64
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
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after convert: routers are in it
batches = DataLoader(rows[: 16 * STEPS], batch_size=8, shuffle=True)  # two of them make a step
prepared, optimizer, batches = accelerator.prepare(model, optimizer, batches)
controller = Controller(prepared, held_out[:8].to(accelerator.device), STEPS, config)

for batch in batches:
    with accelerator.accumulate(prepared):
        accelerator.backward(prepared(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:  # once per step of the optimizer, on every process
        controller.step(optimizer)

model.eval()
for mode in ("dense", "sparse"):
    with torch.no_grad(), in_mode(model, mode):
        loss = model(input_ids=held_out, labels=held_out).loss
        print(f"{mode}: loss {loss:.3f} nats per byte")
if len(sys.argv) > 1:
    model.save_pretrained(sys.argv[1])
    print(f"saved in {sys.argv[1]}: a GPT-2 of transformers, and the routers beside its weights")
