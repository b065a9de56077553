"""A planted behaviour is found, chosen causally, and removed; self-repair is measured."""

import numpy as np
import pytest
import torch
from conftest import make_lm
from test_routing import listed

from saber.ablation import EditPlan, EditSpec, Removal, orthogonal
from saber.candidates import choose
from saber.entanglement import Entanglement
from saber.hydra import compensation
from saber.linalg import unit
from saber.lm.writers import find_writers
from saber.passes import RefineSpec
from saber.probing import ProbeSpec, probe, probe_capabilities
from saber.prompts import Prompt, PromptSet
from saber.spectral import Direction


def direction(layer=0, d_prime=2.0, q=0.0):
    v = unit(torch.randn(32, generator=torch.Generator().manual_seed(layer)))
    return Direction(layer, -1, 0, v, v, d_prime, 0.9, 0.8, 0.95, 0.01, q)


def entangled(amount):
    return Entanglement({"logic": amount}, {"logic": amount}, "logic", amount, 0.5)


def status(candidates):
    return [(c.direction.layer, c.status, round(c.strength, 3)) for c in candidates]


def test_strength_is_alpha_times_purity_and_the_floor_skips():
    rows = [direction(0, 3.0), direction(1, 2.0), direction(2, 1.0), direction(3, 5.0, q=0.5)]
    measured = [entangled(0.2), entangled(0.6), entangled(0.99), entangled(0.0)]
    spec, edit = RefineSpec(top_k=3, shortlist=0), EditSpec(alpha=0.85)
    found = choose(rows, measured, [None] * 4, edit, spec)
    assert sorted(status(found)) == [
        (0, "ablated", 0.68),
        (1, "weakened", 0.34),
        (2, "skipped", 0.0),
        (3, "not selected", 0.0),
    ]


@pytest.mark.parametrize("strength", ["purity", "constant", "lambda"])
def test_what_is_wholly_entangled_has_no_strength_by_purity_even_without_a_floor(strength):
    edit = EditSpec(strength=strength, skip_below=0.0)
    (found,) = choose([direction(0, 3.0)], [entangled(1.0)], [None], edit, RefineSpec(shortlist=0))
    assert found.status == ("weakened" if strength == "constant" else "skipped")


def test_top_k_takes_the_best_scores():
    rows = [direction(i, d) for i, d in enumerate((1.0, 3.0, 2.0))]
    found = choose(
        rows, [entangled(0.0)] * 3, [None] * 3, EditSpec(), RefineSpec(top_k=2, shortlist=0)
    )
    assert [c.direction.layer for c in found if c.status == "ablated"] == [1, 2]


def test_with_a_shortlist_what_causes_the_behaviour_is_taken():
    rows = [direction(0, 9.0), direction(1, 3.0), direction(2, 2.0)]
    causal = [(0.0, 0.1), (4.0, 0.1), None]
    found = choose(rows, [entangled(0.0)] * 3, causal, EditSpec(), RefineSpec(top_k=1, shortlist=2))
    assert [c.direction.layer for c in found if c.status == "ablated"] == [1]


def prompts(n, word, reference=""):
    return PromptSet(
        word,
        tuple(Prompt(f"{i}", "c", f"{word} {i} please", reference=reference) for i in range(n)),
    )


def test_probe_reads_each_layer_as_a_plain_pass_does(lm):
    found = probe(lm, prompts(3, "tell"), ProbeSpec(positions=2), first_token=True)
    assert found.hidden.shape == (3, 2, 5, 32)
    from saber.lm.chat import encode

    for i, e in enumerate(encode(lm, prompts(3, "tell").texts)):
        out = lm.model(input_ids=torch.tensor([e.ids]), output_hidden_states=True)
        for depth in range(4):  # the last one is normalised by the model
            torch.testing.assert_close(
                found.hidden[i, :, depth], out.hidden_states[depth][0, -2:], atol=1e-3, rtol=1e-3
            )
        torch.testing.assert_close(
            found.first_token[i], out.logits[0, -1].log_softmax(-1), atol=1e-3, rtol=1e-3
        )


def test_capability_probe_labels_every_sample(llama):
    found = probe_capabilities(llama, prompts(4, "sum", "it is four"), ProbeSpec(answer_tokens=3))
    assert found.hidden.shape == (16, 1, 5, 32)
    assert found.categories == ("c",) * 16


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compensation_is_nil_when_nothing_downstream_reads_the_direction(family):
    """The last layer's writer has nothing after it: what it loses stays lost."""
    lm = make_lm(family)
    writers = find_writers(lm)
    v = unit(torch.randn(32, generator=torch.Generator().manual_seed(8)))
    plan = orthogonal(lm, writers[-1:], [Removal(v, 1.0, 3)], "own")
    found = compensation(
        lm,
        writers,
        EditPlan(),
        plan,
        v,
        ["kill it", "burn it now"],
        ["mill it", "turn it now"],
        generator=np.random.default_rng(0),
    )
    assert abs(found.estimate) < 1e-3


def test_compensation_is_of_the_pairs_that_are_told():
    lm = make_lm("llama")
    v = unit(torch.randn(32, generator=torch.Generator().manual_seed(8)))
    writers = find_writers(lm)
    plan = orthogonal(lm, writers, [Removal(v, 1.0, 0)], "own")
    target, neutral = ["kill it", "burn it now", "rob her"], ["mill it", "turn it now", "rub her"]

    def found(target, neutral, **pairs):
        rng = np.random.default_rng(0)
        return compensation(
            lm, writers, EditPlan(), plan, v, target, neutral, generator=rng, **pairs
        )

    whole = found(target, neutral)
    assert found(target, neutral, pairs=[(i, i) for i in range(3)]) == whole
    mixed = [neutral[i] for i in (2, 0, 1)]
    same = found(target, mixed, pairs=[(0, 1), (1, 2), (2, 0)])
    assert (same.low, same.high) == pytest.approx((whole.low, whole.high), rel=1e-4)
    assert found(target, mixed).low != pytest.approx(whole.low, rel=1e-2)
    fewer = found(target, neutral[1:], pairs=[(1, 0), (2, 1)])
    assert fewer.estimate == pytest.approx(found(target[1:], neutral[1:]).estimate, rel=1e-4)


def test_compensation_sees_what_later_layers_do():
    lm = make_lm("llama")
    writers = find_writers(lm)
    v = unit(torch.randn(32, generator=torch.Generator().manual_seed(8)))
    plan = orthogonal(lm, writers, [Removal(v, 1.0, 0)], "own")
    found = compensation(
        lm,
        writers,
        EditPlan(),
        plan,
        v,
        ["kill it", "burn it now"],
        ["mill it", "turn it now"],
        generator=np.random.default_rng(0),
    )
    assert abs(found.estimate) > 1e-3
    assert found.low <= found.estimate <= found.high
    everywhere = orthogonal(lm, writers, [Removal(v, 1.0, 0)], "all")
    assert (
        compensation(
            lm,
            writers,
            EditPlan(),
            everywhere,
            v,
            ["a", "b"],
            ["c", "d"],
            generator=np.random.default_rng(0),
        )
        is None
    )


def test_compensation_leaves_out_experts_in_a_list():
    """Their module sees the tokens that are routed to it, if any."""
    lm = listed(top=1)
    v = unit(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(8)))
    writers = find_writers(lm)
    dense = [w for w in writers if ".experts." not in w.weight]
    assert (len(writers), len(dense)) == (20, 4)
    plan = orthogonal(lm, writers, [Removal(v, 1.0, 1)], "upstream")

    def found(writers):
        rng = np.random.default_rng(0)
        texts = ["kill it", "burn it now"], ["mill it", "turn it now"]
        return compensation(lm, writers, EditPlan(), plan, v, *texts, generator=rng)

    assert found(writers) == found(dense) is not None
    assert found([w for w in writers if w not in dense]) is None
