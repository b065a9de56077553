"""Models whose behaviour is planted: what is known of them is found, ranked and removed.

A linear pico Llama (norms that are the identity, silent attention). A target token of kind j carries
a marker; one neuron a layer turns it into `SIZE` along a planted direction of that kind. A capability
token carries a marker of varying strength, which neurons turn into u = cos(a) v + sin(a) w with v the
first behaviour's direction: the angle says how entangled they are.
"""

import math

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCABULARY, configuration, make_tokenizer

from saber.ablation import Removal, applied, orthogonal
from saber.entanglement import EntanglementSpec, entangle
from saber.linalg import orthonormal_basis, unit
from saber.lm.layers import find_layers
from saber.lm.model import LanguageModel
from saber.lm.writers import find_writers
from saber.probing import Activations
from saber.spectral import SpectralSpec, extract, fit

K, SIZE, LAYERS, D = 2, 6.0, 4, 32
TARGET, NEUTRAL, CAPABILITY = range(10, 90), range(90, 170), range(170, 250)
REFUSE, ANSWER = 300, 310
SPEC = SpectralSpec(method="covariance", components=K)
LAYOUTS = ("per layer", "shared")


def planted(layout, angle=math.pi / 2):
    """A model, and its planted directions (layers, k, d_model), capability part w (d_model) apart."""
    generator = torch.Generator().manual_seed(4)
    inside = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    rows = torch.zeros(12, D)
    rows[:, 4:16] = inside
    own = rows[: LAYERS * K].reshape(LAYERS, K, D)
    behaviour = own if layout == "per layer" else own[:1].expand(LAYERS, -1, -1)
    w = rows[-1]
    config = configuration("llama")
    config.rms_norm_eps, config.tie_word_embeddings = 1e8, False
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1e4)
        elif "mlp" in name or "o_proj" in name or "lm_head" in name:
            parameter.zero_()
    embedding = model.get_input_embeddings().weight
    embedding.zero_()
    embedding[:, 16:] = 0.3 * torch.randn(VOCABULARY, D - 16, generator=generator)
    for token in TARGET:
        embedding[token, token % K] = 1.0
    for token in CAPABILITY:
        embedding[token, K] = 1.0 + float(torch.rand((), generator=generator))
    for layer, directions in zip(model.model.layers, behaviour, strict=True):
        outputs = [*directions, math.cos(angle) * directions[0] + math.sin(angle) * w]
        for j, output in enumerate(outputs):
            # silu(10 m) x 0.1 m is m^2 for a marker m well above zero.
            layer.mlp.gate_proj.weight[j, j] = 10.0
            layer.mlp.up_proj.weight[j, j] = 0.1
            layer.mlp.down_proj.weight[:, j] = SIZE * output
    for j in range(K):
        model.lm_head.weight[REFUSE + j] = behaviour[:, j].sum(0)
    model.lm_head.weight[ANSWER] = w
    lm = LanguageModel(
        model=model,
        tokenizer=make_tokenizer(),
        name="planted",
        source="folder",
        base=None,
        stored_dtype=torch.float32,
        layers_path=find_layers(model),
    )
    return lm, behaviour, w


def activations(lm, tokens):
    """The stream of one-token prompts: layer outputs by hooks, as the last one is normed later."""
    seen = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, o: seen.append(o[0] if type(o) is tuple else o))
        for layer in lm.layers
    ]
    ids = torch.tensor(list(tokens))[:, None]
    lm.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden = torch.stack([lm.model.get_input_embeddings()(ids), *seen], 2)
    kinds = tuple(f"kind {t % K}" for t in tokens) if tokens is TARGET else ("logic",) * len(ids)
    return Activations(hidden, kinds)


def logits(lm, tokens, row):
    """How strongly a readout fires, over the mean of what neutral tokens give it."""
    ids = torch.tensor(list(tokens))[:, None]
    neutral = torch.tensor(list(NEUTRAL))[:, None]
    fired = lm.model(input_ids=ids, use_cache=False).logits[:, 0, row].mean()
    return float(fired - lm.model(input_ids=neutral, use_cache=False).logits[:, 0, row].mean())


def largest_angle(a, b):
    """The largest principal angle between two spans of equal dimension, in radians."""
    overlap = orthonormal_basis(a.double()) @ orthonormal_basis(b.double()).T
    assert overlap.shape == (len(a), len(b))
    return float(torch.linalg.svdvals(overlap)[-1].clamp(max=1.0).acos())


def written(behaviour, layer):
    """What the stream holds of each kind behind a layer: the sum of what was written so far."""
    return behaviour[: layer + 1].sum(0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["svd", "covariance"])
def test_the_planted_span_of_every_layer_is_recovered(layout, method):
    lm, behaviour, _ = planted(layout)
    target, neutral = activations(lm, TARGET), activations(lm, NEUTRAL)
    spec = SpectralSpec(method=method, components=K, depth_low=0.2, depth_high=0.8)
    for layer in range(LAYERS):
        x, y = (a.hidden[:, 0, layer + 1].double() for a in (target, neutral))
        found = fit(x, y, target.categories, spec, None).patterns
        # Beside what is written stands the marker itself, of size 1.
        truth = SIZE * written(behaviour, layer)
        limit = 1.5 * math.atan(1 / float(truth.norm(dim=-1).min())) + 0.05
        assert largest_angle(found, truth) < limit
        blind = torch.randn(K, D, generator=torch.Generator().manual_seed(layer))
        assert largest_angle(blind, truth) > 2 * limit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_purity_is_what_was_planted_and_ranks_directions_by_it(layout):
    purities = []
    for degrees in (90, 60, 30):
        lm, behaviour, _ = planted(layout, math.radians(degrees))
        target, neutral, capability = (activations(lm, t) for t in (TARGET, NEUTRAL, CAPABILITY))
        found = extract(target, neutral, SPEC, generator=np.random.default_rng(0))
        spec = EntanglementSpec(measure="energy", weight=1.0, null_draws=20)
        generator = torch.Generator().manual_seed(0)
        measured = entangle(found, target, neutral, capability, spec, generator=generator)
        strength = lm.model.get_input_embeddings().weight[list(CAPABILITY), K].double() ** 2
        for direction, entanglement in zip(found, measured, strict=True):
            truth = SIZE * written(behaviour, direction.layer)[0].double()
            shared = direction.pattern.double() @ truth
            gap = target.hidden[:, 0, direction.layer + 1].mean(0).double()
            gap = gap - neutral.hidden[:, 0, direction.layer + 1].mean(0)
            signal = float((direction.pattern.double() @ gap) ** 2)
            # The mean over targets holds each kind at 1 / K of them.
            energy = (math.cos(math.radians(degrees)) * shared) ** 2 * strength.var(unbiased=False)
            assert entanglement.purity == pytest.approx(signal / (signal + float(energy)), abs=0.06)
        by_overlap = sorted(
            zip(found, measured, strict=True),
            key=lambda pair: abs(float(pair[0].pattern @ unit(behaviour[pair[0].layer, 0]))),
        )
        if degrees < 90:
            pure, entangled = by_overlap[0][1].purity, by_overlap[-1][1].purity
            assert pure > entangled + 0.01
        purities.append(min(m.purity for m in measured))
    assert purities[0] > purities[1] > purities[2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("degrees", [90, 40])
def test_ablation_removes_the_behaviour_and_keeps_the_capability(layout, degrees):
    lm, _, _ = planted(layout, math.radians(degrees))
    target, neutral = activations(lm, TARGET), activations(lm, NEUTRAL)
    found = extract(target, neutral, SPEC, generator=np.random.default_rng(0))
    best = [d for d in found if d.layer == LAYERS - 1] if layout == "shared" else found
    before = [logits(lm, TARGET, REFUSE + j) for j in range(K)]
    answers = logits(lm, CAPABILITY, ANSWER)
    assert min(before) > 1
    assert answers > 1
    writers = find_writers(lm)
    removals = [Removal(unit(d.pattern), 1.0, d.layer) for d in best]
    with applied(lm.model, orthogonal(lm, writers, removals, "all")):
        after = [logits(lm, TARGET, REFUSE + j) for j in range(K)]
        assert max(a / b for a, b in zip(after, before, strict=True)) < 0.05
        assert logits(lm, CAPABILITY, ANSWER) == pytest.approx(answers, rel=0.02)
    blind = unit(torch.randn(1, D, generator=torch.Generator().manual_seed(3)))[0]
    with applied(lm.model, orthogonal(lm, writers, [Removal(blind, 1.0, 0)], "all")):
        kept = [logits(lm, TARGET, REFUSE + j) for j in range(K)]
    assert min(a / b for a, b in zip(kept, before, strict=True)) > 0.7
