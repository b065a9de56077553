"""Teacher-forced scores against plain computations, and the first-token readout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_lm

from saber.ablation import Removal, applied, orthogonal
from saber.errors import UsageError
from saber.evaluation.baseline import cache_folder
from saber.evaluation.divergence import (
    diverge,
    keep_reference,
    kl_divergence,
    own_answers,
    own_head,
    rounding,
    score_battery,
)
from saber.evaluation.readout import derive_readout
from saber.linalg import unit
from saber.lm.chat import encode, encode_answers
from saber.lm.device import holds
from saber.lm.forward import forward
from saber.lm.load import LoadSpec, as_stored, load
from saber.lm.model import fingerprint
from saber.lm.writers import find_writers
from saber.prompts import Prompt, PromptSet

PROMPTS = ["How are you?", "Tell me of the sea.", "No"]


def removal(lm):
    direction = unit(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1)))
    return orthogonal(lm, find_writers(lm), [Removal(direction, 1.0, 0)], "all")


def test_kl_is_zero_without_an_edit_and_undone_is_untouched(lm):
    answers = encode_answers(lm, ["well", "it is deep", "yes"])
    reference = keep_reference(lm, PROMPTS, answers)
    with applied(lm.model, removal(lm)):
        assert diverge(lm, reference).sequence.min() > 1e-4
    same = diverge(lm, reference)
    assert same.per_token.max() < 1e-5
    np.testing.assert_allclose(same.scores.nll, reference.scores.nll, rtol=1e-5)


def test_kl_equals_the_plain_one_from_two_copies():
    lm, untouched = make_lm("gemma2"), make_lm("gemma2")  # has a soft cap on its logits
    answers = encode_answers(lm, ["well", "it is deep", "yes"])
    reference = keep_reference(lm, PROMPTS, answers)
    with applied(lm.model, removal(lm)):
        found = diverge(lm, reference)
        for i, e in enumerate(encode(lm, PROMPTS, answers)):
            ids = torch.tensor([e.ids])
            p = untouched.model(input_ids=ids).logits[0, e.answer_positions]
            q = lm.model(input_ids=ids).logits[0, e.answer_positions]
            plain = kl_divergence(p, q)
            assert found.sequence[i] == pytest.approx(float(plain.mean()), rel=1e-3)
            assert found.first_token[i] == pytest.approx(float(plain[0]), rel=1e-3)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("gemma2", torch.float32)],
)
def test_a_base_with_another_output_head_is_read_by_its_own(family, dtype):
    lm, untouched = make_lm(family), make_lm(family)
    for one in (lm, untouched):
        one.model.to(dtype)
    with torch.no_grad():
        lm.head.weight.copy_(lm.head.weight.roll(1, 0))
    answers = encode_answers(lm, ["well", "it is deep", "yes"])
    reference = keep_reference(untouched, PROMPTS, answers)
    assert own_head(untouched.head, make_lm(family).model.to(dtype).lm_head) is None
    found = diverge(lm, reference, head=own_head(untouched.head, lm.head))
    for i, e in enumerate(encode(lm, PROMPTS, answers)):
        ids = torch.tensor([e.ids])
        p, q = (m.model(input_ids=ids).logits[0, e.answer_positions] for m in (untouched, lm))
        plain = float(kl_divergence(p.float(), q.float()).mean())
        assert plain > 0.1
        assert found.sequence[i] == pytest.approx(
            plain, rel=1e-3 if p.dtype.itemsize == 4 else 0.05
        )
    with pytest.raises(UsageError, match="no edit of --base"):
        own_head(make_lm("llama", d_model=64).head, lm.head)


def test_output_heads_differ_by_more_than_their_weights():
    plain, other = (torch.nn.Linear(2, 3) for _ in range(2))
    other.weight.data = plain.weight.data.clone()
    assert own_head(plain, other) is plain
    other.bias.data = plain.bias.data.clone()
    assert own_head(plain, other) is None
    odd = [torch.nn.Bilinear(2, 2, 3) for _ in range(2)]
    assert own_head(odd[0], odd[0]) is None
    with pytest.raises(UsageError, match="no linear maps"):
        own_head(*odd)


def test_logits_are_not_rounded_where_the_model_is(lm):
    lm.model.to(torch.bfloat16)
    rows = encode(lm, ["How are you?", "No"], encode_answers(lm, ["fine", "yes"]))
    ids, wanted = [e.ids for e in rows], [e.answer_positions for e in rows]
    capped = lm.model.config.model_type in ("gemma2", "gemma3_text")
    for batch, heads in forward(lm, ids, wanted, heads=True):
        exact = heads @ lm.head.weight.float().T
        if capped and lm.text_config.final_logit_softcapping:
            cap = lm.text_config.final_logit_softcapping
            exact = cap * torch.tanh(exact / cap)
        torch.testing.assert_close(batch.logits, exact, atol=1e-4, rtol=1e-4)
        assert not torch.equal(batch.logits, batch.logits.bfloat16().float())


def test_what_rounding_alone_moves_is_told(llama):
    reference = own_answers(llama, ["How are you?", "No"], 8)
    assert rounding(llama, reference) is None
    llama.model.to(torch.bfloat16)
    reference = own_answers(llama, ["How are you?", "No"], 8)
    assert float(diverge(llama, reference).per_token.max()) < 1e-9
    found = rounding(llama, reference)
    assert found is not None
    assert 1e-7 < float(found.sequence.mean()) < 0.1
    assert found.scores is reference.scores
    # Nothing of it stays behind.
    assert float(diverge(llama, reference).per_token.max()) < 1e-9


@pytest.mark.parametrize(
    ("dtype", "stored", "whole"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float16, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float16, torch.bfloat16, False),
        (torch.float16, torch.float32, False),
        (torch.float32, torch.float64, False),
    ],
)
def test_which_dtypes_hold_which(dtype, stored, whole):
    assert holds(dtype, stored) is whole


def test_weights_are_read_again_only_where_they_were_rounded(llama, pico):
    spec = LoadSpec(device="cpu", dtype="bfloat16")
    assert as_stored(replace(llama, stored_dtype=torch.float64), spec).model is llama.model
    rounded = load(str(pico), spec)
    again = as_stored(rounded, spec)
    assert (rounded.dtype, again.dtype) == (torch.bfloat16, torch.float32)
    assert fingerprint(again.model) == fingerprint(load(str(pico), LoadSpec(device="cpu")).model)


def test_kl_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert float(kl_divergence(p, p)) == 0.0


def test_battery_perplexity_equals_the_plain_one(lm):
    battery = PromptSet(
        "b", tuple(Prompt(str(i), "c", t, reference="so it is") for i, t in enumerate(PROMPTS))
    )
    found = score_battery(lm, battery)
    end = [lm.tokenizer.eos_token_id]
    for i, text in enumerate(PROMPTS):
        prompt = list(encode(lm, [text])[0].ids)
        answer = lm.tokenizer("so it is", add_special_tokens=False).input_ids + end
        logits = lm.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        nll = -sum(float(logits[len(prompt) - 1 + k, t]) for k, t in enumerate(answer))
        assert found.answers.nll[i] == pytest.approx(nll, rel=1e-4)
        assert found.answers.tokens[i] == len(answer)
        user = lm.tokenizer(text, add_special_tokens=False).input_ids
        assert found.prompts.tokens[i] == len(user)
        start = next(k for k in range(len(prompt)) if prompt[k : k + len(user)] == user)
        nll = -sum(float(logits[start - 1 + k, t]) for k, t in enumerate(user))
        assert found.prompts.nll[i] == pytest.approx(nll, rel=1e-4)
    total = found.answers
    assert total.perplexity() == pytest.approx(np.exp(total.nll.sum() / total.tokens.sum()))


def test_perplexity_of_texts_with_nothing_before_them_leaves_their_first_token_out(lm):
    lm.tokenizer.chat_template = "{{ messages[-1]['content'] }} <bot>"
    lm.tokenizer.bos_token = None
    battery = PromptSet(
        "b", tuple(Prompt(str(i), "c", t, reference="so it is") for i, t in enumerate(PROMPTS))
    )
    found = score_battery(lm, battery)
    for i, text in enumerate(PROMPTS):
        user = lm.tokenizer(text, add_special_tokens=False).input_ids
        assert list(encode(lm, [text])[0].ids[: len(user)]) == user
        logits = lm.model(input_ids=torch.tensor([user])).logits[0].log_softmax(-1)
        nll = -sum(float(logits[k, t]) for k, t in enumerate(user[1:]))
        assert found.prompts.tokens[i] == len(user) - 1
        assert found.prompts.nll[i] == pytest.approx(nll, rel=1e-4)
    with pytest.raises(ValueError, match="before a sequence"):
        next(forward(lm, [[5, 6]], [[-1, 0]]))


def test_readout_takes_the_tokens_that_open_targets_alone():
    target = torch.tensor([[0.6, 0.1, 0.3], [0.7, 0.1, 0.2]]).log()
    neutral = torch.tensor([[0.01, 0.1, 0.89], [0.02, 0.2, 0.78]]).log()
    readout = derive_readout(target, neutral)
    assert readout.tokens == (0,)
    odds = readout.log_odds(target)
    torch.testing.assert_close(odds, torch.tensor([0.6 / 0.4, 0.7 / 0.3]).log())
    assert float(readout.log_odds(neutral).max()) < 0


def test_readout_is_empty_where_no_token_tells():
    same = torch.tensor([[0.6, 0.1, 0.3], [0.7, 0.1, 0.2]]).log()
    readout = derive_readout(same, same)
    assert readout.tokens == ()
    assert readout.log_odds(same).sigmoid().max() < 1e-5


def test_the_cache_is_in_the_home_folder_where_its_name_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SABER_CACHE", "~/kept")
    assert cache_folder() == tmp_path / "kept"
    monkeypatch.setenv("SABER_CACHE", "off")
    assert cache_folder() is None
