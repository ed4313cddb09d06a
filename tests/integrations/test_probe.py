"""The probe is whatever the model takes; one that does not fit is refused at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integrations.loops import CONFIG, FAMILY, IDS, STEPS, NanoGPT
from support import tiny_gpt2
from torch import Tensor, nn

from switchable import Controller, InputError, convert


@pytest.mark.parametrize("probe", ["tensor", "mapping", "two tensors"])
def test_the_probe_is_what_the_model_takes(probe: str) -> None:
    model = NanoGPT()
    convert(model, CONFIG, FAMILY)
    given = {"tensor": IDS, "mapping": {"idx": IDS}, "two tensors": [IDS[:4], IDS[4:]]}[probe]
    controller = Controller(model, given, 8, dataclasses.replace(CONFIG, monitor_every=1))
    assert controller.probe_tokens == IDS.numel()
    model(IDS).square().mean().backward()
    measured = controller.step(torch.optim.AdamW(model.parameters()))
    assert measured is not None
    assert 0 < measured.layers[1].activation_ratio < 1


def test_a_measurement_leaves_alone_what_its_owner_keeps_from_training() -> None:
    model = tiny_gpt2()
    convert(model, CONFIG)
    model.train()
    frozen: nn.Module = model.transformer.wte.eval()  # type: ignore[union-attr, operator]
    Controller(model, IDS, STEPS, CONFIG)
    assert (model.training, frozen.training) == (True, False)


class _Skips(NanoGPT):
    def forward(self, idx: Tensor) -> Tensor:
        return self.ffns[0](hidden_states=self.tokens(idx))


@pytest.mark.parametrize(
    ("model", "probe", "message"),
    [
        (NanoGPT, {"input_ids": IDS}, r"NanoGPT fails with the probe \(TypeError: .*'input_ids'"),
        (NanoGPT, IDS + 61, r"NanoGPT fails with the probe \(IndexError: index out of range"),
        (NanoGPT, IDS.float(), r"fails with the probe \(RuntimeError: Expected tensor .* Long"),
        (_Skips, IDS, r"the probe does not come to ffns\.1"),
    ],
)
def test_a_probe_that_does_not_fit_is_refused_at_once(
    model: Callable[[], nn.Module], probe: Any, message: str
) -> None:
    made = model()
    convert(made, CONFIG, FAMILY, example_inputs=IDS)
    with pytest.raises(InputError, match=message):
        Controller(made, probe, 20, CONFIG)
