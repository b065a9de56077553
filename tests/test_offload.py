"""Layers that wait in main memory: they come for their calls, and what is done to them stays.

Here the device is the CPU, where coming means being copied; `test_accelerator.py` has one with memory of
its own.
"""

import pytest
import torch
from conftest import make_lm, make_model
from test_cli import failing
from torch import nn

from saber.ablation import EditPlan, Factor, applied
from saber.config import override, preset
from saber.errors import ModelError, UsageError
from saber.lm import offload
from saber.lm.chat import encode
from saber.lm.offload import at_home, home, is_kept_aside, keep_aside, require_sense
from saber.lm.tap import Tap
from saber.lm.writers import find_writers
from saber.moments import read_decisions

CPU = torch.device("cpu")
TEXTS = ["Name a fruit.", "Name a large town in the north.", "Count."]


@pytest.fixture(autouse=True)
def copied(monkeypatch):
    """Let what comes to the device be a copy, and count them."""
    sent = []

    def send(tensor, device):
        sent.append(device)
        return tensor.detach().clone()

    monkeypatch.setattr(offload, "_sent", send)
    return sent


def addresses(module):
    return [t.data_ptr() for t in (*module.parameters(), *module.buffers())]


def alone(layer):
    """Return a layer that waits in main memory, the only one of its model."""
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    keep_aside(model, CPU)
    return layer


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_model_computes_as_before_and_its_layers_stay_where_they_are(family, copied):
    model = make_model(family).eval().requires_grad_(False)
    ids = torch.tensor([[1, 5, 6, 2]])
    before = model(input_ids=ids).logits
    keep_aside(model, CPU)
    layers = [m for m in model.modules() if is_kept_aside(m)]
    where, moved = addresses(nn.ModuleList(layers)), len(copied)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert addresses(nn.ModuleList(layers)) == where
    assert len(copied) - moved == len(where)
    assert len(layers) == model.config.num_hidden_layers
    assert {home(layer) for layer in layers} == {CPU}


def test_experts_come_with_their_layer():
    layer = nn.Module()
    layer.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    keep_aside(model, CPU)
    assert is_kept_aside(layer)
    assert not any(map(is_kept_aside, layer.experts))
    with pytest.raises(ModelError, match="no module list"):
        keep_aside(nn.Linear(2, 2), CPU)


class Bad(nn.Module):
    """A layer that fails once it has its weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        raise ValueError("no")


@pytest.mark.parametrize("full", [False, True], ids=["the call fails", "no room on the device"])
def test_a_failure_leaves_the_originals(full, monkeypatch):
    layer = alone(Bad())
    before = addresses(layer)
    if full:
        copies = iter([torch.zeros(2, 2), torch.zeros(2)])

        def send(_tensor, _device):
            try:
                return next(copies)
            except StopIteration:
                raise torch.OutOfMemoryError("CUDA out of memory.") from None

        monkeypatch.setattr(offload, "_sent", send)
    with pytest.raises(torch.OutOfMemoryError if full else ValueError):
        layer(torch.ones(1, 2))
    assert addresses(layer) == before


def test_a_layer_held_at_home_comes_once(copied):
    model = make_model("llama").eval().requires_grad_(False)
    keep_aside(model, CPU)
    layer = next(m for m in model.modules() if is_kept_aside(m))
    before, moved = addresses(layer), len(copied)
    with at_home(layer):
        there = addresses(layer)
        assert not set(there) & set(before)
        with pytest.raises(TypeError):
            layer()
        with at_home(layer):
            assert addresses(layer) == there
    assert len(copied) - moved == len(before)
    assert addresses(layer) == before
    with at_home(model):  # what does not wait is there
        assert addresses(layer) == before


def test_writers_and_their_inputs_are_those_of_the_whole_model():
    whole, aside = make_lm("llama"), make_lm("llama")
    keep_aside(aside.model, CPU)
    found = [find_writers(lm) for lm in (whole, aside)]
    assert [w.weight for w in found[0]] == [w.weight for w in found[1]] != []
    read = [
        read_decisions(lm, writers, *[encode(lm, TEXTS)] * 2, positions=2)
        for lm, writers in zip((whole, aside), found, strict=True)
    ]
    assert read[0].target.keys() == read[1].target.keys() == {(w.name, 0) for w in found[0]}
    assert all(torch.equal(rows, read[1].target[key]) for key, rows in read[0].target.items())


def reuse_places(model, monkeypatch):
    """Let a layer's tensors lie on the device where those of the layer before did, as in its memory."""
    slots = {}
    for layer in filter(is_kept_aside, model.modules()):
        for index, tensor in enumerate((*layer.parameters(), *layer.buffers())):
            slots[id(tensor)] = (index, tensor.shape)
    places = {}

    def send(tensor, _device):
        place = places.setdefault(slots[id(tensor)], torch.empty_like(tensor.detach()))
        return place.copy_(tensor.detach()).view_as(place)

    monkeypatch.setattr(offload, "_sent", send)


@pytest.mark.parametrize("layers", [{0}, {0, 2}, {1, 3}], ids=str)
def test_inputs_of_some_layers_are_not_mixed_up_with_those_of_others(layers, monkeypatch):
    whole, aside = make_lm("llama"), make_lm("llama")
    found = [w for w in find_writers(whole) if w.layer in layers]
    keep_aside(aside.model, CPU)
    reuse_places(aside.model, monkeypatch)
    ids, read = torch.tensor([[1, 5, 6, 2]]), []
    for lm in (whole, aside):
        rows = []
        with Tap(lm, found, lambda key, given, rows=rows: rows.append((key, given.clone()))):
            lm.model(input_ids=ids, use_cache=False)
        read.append(rows)
    assert [key for key, _ in read[0]] == [key for key, _ in read[1]] != []
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*read, strict=True))


def test_inputs_of_a_weight_that_layers_share_are_read_in_all_of_them():
    whole, aside = make_lm("llama"), make_lm("llama")
    for lm in (whole, aside):
        lm.layers[2].mlp = lm.layers[1].mlp
    (found,) = [
        w for w in find_writers(whole) if w.layer == 1 and w.weight.endswith("down_proj.weight")
    ]
    keep_aside(aside.model, CPU)
    read = []
    for lm in (whole, aside):
        rows = []
        with Tap(lm, [found], lambda _key, given, rows=rows: rows.append(given.clone())):
            lm.model(input_ids=torch.tensor([[1, 5, 6, 2]]), use_cache=False)
        read.append(rows)
    assert len(read[0]) == len(read[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*read, strict=True))


def test_a_layer_that_is_called_several_times_goes_back_each_time():
    model = nn.Module()
    layer = nn.Linear(2, 2)
    model.layers = nn.ModuleList([layer, layer])
    keep_aside(model, CPU)
    before = addresses(layer)
    layer(torch.ones(1, 2))
    assert addresses(layer) == before


def test_a_layer_goes_back_though_its_call_before_was_interrupted():
    """Hooks do not hear of Ctrl-C, behind which a notebook goes on with the same model."""
    layer = alone(nn.Linear(2, 2))
    before = addresses(layer)

    def interrupt(_module, _args):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        layer(torch.ones(1, 2))
    handle.remove()
    layer(torch.ones(1, 2))
    assert addresses(layer) == before


def test_a_call_that_fails_before_the_layer_comes_takes_it_from_nobody():
    layer = alone(nn.Linear(2, 2))
    with at_home(layer):
        there = addresses(layer)

        def fail(_module, _args):
            raise ValueError("no")

        layer.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(ValueError, match="no"):
            layer(torch.ones(1, 2))
        assert addresses(layer) == there


def test_an_edit_holds_and_is_undone():
    lm = make_lm("llama")
    keep_aside(lm.model, CPU)
    name = "model.layers.1.mlp.down_proj"
    weight = lm.model.get_parameter(f"{name}.weight")
    before, ids = weight.clone(), torch.tensor([[1, 5, 6, 2]])
    logits = lm.model(input_ids=ids).logits
    factor = Factor(torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1]), None, 0)
    with applied(lm.model, EditPlan({name: factor})):
        assert torch.equal(weight, before + 1)
        assert not torch.allclose(lm.model(input_ids=ids).logits, logits)
    assert torch.equal(weight, before)
    assert torch.equal(lm.model(input_ids=ids).logits, logits)


def test_what_gains_nothing_or_cannot_be_is_refused(capsys):
    assert (
        "The CPU has none" in failing(capsys, "inspect", "demo", "--offload", "--device", "cpu")[1]
    )
    with pytest.raises(UsageError, match="Apple's GPUs have none"):
        require_sense(torch.device("mps"), "")
    with pytest.raises(UsageError, match="--device-map spreads them"):
        require_sense(torch.device("cuda"), "auto")
    require_sense(torch.device("cuda"), "")
    aside = override(preset("default"), {"load": {"offload": True}})
    with pytest.raises(UsageError, match="needs gradients"):
        override(aside, {"edit": {"sensitivity": 1.0}})
    override(aside, {"edit": {"kind": "orthogonal", "sensitivity": 1.0}})
