"""Devices and dtypes by what is fast, chat templates, loading, fingerprints."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_lm, make_model, make_tokenizer

from saber.errors import ModelError, UsageError
from saber.lm import device as devices
from saber.lm.chat import encode, render
from saber.lm.load import LoadSpec, load
from saber.lm.model import fingerprint

CPU = torch.device("cpu")


def test_auto_dtype_leaves_bfloat16_where_the_machine_is_slow_at_it(monkeypatch):
    rates = {torch.float32: 100.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(devices, "matmul_rate", lambda _d, dtype, *_a: rates[dtype])
    assert devices.choose_dtype("auto", CPU, torch.bfloat16) == torch.float32
    rates[torch.bfloat16] = 150.0
    assert devices.choose_dtype("auto", CPU, torch.bfloat16) == torch.bfloat16
    assert devices.choose_dtype("auto", CPU, torch.float16) == torch.float32
    assert devices.choose_dtype("auto", CPU, torch.float32) == torch.float32
    assert devices.choose_dtype("bfloat16", CPU, torch.float32) == torch.bfloat16


def test_matmul_rate_is_measured():
    assert devices.matmul_rate(CPU, torch.float32, size=64) > 0


def test_free_memory_is_the_systems_or_what_a_container_leaves(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: Mock(available=1000))
    assert devices.free_memory(tmp_path) == 1000
    for folder, names, cached in (
        (tmp_path / "new", ("memory.max", "memory.current"), "inactive_file"),
        (
            tmp_path / "old" / "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_inactive_file",
        ),
    ):
        folder.mkdir(parents=True)
        groups = folder.parent if folder.name == "memory" else folder
        (folder / "memory.stat").write_text(f"anon 5\n{cached} 30\n")
        for most, now, free in (("500", "400", 130), ("9000", "400", 1000), ("5", "400", 0)):
            (folder / names[0]).write_text(most)
            (folder / names[1]).write_text(now)
            assert devices.free_memory(groups) == free
        (folder / names[0]).write_text("max\n")
        assert devices.free_memory(groups) == 1000


def test_devices_that_are_not_here_are_named():
    assert devices.choose_device("cpu") == CPU
    with pytest.raises(UsageError, match="unknown device"):
        devices.choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="not available"):
            devices.choose_device("cuda")


def test_thinking_is_switched_off_where_the_template_knows_how():
    lm = make_lm("llama")
    lm.tokenizer.chat_template = (
        CHAT_TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    assert render(lm, "x").endswith("<bot><think></think>")


def test_an_open_think_block_is_closed_empty():
    lm = make_lm("llama")
    lm.tokenizer.chat_template = (
        CHAT_TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    assert render(lm, "x").endswith("<think>\n\n</think>\n\n")


def test_a_template_that_fails_is_one_clear_error():
    lm = make_lm("llama")
    lm.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ModelError, match=r"no system role.*--chat-template"):
        render(lm, "x")


def test_a_system_prompt_and_an_earlier_exchange_come_before_every_prompt(model_folder):
    lm = load(str(model_folder), LoadSpec(device="cpu", system="be brief"))
    assert render(lm, "x") == "<s><user> be brief<s><user> x <end> <bot>"
    longer = replace(lm, before=(("user", "a?"), ("assistant", "b.")))
    assert render(longer, "x") == "<s><user> a?<s><user> b.<s><user> x <end> <bot>"
    assert encode(longer, ["x"])[0].prompt_length > encode(replace(lm, before=()), ["x"])[0].prompt_length


def test_a_template_that_leaves_the_system_prompt_out_is_one_clear_error():
    lm = replace(make_lm("llama"), before=(("system", "be brief"),))
    lm.tokenizer.chat_template = "<s>{{ messages[-1]['content'] }}"
    with pytest.raises(ModelError, match=r"leaves out the system message.*--system"):
        render(lm, "x")


def test_a_doubled_bos_is_an_error():
    lm = make_lm("llama")
    lm.tokenizer.chat_template = "<s>" + CHAT_TEMPLATE
    with pytest.raises(ModelError, match="twice"):
        encode(lm, ["x"])


def test_a_folder_loads_and_gets_the_same_fingerprint_each_time(model_folder):
    spec = LoadSpec(device="cpu")
    first, second = load(str(model_folder), spec), load(str(model_folder), spec)
    assert fingerprint(first.model) == fingerprint(second.model)
    assert first.layers_path == "model.layers"
    assert first.source == "folder"
    with torch.no_grad():
        second.model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    assert fingerprint(first.model) != fingerprint(second.model)


def test_sixteen_bit_checkpoints_keep_their_dtype_on_disk(tmp_path):
    from saber.ablation import EditPlan
    from saber.checkpoint import save_merged

    folder = tmp_path / "half"
    make_model("llama").to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    lm = load(str(folder), LoadSpec(device="cpu", dtype="float32"))
    assert (lm.dtype, lm.stored_dtype) == (torch.float32, torch.bfloat16)
    save_merged(lm, EditPlan(), tmp_path / "out")
    again = load(str(tmp_path / "out"), LoadSpec(device="cpu", dtype="float32"))
    assert again.stored_dtype == torch.bfloat16
    assert fingerprint(again.model) == fingerprint(
        load(str(folder), LoadSpec(device="cpu", dtype="float32")).model
    )


def test_device_map_places_the_model(model_folder):
    lm = load(str(model_folder), LoadSpec(device_map="auto", dtype="float32"))
    out = lm.model(input_ids=torch.tensor([[1, 5, 6]], device=lm.device))
    assert bool(torch.isfinite(out.logits).all())


def test_a_model_that_does_not_fit_on_the_devices_is_refused(model_folder, monkeypatch):
    from saber.lm import load as loading

    read = loading._read

    def left_off(what, *args, **kwargs):
        found = read(what, *args, **kwargs)
        if "weights" in what:
            found.model.layers[3].to("meta")  # where accelerate puts what it brings in for each call alone
        return found

    monkeypatch.setattr(loading, "_read", left_off)
    with pytest.raises(ModelError, match=r"does not fit .* model\.layers\.3\.input_layernorm .*--dtype"):
        load(str(model_folder), LoadSpec(device_map="auto", dtype="float32"))


def test_a_chat_template_file_is_used(tmp_path):
    folder = tmp_path / "plain"
    make_model("llama").save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (tmp_path / "t.jinja").write_text(CHAT_TEMPLATE)
    lm = load(str(folder), LoadSpec(device="cpu", chat_template=str(tmp_path / "t.jinja")))
    assert render(lm, "hello") == "<s><user> hello <end> <bot>"
    with pytest.raises(ModelError, match="cannot read the chat template"):
        load(str(folder), LoadSpec(device="cpu", chat_template=str(tmp_path / "none.jinja")))


def test_the_public_face_is_whole():
    import saber

    assert saber.__all__ == sorted(saber.__all__)
    for name in saber.__all__:
        assert getattr(saber, name) is not None
    with pytest.raises(AttributeError):
        saber.nothing  # noqa: B018
