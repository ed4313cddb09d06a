"""A folder that `AutoModelFor...from_pretrained` opens as a switchable model, once `switchable.register()` was called.

    config.json          the model's own config, and beside it
                         "quantization_config": {"quant_method": "switchable", "num_experts": ..., "layers": ...}
    *.safetensors        the dense weights under their Hugging Face names, and the routers

transformers' quantizers change a model between building it and loading its weights, and `register_quantizer` adds
those of other packages. Ours exchanges the FFNs (`convert`) and quantises nothing; the model opens in sparse mode. Its
class stays what it was (`GPT2LMHeadModel`), every head and every Auto class works, and no code comes from the folder
(no `trust_remote_code`). Without our package transformers warns of an unknown method and opens the same folder as the
plain dense model. The alternative is a model type of our own for every family: it needs a config, and a model class
for each head, and nothing else can open it.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from switchable.ffn.convert import layers_of, set_mode, why_dense
from switchable.ffn.description import describe, make_switchable
from switchable.ffn.layout import store_by_neuron

METHOD = "switchable"
"""The name in `config.json`."""


class SwitchableFFNsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The description of a model's experts (`ffn.description.describe`) as a part of its config.

    That of a model follows the model: `save_pretrained` saves the K that was set last.
    """

    def __init__(self, quant_method: str = METHOD, **described: Any) -> None:
        self.quant_method = quant_method
        self.described = described
        self.model: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Return the part of `config.json`."""
        described = self.described if self.model is None else describe(self.model)
        return {"quant_method": self.quant_method, **described}

    def __deepcopy__(self, memo: dict[int, Any]) -> SwitchableFFNsConfig:
        """Return the copy of a copied model, or a description that stays as it is."""
        copied = SwitchableFFNsConfig(**self.to_dict())
        copied.model = memo.get(id(self.model))
        return copied


class SwitchableFFNsLoader(HfQuantizer):  # type: ignore[misc]
    """Exchanges the FFNs of a model before its weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:  # noqa: ARG002
        make_switchable(model, self.quantization_config.to_dict())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        for layer in layers_of(model):
            store_by_neuron(layer)
        model.config.quantization_config = SwitchableFFNsConfig(**self.quantization_config.to_dict())
        model.config.quantization_config.model = model
        if any(layer.ssd.takes_part for layer in layers_of(model)):
            set_mode(model, "sparse")
        else:
            logging.getLogger(__name__).warning("opened in dense mode: %s", why_dense(model))
        # Nothing is quantised: training, .half() and saving are as for any model. The config keeps the description.
        del model.hf_quantizer
        model.is_quantized = False
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        """Say that such a model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that it can be trained."""
        return True


def register() -> None:
    """Let transformers open sparse exports as switchable models in this process; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(SwitchableFFNsConfig)
        register_quantizer(METHOD)(SwitchableFFNsLoader)
