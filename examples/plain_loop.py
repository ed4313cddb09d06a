"""A loop of your own: a ReLU² model that no library knows, Muon for matrices, AdamW for the rest, averaged weights.

python examples/plain_loop.py [folder to save in]
"""

import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from switchable import Controller, SwitchConfig, convert, in_mode

STEPS, WIDTH, LENGTH = 80, 64, 64


class Linear(nn.Linear):
    """Keeps its weight in float32 and multiplies in the precision of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight.to(x.dtype))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Linear(WIDTH, 4 * WIDTH, bias=False), Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(nnf.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = (
            Linear(WIDTH, 3 * WIDTH, bias=False),
            Linear(WIDTH, WIDTH, bias=False),
            MLP(),
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(nnf.rms_norm(x, (WIDTH,))).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nnf.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(nnf.rms_norm(x, (WIDTH,)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = Linear(WIDTH, 256, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.tokens(idx) + self.places.weight[: idx.shape[1]]
        logits = self.head(nnf.rms_norm(self.blocks(x), (WIDTH,)))
        return logits if targets is None else nnf.cross_entropy(logits.flatten(0, 1), targets.flatten())


torch.manual_seed(0)
source = sorted(
    Path(sysconfig.get_path("stdlib")).glob("*.py")
)  # text that is on every machine, a byte a token
data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in source)), dtype=torch.uint8)
rows = data[: len(data) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1).long()
held_out, rows = rows[-32:], rows[:-32]

model = Model()
config = SwitchConfig(  # a run as short as this one joins at once; leave the limits alone in a real one
    num_experts=16, experts_per_token=3, recipe="early", monitor_every=20, min_dense_fraction=0.5,
    max_activation_ratio=1.0, min_mass_caught=0.0,
)  # fmt: skip
print(convert(model, config))
matrices = [p for name, p in model.blocks.named_parameters() if "router" not in name]
rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
optimizers = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0), torch.optim.AdamW(rest, lr=3e-3)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
controller = Controller(
    model, held_out[:8, :-1], STEPS, config, copies=[average]
)  # the probe is the first input

for _ in range(STEPS):
    batch = rows[torch.randint(len(rows), (8,))]
    model(batch[:, :-1], batch[:, 1:]).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    average.update_parameters(model)
    controller.step(*optimizers)

average.eval()
for mode in ("dense", "sparse"):
    with torch.no_grad(), in_mode(average, mode):
        print(
            f"averaged weights, {mode}: loss {average(held_out[:, :-1], held_out[:, 1:]):.3f} nats per byte"
        )
if len(sys.argv) > 1:
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    torch.save(average.module.state_dict(), Path(sys.argv[1]) / "model.pt")
    print(f"saved in {sys.argv[1]}: the dense model's own weights under their own names, and the routers")
