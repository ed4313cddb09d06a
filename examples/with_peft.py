"""PEFT: adapters on attention of a converted model; what trains the FFNs' routers is `modules_to_save`.

python examples/with_peft.py [folder to save in]
"""

import sys
import sysconfig
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
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


def train(optimizer: torch.optim.Optimizer) -> None:
    """Take one step."""
    batch = rows[torch.randint(len(rows), (8,))]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


plain = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(4 * STEPS):  # in place of the checkpoint that you have
    train(plain)

config = SwitchConfig(  # a run as short as this one joins at once; leave the limits alone in a real one
    num_experts=16, experts_per_token=3, recipe="early", monitor_every=20, min_dense_fraction=0.5,
    max_activation_ratio=1.0, min_mass_caught=0.0,
)  # fmt: skip
print(convert(model, config))  # before PEFT, so that it finds the routers
lora = LoraConfig(r=8, target_modules=["c_attn"], modules_to_save=["router"], fan_in_fan_out=True)
model = get_peft_model(model, lora)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
controller = Controller(model, held_out[:8], STEPS, config)

for _ in range(STEPS):
    train(optimizer)
    controller.step(optimizer)

model.eval()
for mode in ("dense", "sparse"):
    with torch.no_grad(), in_mode(model, mode):
        loss = model(input_ids=held_out, labels=held_out).loss
        print(f"{mode}: loss {loss:.3f} nats per byte")
if len(sys.argv) > 1:
    model.merge_and_unload().save_pretrained(sys.argv[1])
    print(f"saved in {sys.argv[1]}: a GPT-2 with its adapters merged, and the routers")
