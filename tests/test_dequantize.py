"""Quantised checkpoints as the plain ones that they stand for (`--dequantize`)."""

import json
from dataclasses import replace

import pytest
import test_merged
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from test_apply import MODELS, dequantised, quantised, same_bits, tensors

from saber import artifacts
from saber.ablation import apply
from saber.checkpoint.export import ExportSpec, export
from saber.checkpoint.shards import WEIGHTS
from saber.cli.main import main
from saber.conversation import Partner
from saber.errors import ModelError
from saber.lm.load import LoadSpec, load

UNPACKED = LoadSpec(device="cpu", dequantize=True)
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def mxfp4(weight):
    """Some experts, (experts, in, out), as codes and scales; and the weights that those stand for."""
    experts, inputs, outputs = weight.shape
    generator = torch.Generator().manual_seed(weight.numel())
    codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator)
    scales = torch.randint(119, 124, (experts, outputs, inputs // 32), generator=generator)
    halves = torch.stack((codes % 16, codes // 16), -1).flatten(-2)
    values = torch.cat((FP4, -FP4))[halves] * torch.exp2(scales - 127.0)[..., None]
    plain = values.flatten(-2).transpose(1, 2).to(torch.bfloat16)
    return codes.to(torch.uint8), scales.to(torch.uint8), plain.contiguous()


def packed(folder, method, size=16):
    """Save a quantised checkpoint in bfloat16; return the weights that it stands for, by name."""
    model = MODELS["gpt_oss" if method == "mxfp4" else "llama"]()
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    plain, stored = load_file(folder / WEIGHTS), {}
    for name, value in plain.items():
        stored[name] = value
        if method == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del stored[name]
            stored[f"{name}_blocks"], stored[f"{name}_scales"], plain[name] = mxfp4(value)
        elif method == "fp8" and name.endswith("_proj.weight"):
            stored[name], scale = quantised(value.float(), size)
            stored[f"{name}_scale_inv"] = scale
            plain[name] = dequantised(stored[name], scale, size).to(torch.bfloat16)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    config = artifacts.read_json(folder / "config.json")
    config["quantization_config"] = {"quant_method": method}
    if method == "fp8":
        config["quantization_config"]["weight_block_size"] = [size, size]
    (folder / "config.json").write_text(json.dumps(config))
    return plain


def ran(folder, run, dtype="float32"):
    """The run folder that a run on it leaves, and its model in memory."""
    return test_merged.ran(folder, run, replace(UNPACKED, dtype=dtype), load={"dequantize": True})


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_is_the_plain_one_edited(tmp_path, method, dtype):
    plain = packed(tmp_path / "base", method)
    run, lm = ran(tmp_path / "base", tmp_path / "run", dtype)
    held = lm.model.state_dict()
    assert lm.stored_dtype == torch.bfloat16
    assert all(torch.equal(held[name].bfloat16(), value) for name, value in plain.items())
    done = export(run, "merged", tmp_path / "out", lm=lm)
    assert any("transformers saves them" in note for note in done.notes)
    assert "quantization_config" not in artifacts.read_json(tmp_path / "out" / "config.json")
    wanted = load(str(tmp_path / "base"), replace(UNPACKED, dtype=dtype))
    apply(wanted.model, run.plan)
    state, found = wanted.model.state_dict(), tensors(tmp_path / "out")
    assert found.keys() == plain.keys()
    assert [n for n in found if not same_bits(found[n], state[n].bfloat16())] == []
    # Later, without the model in memory, the same but for how it is rounded.
    export(run, "merged", tmp_path / "later")
    found = tensors(tmp_path / "later")
    for name, value in load(str(tmp_path / "out")).model.state_dict().items():
        assert torch.allclose(found[name].float(), value.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_a_run_on_it_is_talked_to_without_saying_so_again(tmp_path, method):
    packed(tmp_path / "base", method)
    run, _ = ran(tmp_path / "base", tmp_path / "run")
    partner = Partner.of(str(tmp_path / "run"))
    assert partner.loaded(LoadSpec(device="cpu")).stored_dtype == torch.bfloat16
    assert export(run, "lora", tmp_path / "adapter", ExportSpec(partial=True)).path.is_dir()


def test_it_has_to_be_asked_for(tmp_path, capsys):
    packed(tmp_path / "base", "mxfp4")
    with pytest.raises(ModelError, match="quantised"):
        load(str(tmp_path / "base"))
    assert main(["inspect", str(tmp_path / "base"), "--device", "cpu"]) == 2
    assert "pass --dequantize" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "base"), "--device", "cpu", "--dequantize"]) == 0
    assert "proved" in capsys.readouterr().out


def test_what_cannot_be_unpacked_is_still_refused(tmp_path):
    packed(tmp_path / "base", "fp8")
    text = (tmp_path / "base" / "config.json").read_text()
    (tmp_path / "base" / "config.json").write_text(text.replace('"fp8"', '"gptq"'))
    with pytest.raises(ModelError, match="gptq") as told:
        load(str(tmp_path / "base"), UNPACKED)
    assert "--dequantize" not in str(told.value)


def test_blocks_that_transformers_would_take_for_others_are_refused(tmp_path):
    """It takes those of a weight for equal ones; of 48 rows in blocks of 32 the second has 16."""
    packed(tmp_path / "base", "fp8", 32)
    with pytest.raises(ModelError, match=r"mlp\.\w+\.weight .*no whole blocks of 32 x 32"):
        load(str(tmp_path / "base"), UNPACKED)
