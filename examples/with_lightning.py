"""Lightning: the controller is made when training begins, and steps behind the optimizer.

python examples/with_lightning.py [folder to save in]
"""

import sys
import sysconfig
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from switchable import Controller, SwitchConfig, convert, in_mode

STEPS, LENGTH = 320, 64
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


class Switching(lightning.LightningModule):
    """Any LightningModule around a converted model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def on_train_start(self) -> None:
        self.controller = Controller(self.model, held_out[:8].to(self.device), self.trainer.max_steps, config)

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def on_train_batch_end(self, *_: object) -> None:
        if self.controller.steps_done < self.global_step:  # not while gradients are accumulated
            self.controller.step(self.trainer.optimizers)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["controller"] = self.controller.state_dict()


trainer = lightning.Trainer(
    max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(Switching(model), DataLoader(rows, batch_size=8, shuffle=True))

model.eval()
for mode in ("dense", "sparse"):
    with torch.no_grad(), in_mode(model, mode):
        loss = model(input_ids=held_out, labels=held_out).loss
        print(f"{mode}: loss {loss:.3f} nats per byte")
if len(sys.argv) > 1:
    model.save_pretrained(sys.argv[1])
    print(f"saved in {sys.argv[1]}: a GPT-2 of transformers, and the routers beside its weights")
