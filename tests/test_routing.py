"""What goes into each expert is the same in padded batches as one text at a time, however it is routed."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import make_lm
from test_architectures import FAMILIES, language_model
from test_selective import moe, texts
from torch import nn

from saber.errors import ModelError
from saber.lm import forward, inputs
from saber.lm.inputs import plan_reading, read_inputs
from saber.lm.routing import Extent, find_gates, parted, routes
from saber.lm.tap import Tap, plain_experts
from saber.lm.writers import find_writers

# All of `FAMILIES` with experts, and other ways to route: sigmoids, hashes, shared and zero experts.
ROUTED = [
    *("mixtral", "gpt_oss", "qwen3_moe", "qwen3_next", "deepseek_v3", "glm4_moe", "llama4_text"),
    *("gemma4", "jamba", "granitemoehybrid", "qwen2_moe", "kimi_k25", "hy_v4", "deepseek_v4"),
    *("longcat_flash", "phimoe", "minimax_m2"),
]

# In float32 its sums of one text are 5e-6 off those in float64, on an AMD EPYC, without any padding.
LIMITS = {"qwen3_next": 1e-5}


def add(sums, key, rows):
    """Add h h^T of rows in float64, and how many there are."""
    rows = torch.cat([rows.double(), torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    sums[key] = sums.get(key, 0) + rows.T @ rows


def of_one(lm, writers, ids, known):
    """What a text adds to the sums in a pass of its own, which it has once for all that share `known`."""
    if tuple(ids) not in known:
        sums = known[tuple(ids)] = {}
        with (
            plain_experts(lm),
            torch.no_grad(),
            Tap(lm, writers, lambda key, rows: add(sums, key, rows)),
        ):
            lm.model(input_ids=torch.tensor([ids]), use_cache=False)
    return known[tuple(ids)]


def alone(lm, writers, encoded, offset, last, known):
    """What whole texts add to the sums, each in a pass of its own, less what the part not read does."""
    sums = {}
    for text in encoded:
        unread = len(text.ids) - last if last else offset
        for end, sign in ((len(text.ids), 1.0), (unread, -1.0)):
            for key, value in (of_one(lm, writers, text.ids[:end], known) if end else {}).items():
                sums[key] = sums.get(key, 0) + sign * value
    return {key: value for key, value in sums.items() if value[-1, -1].abs() > 0.5}


def assert_as_alone(lm, writers, encoded, last, limit, padded=True, known=None):
    """Compare every expert's sums; return how often the model ran."""
    reading = plan_reading(lm, writers, encoded, last=last, tokens_per_batch=160)
    uneven = [len(set(lengths)) > 1 for _, lengths in reading.batches]
    assert any(uneven) == padded
    passes, found = [], {}
    handle = lm.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    read_inputs(lm, writers, reading, lambda key, rows: add(found, key, rows))
    handle.remove()
    found = {key: value for key, value in found.items() if value[-1, -1] > 0.5}
    expected = alone(lm, writers, encoded, reading.offset, last, {} if known is None else known)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert round(float(found[key][-1, -1])) == round(float(value[-1, -1])), key
        moment = value[:-1, :-1]
        off = float((found[key][:-1, :-1] - moment).norm() / moment.norm())
        assert off < limit, (key, off)
    assert not any("forward" in vars(module) for module in lm.model.modules())
    return len(passes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ROUTED)
def test_moments_of_every_expert_are_those_of_one_text_at_a_time(family):
    lm = language_model(family, **FAMILIES.get(family, {}))
    writers = find_writers(lm)
    assert routes(lm, writers)
    encoded, known, exact = texts(12, 3, 5, 40), {}, {}
    lm.model.double()
    with plain_experts(lm):  # the fused products know no float64
        # Some compute parts of a layer in float32 all the same.
        assert assert_as_alone(lm, writers, encoded, 0, 3e-7, known=exact) <= 3
    lm.model.float()
    limit = LIMITS.get(family, 3e-6)
    assert assert_as_alone(lm, writers, encoded, 0, limit, known=known) <= 3
    # Here what is held against is a small difference of large sums.
    assert assert_as_alone(lm, writers, encoded, 2, 5e-5, known=known) <= 3


@pytest.mark.parametrize("last", [0, 1, 3])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_moments_in_float64_are_the_same_but_for_its_rounding(family, last):
    lm = moe(family)
    writers = find_writers(lm)
    lm.model.double()
    with plain_experts(lm):  # the fused products know no float64
        assert assert_as_alone(lm, writers, texts(12, 3, 5, 40), last, 1e-12) <= 3


@pytest.mark.parametrize("last", [0, 2])
def test_texts_of_all_lengths_run_together(last):
    lm = moe()
    writers, encoded = find_writers(lm), texts(64, 1, 6, 70)
    lengths = [len(e.ids) for e in encoded]
    passes = []
    lm.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    reading = plan_reading(lm, writers, encoded, last=last)
    planned, passes[:] = len(passes), []
    read_inputs(lm, writers, reading, lambda _key, _rows: None)
    assert len(set(lengths)) > 40
    assert len(passes) == len(reading.batches) <= sum(lengths) / inputs.TOKENS_PER_BATCH + 2
    assert planned <= 3  # who is routed, a trial, and the prefix


class Listed(nn.Module):
    """Experts one by one in a list, each given the tokens that are routed to it."""

    def __init__(self, width, inner, top=1, room=0.0):
        super().__init__()
        self.gate = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width, bias=False))
            for _ in range(4)
        )
        self.top, self.room = top, room

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            tokens, place = (chosen == index).nonzero(as_tuple=True)
            if self.room:  # an expert has no place for more
                tokens, place = (x[: int(self.room * len(flat))] for x in (tokens, place))
            # In an order of their own.
            tokens, place = tokens.flip(0), place.flip(0)
            out[tokens] += weights[tokens, place, None] * expert(flat[tokens])
        return out.view_as(hidden)


def listed(hooked=False, **how):
    lm = make_lm()
    torch.manual_seed(0)
    for layer in lm.layers:
        layer.mlp = Listed(lm.d_model, 24, **how).requires_grad_(False)
        if hooked:
            add_hook_to_module(layer.mlp, AlignDevicesHook("cpu", io_same_device=True))
    return lm


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("top", [1, 2])
def test_experts_in_a_list_are_read_as_one_text_at_a_time(top, last):
    lm = listed(top=top)
    writers = find_writers(lm)
    assert len(writers) == 4 * 5
    assert [g.module for g in find_gates(lm, writers)] == [layer.mlp for layer in lm.layers]
    assert assert_as_alone(lm, writers, texts(12, 3, 5, 40), last, 1e-5) <= 3


@pytest.mark.parametrize("last", [0, 2])
def test_where_tokens_compete_for_an_expert_texts_of_one_length_run_together(last):
    lm = listed(top=2, room=0.4)
    writers = find_writers(lm)
    assert find_gates(lm, writers) is None
    reading = plan_reading(lm, writers, texts(12, 3, 5, 40), last=last)
    assert all(len(set(lengths)) == 1 for _, lengths in reading.batches)


@pytest.mark.parametrize("last", [0, 2])
def test_routed_attention_is_read_in_texts_of_one_length(last):
    """Its experts lie before and behind what mixes tokens, so no module around them treats each alone."""
    lm = language_model("jetmoe")
    writers = find_writers(lm)
    assert find_gates(lm, writers) is None
    assert_as_alone(lm, writers, texts(12, 3, 5, 40), last, 1e-5, padded=False)


def test_last_tokens_that_cannot_be_told_apart_are_an_error(monkeypatch):
    lm = listed(top=2, room=0.4)
    for module in (forward, inputs):
        monkeypatch.setattr(module, "cache_name", lambda _lm: None)
    writers, encoded = find_writers(lm), texts(3, 3, 5, 9)
    read_inputs(lm, writers, plan_reading(lm, writers, encoded), lambda *_: None)
    with pytest.raises(ModelError, match=r"hands on no state.*--edit orthogonal"):
        read_inputs(lm, writers, plan_reading(lm, writers, encoded, last=1), lambda *_: None)


def test_tokens_that_come_in_another_order_are_taken_where_they_are_in_that_of_the_texts():
    lm = listed(top=2)
    for layer in lm.layers:
        layer.mlp = Sideways(layer.mlp)
    writers = find_writers(lm)
    assert [type(g.module) for g in find_gates(lm, writers)] == [Sideways] * 4
    assert_as_alone(lm, writers, texts(12, 3, 5, 40), 2, 1e-5)


class Sideways(nn.Module):
    """Hands tokens on by place first, as code that is sequence-first does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        flat = hidden.transpose(0, 1).flatten(0, 1)
        return self.inner(flat).unflatten(0, hidden.shape[1::-1]).transpose(0, 1)


def test_a_dense_model_has_no_gates(llama):
    writers = find_writers(llama)
    assert find_gates(llama, writers) == ()
    assert not routes(llama, writers)


def test_hooks_of_accelerate_stay_and_what_is_no_token_is_left_alone():
    lm = listed(hooked=True, top=2)
    writers = find_writers(lm)
    gates = find_gates(lm, writers)
    before = [vars(layer.mlp)["forward"] for layer in lm.layers]
    ids = torch.randint(6, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = lm.model(input_ids=ids).logits
        read, others = torch.tensor([0, 3, 7]), torch.tensor([1, 2, 4, 5, 6, 8, 9, 10, 11])
        turns = set()
        with parted(gates, Extent(2, 6), read, others) as turn:
            lm.layers[0].mlp.gate.register_forward_hook(lambda *_: turns.add(turn.of))
            split = lm.model(input_ids=ids).logits
    torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-4)
    assert turns == {"read", "others"}
    assert turn.of == "all"
    assert [vars(layer.mlp)["forward"] for layer in lm.layers] == before
