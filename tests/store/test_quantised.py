"""8 bits kept in a sparse export: as rounded on loading, without the wider weights, refused where damaged."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from infer.test_decoding import MODELS, model_of
from torch import Tensor, nn

from switchable import SwitchConfig, convert, load, set_mode
from switchable.cli import main
from switchable.compute.cpu.llvm import this_machine
from switchable.data.tokenizers import train_bpe
from switchable.ffn.builders import build_model
from switchable.ffn.convert import layers_of, why_dense
from switchable.infer.decoding.decoder import Decoder
from switchable.infer.decoding.families import parts_of
from switchable.infer.decoding.matrices import Quantised, Stacked
from switchable.infer.loss import positions_of
from switchable.store import quantised
from switchable.store.checkpoint import save
from switchable.store.export import export
from switchable.store.folders import MANIFEST, entry, seal
from switchable.store.quantised import FILE, load_int8
from switchable.store.tensorfile import TensorFile

pytestmark = pytest.mark.skipif(
    this_machine() is None, reason="a processor without multiply-add instructions"
)
SIZES = {"d_model": 64, "d_ff": 256, "num_layers": 2, "num_heads": 4, "max_positions": 64}


def checkpoint(folder: Path, family: str = "gpt2", activation: str = "relu", **sizes: int) -> Path:
    """A converted model in a folder, with a tokenizer."""
    torch.manual_seed(0)
    tokenizer: Any = train_bpe(["the cat sat on a mat"] * 3, 290)
    model = build_model(
        family, SIZES | sizes, activation, len(tokenizer), {"eos_token_id": tokenizer.eos_token_id}
    )
    convert(model, SwitchConfig(num_experts=8, experts_per_token=2))
    save(folder, model, tokenizer=tokenizer)
    return folder


def logits(decoder: Decoder, mode: str) -> Tensor:
    set_mode(decoder.model, mode)
    first = decoder.begin(torch.tensor([[3, 1, 4, 1]]), places=8)
    return torch.stack([first, decoder.next(torch.tensor([5]))])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "arcee"])
def test_an_export_in_8_bits_is_the_model_rounded(family: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "own", family)
    export(folder, "sparse", tmp_path / "out", weights="int8")
    found = load_int8(tmp_path / "out")
    assert found is not None
    # No memory for the wider matrices.
    assert sum(p.untyped_storage().nbytes() for p in found.model.parameters()) < 80_000
    want = Decoder(load(folder)[0], "int8")
    own = Decoder(found.model, "int8", found.stored)
    for mode in ("dense", "sparse"):
        assert torch.equal(logits(own, mode), logits(want, mode))
    model, _ = load(tmp_path / "out")  # the wider ones are there as ever
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), load(folder)[0].parameters(), strict=True)
    )


def test_an_export_in_bfloat16_is_one(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "own")
    for to in ("dense", "sparse"):
        export(folder, to, tmp_path / to, weights="bfloat16")
        model, _ = load(tmp_path / to)
        assert not [
            n for n, p in model.named_parameters() if (p.dtype == torch.bfloat16) == (".router." in n)
        ]
    assert not (tmp_path / "sparse" / FILE).exists()


def alive() -> int:
    """Bytes of all tensors that there are, memory that several share once."""
    found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and not each.is_meta]
    storages = [each.untyped_storage() for each in found]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


LAYERS, D, F, E, POSITIONS = 2, 128, 512, 8, 64


def bytes_in_8_bits(vocabulary: int) -> tuple[int, int]:
    """What GPT-2 takes: matrices at a byte a number and four a row; at most, all else."""
    matrices = LAYERS * (4 * D * D + 2 * D * F) + vocabulary * D
    rows = LAYERS * (3 * D + D + F + F) + vocabulary
    positions, routers, norms = POSITIONS * D, LAYERS * E * (D + 1), (2 * LAYERS + 1) * 2 * D
    biases = LAYERS * (3 * D + D + F + D)
    return matrices + 4 * rows, 4 * (
        positions + routers + norms + 3 * biases
    )  # of biases each product has its own


@pytest.mark.parametrize("kept", [True, False])
def test_weights_in_8_bits_are_held_once_and_wider_ones_never(tmp_path: Path, kept: bool) -> None:
    place = checkpoint(tmp_path / "own", d_model=D, d_ff=F)
    if kept:
        export(place, "sparse", tmp_path / "out", weights="int8")
        place = tmp_path / "out"
    gc.collect()
    before = alive()
    found = load_int8(place)
    assert found is not None
    matrices, rest = bytes_in_8_bits(parts_of(found.model).tokens.num_embeddings)
    taken = [0]

    def watched(name: str, parts: Stacked) -> Quantised:
        matrix = found.stored(name, parts)
        taken[0] += sum(each.nbytes for each in matrix if each is not None)
        assert alive() - before <= taken[0] + rest
        return matrix

    decoder = Decoder(found.model, "int8", watched)
    assert taken[0] == matrices
    gc.collect()
    assert matrices < alive() - before <= matrices + rest
    assert rest < matrices / 3
    assert logits(decoder, "sparse").isfinite().all()


def test_a_decoder_in_float32_holds_a_model_once(tmp_path: Path) -> None:
    place = checkpoint(tmp_path / "own", d_model=D, d_ff=F)
    gc.collect()
    before = alive()
    decoder = Decoder(load(place)[0])
    own = sum(each.nbytes for each in decoder.model.parameters())
    gc.collect()
    _, rest = bytes_in_8_bits(0)
    assert own <= alive() - before <= own + rest


@pytest.mark.parametrize("width", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_checkpoint_is_rounded_one_matrix_after_another(family: str, width: str, tmp_path: Path) -> None:
    place = checkpoint(tmp_path / "own", family)
    if width == "bfloat16":
        export(place, "sparse", tmp_path / "out", weights=width)
        place = tmp_path / "out"
    found = load_int8(place)
    assert found is not None
    own, want = Decoder(found.model, "int8", found.stored), Decoder(load(place)[0], "int8")
    for mode in ("dense", "sparse"):
        assert torch.equal(logits(own, mode), logits(want, mode))


def test_what_our_decoding_is_not_for_is_rounded_and_written_by_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint(tmp_path / "own"), "sparse", tmp_path / "out", weights="int8")
    for place in (tmp_path / "own", tmp_path / "out"):
        settings = json.loads((place / "generation_config.json").read_text())
        (place / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.2}))
        if place.name == "own":
            seal(place, {path.name: entry(path) for path in place.glob("*.*") if path.name != MANIFEST})
        assert load_int8(place) is None
        generate = ("generate", place, "--weights", "int8", "--prompt", "the cat", "--max-new-tokens", "2")
        assert main([str(each) for each in generate]) == 0
        assert "asks for repetition_penalty in its generation config" in capsys.readouterr().err


def test_a_generation_config_that_is_no_json_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint(tmp_path / "own"), "sparse", tmp_path / "out", weights="int8")
    (tmp_path / "out" / "generation_config.json").write_text("{nope")
    words = refused(capsys, "generate", tmp_path / "out", "--weights", "int8", "--prompt", "the cat")
    assert "generation_config.json cannot be used" in words


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(each) for each in arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 2
    return message


def test_a_damaged_or_foreign_file_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export(checkpoint(tmp_path / "own"), "sparse", out, weights="int8")
    generate = ("generate", out, "--weights", "int8", "--prompt", "the cat", "--max-new-tokens", "2")
    assert main([str(each) for each in generate]) == 0
    assert "in int8: 2 tokens" in capsys.readouterr().err
    whole = (out / FILE).read_bytes()
    (out / FILE).write_bytes(whole[:-100])
    assert f"{FILE} has {len(whole) - 100} bytes instead of {len(whole)}" in refused(capsys, *generate)
    (out / FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{FILE} does not have its checksum" in refused(capsys, *generate)
    # Whole, but of a version to come.
    (out / FILE).write_bytes(whole.replace(b'"switchable_int8":"2"', b'"switchable_int8":"3"'))
    seal(out, {path.name: entry(path) for path in out.glob("*tensors")})
    assert "is of format 3, not 2; export the model again" in refused(capsys, *generate)
    # Whole, but a part has another name, or another layer's shape.
    for old, new in ((b"plain:layers.1.norm0.weight", b"plain:layers.7.norm0.weight"), (b"heads", b"hands")):
        (out / FILE).write_bytes(whole.replace(old, new))
        seal(out, {path.name: entry(path) for path in out.glob("*tensors")})
        assert "does not hold a whole model" in refused(capsys, *generate)


def test_what_has_no_8_bits_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, out = checkpoint(tmp_path / "own"), tmp_path / "out"
    to = ("export", own, "--out", out, "--weights", "int8", "--to")
    assert "other tools cannot read our 8 bits" in refused(capsys, *to, "dense")
    odd = checkpoint(tmp_path / "odd", d_model=20, d_ff=80)
    words = refused(capsys, "export", odd, "--out", out, "--weights", "int8", "--to", "sparse")
    assert "weights=int8 needs a d_model that is a multiple of" in words
    assert not out.exists()


def test_the_file_is_an_ordinary_one(tmp_path: Path) -> None:
    export(checkpoint(tmp_path / "own"), "sparse", tmp_path / "out", weights="int8")
    file = TensorFile(tmp_path / "out" / FILE)
    assert file.metadata[quantised.KEY] == "2"
    assert json.loads(file.metadata[quantised.FACTS])["heads"] == 4
    assert file.tensor("matrix:layers.0.qkv").shape == (192, 64)
    assert file.tensor("matrix:layers.0.qkv").dtype == torch.int8
    assert file.tensor("scale:layers.0.ffn.down").shape == (256,)
    named = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert FILE in named


LEAN = """
import sys
from switchable.cli import main
status = main(["generate", sys.argv[1], "--weights", "int8", "--mode", "sparse", "--max-new-tokens", "2"])
heavy = {"torch._dynamo", "torch.distributed.tensor", "transformers.activations", "transformers.modeling_utils"}
print(status, sorted(heavy & sys.modules.keys()))
"""


def test_an_export_is_decoded_without_the_models_of_transformers_and_torchs_compiler(tmp_path: Path) -> None:
    export(checkpoint(tmp_path / "own"), "sparse", tmp_path / "out", weights="int8")
    call = [sys.executable, "-c", LEAN, str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_each_family_is_in_the_file_whole(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.generation_config.eos_token_id = None
    first, *_, last = layers_of(model)
    first.ssd.takes_part, first.ssd.why_dense = False, "it is the first"
    last.ssd.experts_per_token, last.ssd.mass = 3, 0.9
    quantised.write_int8(copy.deepcopy(model), tmp_path)
    found, stored = quantised.opened(tmp_path / FILE)
    own, want = Decoder(found, "int8", stored), Decoder(model, "int8")
    for mode in ("dense", "sparse"):
        assert torch.equal(logits(own, mode), logits(want, mode))
    assert why_dense(found) == why_dense(model)
    assert [layer.ssd.name for layer in layers_of(found)] == [layer.ssd.name for layer in layers_of(model)]
    assert positions_of(found) == positions_of(model)
