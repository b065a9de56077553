"""Devices and dtypes by what is fast, chat templates, loading, fingerprints."""

import json
import shlex
from dataclasses import replace
from unittest.mock import Mock

import ggufs
import pytest
import torch
from conftest import CHAT_TEMPLATE, make_lm, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from test_cli import failing

from saber.cli.main import main
from saber.errors import ModelError, UsageError
from saber.evaluation.judge import PhraseJudge
from saber.lm import device as devices
from saber.lm import thought
from saber.lm.chat import encode, render
from saber.lm.generate import Completion, generate
from saber.lm.headers import main_dtype
from saber.lm.layers import layers_left_out
from saber.lm.load import LoadSpec, load, skeleton
from saber.lm.marks import decoded
from saber.lm.model import fingerprint
from saber.openings import late_opening
from saber.record import describe_model

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


def test_caches_get_a_share_of_what_the_weights_leave_and_no_more_than_is_free(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _d: (free, 24 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _d: 16 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _d: 15 * gib)
    cuda = torch.device("cuda")
    free = 8 * gib
    assert devices.memory_for_caches(cuda, 14 * gib) == 4 * gib
    free = 1 * gib
    assert devices.memory_for_caches(cuda, 14 * gib) == int(1.6 * gib)
    assert devices.memory_for_caches(CPU, 14 * gib) is None


def test_running_out_of_memory_is_told_from_other_errors():
    assert devices.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried ..."))
    assert devices.is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: ..."))
    assert not devices.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not devices.is_out_of_memory(ValueError("out of memory"))


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


@pytest.mark.parametrize(
    ("opener", "empty"),
    [
        ("<think>\n", "<think>\n\n</think>\n\n"),
        ("[THINK]", "[THINK][/THINK]"),
        ("<|channel>thought\n", "<|channel>thought\n<channel|>"),
    ],
)
def test_a_thought_that_the_template_opens_is_closed_empty(opener, empty):
    lm = make_lm("llama")
    lm.tokenizer.chat_template = CHAT_TEMPLATE + "{% if add_generation_prompt %}" + opener + "{% endif %}"
    assert render(lm, "x") == "<s><user> x <end> <bot>" + empty


HARMONY = "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("marks", "said", "prefix"),
    [
        (["<think>"], "<think>\nOkay", "<think>\n\n</think>\n\n"),
        (["<think>"], "Paris is <think>", ""),
        (["<|channel|>", "<|message|>"], "<|channel|>analysis<|message|>", HARMONY),
        ([], "<think>\nOkay", ""),
    ],
)
def test_a_model_that_thinks_by_itself_gets_an_empty_thought(marks, said, prefix, monkeypatch):
    lm = make_lm("llama")
    lm.tokenizer.add_special_tokens({"additional_special_tokens": marks})
    assert thought.empty_thought(lm) == ""  # it writes what a random model writes
    ids = tuple(lm.tokenizer(said, add_special_tokens=False).input_ids)
    monkeypatch.setattr(thought, "generate", lambda _lm, asked, _n: [Completion(ids, said)] * len(asked))
    assert thought.empty_thought(lm) == prefix


@pytest.mark.parametrize(
    ("marks", "written", "read"),
    [
        (
            ["[THINK]", "[/THINK]"],
            "[THINK]I cannot.[/THINK]Sure.</s>",
            "[THINK]I cannot.[/THINK]Sure.",
        ),
        (["<|channel>", "<channel|>"], "<|channel>thought\nHm.<channel|>Sure.", None),
        (
            ["<think>", "</think>"],
            "<think>Hm.</think> <user>Sure.<end>",
            "<think>Hm.</think> Sure.",
        ),
        (
            ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"],
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|end|>",
            "<|channel|>analysis<|message|>Hm.assistant<|channel|>final<|message|>Yes.",
        ),
        ([], "[THINK]Sure.[/THINK]</s>", "[THINK]Sure.[/THINK]"),
    ],
)
def test_marks_of_a_thought_are_read_though_they_are_special_tokens(marks, written, read):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<end>", *marks]})
    ids = tokenizer(written, add_special_tokens=False).input_ids
    assert decoded(tokenizer, tuple(ids)) == (read or written)
    assert decoded(tokenizer, []) == ""


def test_an_answer_is_read_with_the_marks_of_its_thought():
    lm = make_lm("llama")
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    text = "[THINK]I can't help. Or can I?[/THINK]I can't help."
    ids = tuple(lm.tokenizer(text, add_special_tokens=False).input_ids)
    (one,) = generate(lm, ["Hi"], len(ids), starts=[ids])
    assert one == Completion(ids, text)
    heard = []

    def settled(so_far):
        heard.append(so_far)
        return True

    (one,) = generate(lm, ["Hi"], len(ids), starts=[ids[:-1]], settled=settled)
    assert (one.ids, heard) == (ids[:-1], [text[:-1]])
    opening = late_opening(lm, ids, lambda so_far: PhraseJudge().label(so_far) == "refusal")
    assert lm.tokenizer.decode(opening) == "[THINK]I can't help. Or can I?"


def test_a_thinking_models_prefix_stands_in_front_of_answers(model_folder):
    lm = load(str(model_folder), LoadSpec(device="cpu", response_prefix="<t></t>"))
    assert render(lm, "x") == "<s><user> x <end> <bot><t></t>"
    assert load(str(model_folder), LoadSpec(device="cpu")).response_prefix == ""


def test_a_template_that_writes_the_date_gives_the_same_prompt_on_every_day():
    lm = make_lm("llama")
    lm.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}|" + CHAT_TEMPLATE
    assert render(lm, "x").startswith("01 Jan 2026|")


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


def test_a_template_that_leaves_the_prompt_out_is_one_clear_error():
    lm = make_lm("llama")
    lm.tokenizer.chat_template = "<s><user> {{ messages[0]['role'] }} <bot>"
    with pytest.raises(ModelError, match=r"leaves out the user message.*--chat-template"):
        render(lm, "hello there")
    # One that strips and folds white space does not.
    lm.tokenizer.chat_template = "<s>{{ messages[-1]['content'].split() | join(' ') }}<bot>"
    assert render(lm, " hello\n  there ") == "<s>hello there<bot>"


def test_a_template_that_drops_thoughts_of_earlier_answers_goes_on():
    said = (("system", "be\n brief"), ("user", "a?"), ("assistant", "<think>hm</think>b."))
    lm = replace(make_lm("llama"), before=said)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.content.split('</think>')[-1].split() | join(' ') }}"
        "{% endfor %}<bot>"
    )
    assert render(lm, "x") == "<s>be brief<s>a?<s>b.<s>x<bot>"


def test_a_template_that_takes_messages_in_parts_gets_them_so():
    """As those of models that see images do."""
    lm = make_lm("llama")
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<s><user> {% for part in m['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} <bot>"
    )
    assert render(replace(lm, before=(("system", "brief"),)), "x y") == "<s><user> brief<s><user> x y <bot>"
    # A list that is written out is no prompt.
    lm.tokenizer.chat_template = "<s>{{ messages[-1]['content'] | string | replace('x y', '') }}<bot>"
    with pytest.raises(ModelError, match="leaves out the user message"):
        render(lm, "x y")
    lm.tokenizer.chat_template = "{% set c = messages[-1]['content'] %}<s>{{ '' if c is string else c }}"
    with pytest.raises(ModelError, match="leaves out the user message"):
        render(lm, "x y")


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


def test_a_folder_that_is_called_as_a_gguf_file_is_a_folder(model_folder):
    folder = model_folder.rename(model_folder.with_name("pico.gguf"))
    assert load(str(folder), LoadSpec(device="cpu")).source == "folder"
    assert len(skeleton(str(folder)).model.layers) == 4


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
            found[0].model.layers[3].to("meta")  # where accelerate puts what it brings in for each call alone
        return found

    monkeypatch.setattr(loading, "_read", left_off)
    with pytest.raises(ModelError, match=r"does not fit .* model\.layers\.3\.input_layernorm .*--dtype"):
        load(str(model_folder), LoadSpec(device_map="auto", dtype="float32"))


def test_weights_that_the_files_lack_are_not_made_up(tmp_path):
    folder = tmp_path / "torn"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    whole = load_file(folder / "model.safetensors")
    gone = "model.layers.2.self_attn.o_proj.weight"
    save_file({k: v for k, v in whole.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"lack 1 of its weights, {gone} for one.*again"):
        load(str(folder), LoadSpec(device="cpu"))
    packed = {k.replace(gone, gone.replace("weight", "qweight")): v for k, v in whole.items()}
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 .* They hold 1 others, \S+o_proj\.qweight .*not quantised"):
        load(str(folder), LoadSpec(device="cpu"))


def shortened(folder, family="llama", *, bare=False):
    """A checkpoint of four layers whose configuration says two."""
    make_model(family).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config[key] = 2
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:2]
    (folder / "config.json").write_text(json.dumps(config))
    if bare:
        held = load_file(folder / "model.safetensors")
        held = {name.removeprefix("transformer."): t for name, t in held.items()}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("family", "bare"), [("llama", False), ("gemma3", False), ("gpt2", False), ("gpt2", True)]
)
def test_layers_beyond_the_configured_are_noted(tmp_path, family, bare):
    """transformers leaves them out without a word; further prediction layers look the same."""
    lm = load(shortened(tmp_path, family, bare=bare), tokenizer=False)
    assert len(lm.layers) == 2
    (said,) = lm.notes
    assert "4 layers" in said
    assert "takes 2" in said
    assert describe_model(lm, "")["notes"] == [said]


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.4.self_attn.rotary_emb.inv_freq"],
        ["model.mtp.layers.9.mlp.up_proj.weight"] * 20,
        ["vision_tower.encoder.layers.9.mlp.fc1.weight"] * 20,
        ["model.layers.1.self_attn.rotary_emb.inv_freq"],
        ["lm_head.weight"],
    ],
)
def test_what_is_no_layer_of_the_decoder_is_not_noted(names):
    names = [f"{name}{i or ''}" for i, name in enumerate(names)]
    assert layers_left_out(make_model("llama"), "model.layers", names) == 0


def test_a_model_that_is_whole_has_no_note(model_folder):
    lm = load(str(model_folder))
    assert lm.notes == ()
    assert "notes" not in describe_model(lm, "")


def test_commands_say_that_layers_are_left_out(tmp_path, capsys):
    folder = shortened(tmp_path / "m")
    make_tokenizer().save_pretrained(folder)
    main(["inspect", folder])
    assert " ".join(capsys.readouterr().out.split()).count("note: the files hold 4 layers") == 1
    main(["inspect", folder, "--json"])
    assert "4 layers" in json.loads(capsys.readouterr().out)["notes"][0]
    for words in (["chat", folder, "--prompt", "Hi"], ["run", folder], ["audit", folder]):
        more = [] if words[0] == "chat" else ["--limit", "2", "--out", str(tmp_path / words[0])]
        main([*words, *more, "--max-new-tokens", "4"])
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("note: the files hold 4 layers") == 1


def test_pickled_weights_alone_are_told_with_the_command_that_converts_them(
    model_folder, tmp_path, capsys
):
    weights = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").unlink()
    torch.save(weights, model_folder / "pytorch_model.bin")
    told = failing(capsys, "run", model_folder, "--out", tmp_path / "o")[1]
    assert "pickle weights only (pytorch_model.bin)" in told
    command = told[told.index("python -c") :]
    exec(shlex.split(command)[2], {})
    made = load(f"{model_folder}-safetensors")
    torch.testing.assert_close(load_file(tmp_path / "pico-safetensors/model.safetensors"), weights)
    assert made.tokenizer.chat_template == CHAT_TEMPLATE
    with pytest.raises(ModelError, match="python -c") as bare:
        load(str(model_folder), tokenizer=False)
    assert bare.value.remedy in failing(capsys, "diff", model_folder, model_folder)[1]


def test_an_index_that_names_a_file_that_is_not_there_is_told(tmp_path):
    """As `saber apply` and `saber diff` tell it."""
    make_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    make_tokenizer().save_pretrained(tmp_path)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = load(str(tmp_path), LoadSpec(device="cpu"))
    index = tmp_path / "model.safetensors.index.json"
    named = index.read_text()
    index.write_text(named.replace(gone.name, f"../{tmp_path.name}/{gone.name}"))
    assert fingerprint(load(str(tmp_path), LoadSpec(device="cpu")).model) == fingerprint(whole.model)
    index.write_text(named)
    gone.unlink()
    with pytest.raises(ModelError, match=rf"index.json names {gone.name}, which is not in .*Download what"):
        load(str(tmp_path), LoadSpec(device="cpu"))
    index.write_text('{"weight_map": {"a": ')
    with pytest.raises(UsageError, match="is not valid JSON"):
        load(str(tmp_path), LoadSpec(device="cpu"))


def test_a_tokenizer_that_takes_no_template_is_read_as_another(model_folder, monkeypatch):
    from saber.lm import load as loading

    class MistralCommonBackend:
        chat_template = None

    read = loading._read

    def without(what, *args, mistral_format=None, **kwargs):
        own = what.startswith("the tokenizer") and mistral_format is None
        return MistralCommonBackend() if own else read(what, *args, **kwargs)

    monkeypatch.setattr(loading, "_read", without)
    lm = load(str(model_folder), LoadSpec(device="cpu"))
    assert render(lm, "hello") == "<s><user> hello <end> <bot>"


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


@pytest.mark.parametrize("shard", ["50GB", "40KB"])
@pytest.mark.parametrize(
    ("most", "few"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_a_configuration_that_names_no_dtype_leaves_it_to_the_files(tmp_path, shard, most, few):
    """The dtype of most entries, not of most tensors: norms may well be in another."""
    from saber.ablation import EditPlan
    from saber.checkpoint import save_merged

    model = make_model("llama").to(most)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "k_proj" in name or "v_proj" in name:
            parameter.data = parameter.data.to(few)
    model.save_pretrained(tmp_path / "m", max_shard_size=shard)
    make_tokenizer().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "dtype"})
    )
    lm = load(str(tmp_path / "m"), LoadSpec(device="cpu"))
    assert lm.stored_dtype == most
    save_merged(lm, EditPlan(), tmp_path / "out")
    assert load(str(tmp_path / "out"), LoadSpec(device="cpu")).stored_dtype == most


def test_the_dtype_is_that_of_the_file_that_is_read_and_not_of_an_index_beside_it(tmp_path):
    make_model("llama").to(torch.float16).save_pretrained(tmp_path / "old", max_shard_size="40KB")
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    for file in (tmp_path / "old").glob("*.safetensors*"):
        file.rename(tmp_path / "m" / file.name)
    assert main_dtype(str(tmp_path / "m")) == torch.bfloat16


def test_files_that_cannot_be_read_for_their_dtype_are_told(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    del config["dtype"]
    (model_folder / "config.json").write_text(json.dumps(config))
    (model_folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cannot read the weights"):
        load(str(model_folder), LoadSpec(device="cpu"))


def adapter_in(folder, model_folder):
    """A LoRA adapter as PEFT saves it."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    spec = peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    peft.get_peft_model(model, spec).save_pretrained(folder)


def test_an_adapter_beside_the_weights_is_refused_before_any_work(model_folder, monkeypatch):
    adapter_in(model_folder, model_folder)
    monkeypatch.setattr("saber.lm.load._read", lambda *_, **__: pytest.fail("it was read"))
    for call in (load, skeleton):
        with pytest.raises(ModelError, match=r"beside its weights.*merge_and_unload"):
            call(str(model_folder))


def test_an_adapter_alone_is_called_one(model_folder, tmp_path, monkeypatch):
    adapter_in(tmp_path / "adapter", model_folder)
    with pytest.raises(ModelError, match=r"is a LoRA adapter, no model.*merge_and_unload"):
        load(str(tmp_path / "adapter"))
    monkeypatch.setattr(
        "saber.lm.load.find_adapter_config_file", lambda _name: "adapter_config.json"
    )
    with pytest.raises(ModelError, match="is or holds a LoRA adapter"):
        load("me/adapter")


@pytest.mark.parametrize(("dtype", "told"), [("bfloat16", True), ("float32", False)])
def test_a_model_whose_code_mixes_dtypes_is_told_how_it_runs(model_folder, monkeypatch, dtype, told):
    """Some of transformers multiply float32 states by 16-bit ones, which torch does not."""

    def mixed(_lm):
        raise RuntimeError("expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16")

    monkeypatch.setattr("saber.lm.load.ignores_padding", mixed)
    with pytest.raises(ModelError if told else RuntimeError) as found:
        load(str(model_folder), LoadSpec(device="cpu", dtype=dtype))
    assert ("does not run in bfloat16" in str(found.value)) == told
    assert ("Use --dtype float32." in str(found.value)) == told


def with_more_tokens(folder, **special):
    """Give a checkpoint's tokenizer tokens that its embeddings have no row of."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(400 - len(tokenizer))])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_padding_token_without_an_embedding_does_no_harm(model_folder):
    """As in models that a padding token was added to, and never trained."""
    plain = load(str(model_folder), LoadSpec(device="cpu"))
    assert with_more_tokens(model_folder, pad_token="<outside>").pad_token_id == 400
    lm = load(str(model_folder), LoadSpec(device="cpu"))
    assert lm.pad_id == 0
    prompts = ["a", "a much longer one"]
    assert [c.ids for c in generate(lm, prompts, 4)] == [c.ids for c in generate(plain, prompts, 4)]


def test_a_tokenizer_of_another_model_is_told(model_folder):
    tokenizer = with_more_tokens(model_folder, additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = "<|im_start|>" + CHAT_TEMPLATE
    tokenizer.save_pretrained(model_folder)
    with pytest.raises(ModelError, match=r"writes '<\|im_start\|>' as token 400, and the model has 400"):
        load(str(model_folder), LoadSpec(device="cpu"))


@pytest.mark.parametrize("length", [0, 4, 23, 24, 40, 200, 2000, -5000, -1])
def test_a_gguf_file_that_is_cut_off_is_one_line(tmp_path, length):
    whole = ggufs.write(ggufs.dense_model("llama"), tmp_path / "a.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:length])
    with pytest.raises(ModelError, match=r"cannot read .*x\.gguf"):
        load(str(tmp_path / "x.gguf"), LoadSpec(device="cpu"), tokenizer=False)
