"""Folders of plain models: what cannot be opened is named; a family that was described is remembered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families.models import make
from store.models import CONFIG

from switchable import InputError, convert
from switchable.ffn.convert import layers_of
from switchable.store.checkpoint import save
from switchable.store.load import load
from switchable.store.pretrained import load_pretrained


def test_a_family_of_the_users_own_is_remembered(tmp_path: Path) -> None:
    from switchable.ffn.families import Family
    from switchable.ffn.table import FAMILIES

    model = make("gpt2")
    row = FAMILIES["gpt2"]
    assert isinstance(row, Family)
    convert(model, CONFIG, Family(**{**row.__dict__, "in_layer": False, "layers": "n_layer"}))
    save(tmp_path / "checkpoint", model)
    again, _ = load(tmp_path / "checkpoint")
    assert layers_of(again)[0].ssd.settings.family.layers == "n_layer"


def test_weights_that_are_missing_pickled_or_of_another_model(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path / "plain")
    weights, config = tmp_path / "plain" / "model.safetensors", tmp_path / "plain" / "config.json"
    settings = json.loads(config.read_text())
    for change, message in (
        ({"n_layer": 3}, r"12 missing, e\.g\. transformer\.h\.2"),
        ({"n_layer": 1}, r"11 of layers that the config does not have, e\.g\. transformer\.h\.1"),
        ({"n_inner": 32}, r"of another shape, e\.g\. transformer\.h\.0\.mlp\.c_fc"),
        ({"architectures": ["GPT9"]}, "names the model class 'GPT9'"),
        ({"model_type": "gpt9"}, "cannot be used"),
        ({"n_layer": "two"}, r"config\.json cannot be used: Validation error for field 'n_layer'"),
        ({"id2label": 3}, r"config\.json cannot be used"),
        ({"dtype": "float99"}, r"config\.json cannot be used"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded: .*GPTQ"),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            load_pretrained(tmp_path / "plain")
    config.write_text(json.dumps(settings | {"quantization_config": None}))
    assert load_pretrained(tmp_path / "plain").config.n_layer == 2
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pretrained(tmp_path / "plain")
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(InputError, match=r"are pickled \(pytorch_model\.bin\), which we never open"):
        load_pretrained(tmp_path / "plain")
    weights.with_name("pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"holds no weights \(\*\.safetensors\)"):
        load_pretrained(tmp_path / "plain")
    config.unlink()
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_pretrained(tmp_path / "plain")
