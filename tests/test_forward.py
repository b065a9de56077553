"""Laws of forward passes and generation: batching and shared prefixes change nothing."""

import copy

import pytest
import torch
from conftest import make_lm
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from saber.errors import ModelError
from saber.evaluation.divergence import diverge, exact, keep_reference, own_answers
from saber.lm import cache
from saber.lm import generate as generation
from saber.lm.cache import RoomyLayer, is_roomy, join, make_room
from saber.lm.chat import common_prefix, encode, encode_answers, measure_template
from saber.lm.forward import cacheable, enlarged, forward, plan_batches
from saber.lm.generate import Request, agreed, answer, generate, greedy_starts
from saber.lm.inputs import plan_reading, read_inputs
from saber.lm.writers import find_writers

PROMPTS = ["How are you?", "Tell me of the sea and of ships.", "No", "What is 2 + 2, and why?"]


def test_forward_equals_the_plain_pass_of_each_sequence(lm):
    answers = encode_answers(lm, ["fine", "they sail far", "yes", "4"])
    rows = encode(lm, PROMPTS, answers)
    found = {}
    for batch, _ in forward(lm, [e.ids for e in rows], [e.answer_positions for e in rows]):
        found.update(zip(batch.rows, batch.split(batch.logits), strict=True))
        assert batch.offset > 0  # the template's prefix was shared
    for index, e in enumerate(rows):
        plain = lm.model(input_ids=torch.tensor([e.ids])).logits[0, e.answer_positions]
        torch.testing.assert_close(found[index], plain, atol=2e-4, rtol=2e-4)


def test_generation_equals_one_prompt_at_a_time(lm):
    together = generate(lm, PROMPTS, 12)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([encode(lm, [prompt])[0].ids])
        plain = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        assert list(completion.ids) == plain[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_window_counts_no_padding_between_what_prompts_share_and_their_own(family):
    lm = make_lm(family)  # with a window of 256 tokens
    prompts = ["a" * count for count in (1, 30, 200, 240, 250, 300)]
    for prompt, completion in zip(prompts, generate(lm, prompts, 8), strict=True):
        (encoded,) = encode(lm, [prompt], [completion.ids])
        scores = lm.model(input_ids=torch.tensor([encoded.ids])).logits[0]
        assert completion.ids == tuple(scores[encoded.answer_positions].argmax(-1).tolist())


def test_texts_longer_than_a_model_has_places_are_told():
    lm, long = make_lm("gpt2"), "x" * 510  # with places for 512 tokens
    encoded = encode(lm, ["Hi", long])
    with pytest.raises(ModelError, match=r"has 517 tokens .* no more than 512\."):
        list(forward(lm, [e.ids for e in encoded], [[0], [0]]))
    with pytest.raises(ModelError, match=r"has 513 tokens .* no more than 512\..*max_new_tokens"):
        generate(lm, [long[:500]], 20)
    writers = find_writers(lm)
    reading = plan_reading(lm, writers, encoded)
    with pytest.raises(ModelError, match="no more than 512"):
        read_inputs(lm, writers, reading, lambda *_: None)


def test_drafts_change_nothing_but_the_work(lm):
    whole = generate(lm, PROMPTS, 12)
    drafts = [list(c.ids) for c in whole]
    drafts[1][5] = drafts[1][5] % 7 + 3  # from here on the model does not agree
    drafts[2] = drafts[2][:3]
    starts = greedy_starts(lm, PROMPTS, drafts)
    assert [len(s) for s in starts] == [len(drafts[0]), 6, len(drafts[2]), len(drafts[3])]
    before = lm.work.tokens
    assert generate(lm, PROMPTS, 12, starts=starts) == whole
    drafted = lm.work.tokens - before
    generate(lm, PROMPTS, 12)
    assert drafted < lm.work.tokens - before - drafted


def test_answers_of_several_kinds_together_are_those_of_each_alone(lm):
    whole = generate(lm, PROMPTS, 12)
    limits = [12, 3, 7, 12]
    asked = [
        Request(prompt, limit, (lambda _text: True) if i == 3 else None)
        for i, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True))
    ]
    found = answer(lm, asked)
    for one, limit, completion in zip(found, limits, whole, strict=True):
        assert one.ids == completion.ids[: len(one.ids)]
        assert len(one.ids) <= limit
    assert found[1].ids == whole[1].ids[:3]
    assert len(found[3].ids) < len(whole[3].ids)
    # What is settled at its start is not written further.
    assert (
        answer(lm, [Request(PROMPTS[3], 12, asked[3].settled, found[3].ids)])[0].ids == found[3].ids
    )


def test_what_the_head_saw_while_writing_is_what_a_pass_over_the_answer_shows(lm):
    reference = own_answers(lm, PROMPTS, 12)
    again = keep_reference(lm, PROMPTS, reference.answers)
    assert exact(lm)
    for one, other in zip(reference.head_inputs, again.head_inputs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(
        torch.tensor(reference.scores.nll), torch.tensor(again.scores.nll), atol=2e-4, rtol=2e-4
    )
    assert reference.scores.tokens.tolist() == again.scores.tokens.tolist()
    assert float(diverge(lm, reference).per_token.max()) < 1e-6


def test_a_start_ends_with_the_first_token_that_is_another():
    assert agreed([1, 2, 3], [1, 5, 9]) == (1, 5)
    assert agreed([1, 2], [1, 2]) == (1, 2)
    assert agreed([], []) == ()


def test_a_roomy_cache_holds_what_a_plain_one_does(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    plain = DynamicCache()
    first = torch.randn(3, 2, 4, 8, generator=generator)
    plain.update(first, -first, 0)
    roomy = copy.deepcopy(plain)
    monkeypatch.setattr(cache, "ROOM", 2)
    make_room(roomy, 99)
    assert type(roomy.layers[0]) is RoomyLayer
    for step in range(4):  # two more than there is room for
        new = torch.randn(len(plain.layers[0].keys), 2, 1, 8, generator=generator)
        for expected, found in zip(
            plain.update(new, -new, 0), roomy.update(new, -new, 0), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        if step == 1:
            for kind in (plain, roomy):
                kind.batch_select_indices(torch.tensor([2, 0]))
    assert roomy.get_seq_length() == plain.get_seq_length() == 8


def test_a_layer_with_a_window_is_roomy_only_while_all_lies_within_it():
    def filled(longest):
        states = DynamicCache()
        states.layers = [DynamicSlidingWindowLayer(8)]
        states.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
        make_room(states, longest)
        return states

    assert is_roomy(filled(7))
    assert not is_roomy(filled(8))
    assert not is_roomy(None)


def test_rows_of_several_caches_are_joined_below_one_another():
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(1, 2, 2, 4, generator=generator)
    owns = [torch.randn(3, 2, n, 4, generator=generator) for n in (5, 3)]
    caches = []
    for own in owns:
        states = DynamicCache()
        states.update(prefix.expand(3, -1, -1, -1), -prefix.expand(3, -1, -1, -1), 0)
        states.update(own, -own, 0)
        make_room(states, 99)
        caches.append(states)
    joined = join(caches, [torch.tensor([2, 0]), torch.tensor([1])], prefix=2, own=4)
    keys, values = joined.layers[0].keys, joined.layers[0].values
    assert keys.shape == (3, 2, 6, 4)
    torch.testing.assert_close(values, -keys)
    torch.testing.assert_close(keys[:, :, :2], prefix.expand(3, -1, -1, -1))
    torch.testing.assert_close(keys[:2, :, 2:], owns[0][[2, 0], :, 1:])
    torch.testing.assert_close(keys[2:, :, 3:], owns[1][[1]])
    assert float(keys[2, :, 2].abs().max()) == 0
    assert joined.get_seq_length() == 6
    new = torch.randn(3, 2, 1, 4, generator=generator)
    after, _ = joined.update(new, -new, 0)
    torch.testing.assert_close(after[:, :, -1:], new)


MANY = [f"say {'so ' * (7 * i % 5)}{word}" for i, word in enumerate("abcdefghijklmnopqr")]
ALONE = {}
"""What each family answers to each of them alone, once it was asked."""


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_answers_that_come_in_for_others_are_those_of_each_alone(lm, monkeypatch, rows):
    limits = [1 + 5 * i % 12 for i in range(len(MANY))]
    if lm.name not in ALONE:
        pairs = zip(MANY, limits, strict=True)
        ALONE[lm.name] = [generate(lm, [prompt], n)[0].ids for prompt, n in pairs]
    monkeypatch.setattr(generation, "ROWS_PER_BATCH", rows)
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 20)
    calls = []
    with_hook = lm.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: calls.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    asked = [Request(prompt, n, look=True) for prompt, n in zip(MANY, limits, strict=True)]
    together = answer(lm, asked)
    with_hook.remove()
    assert [c.ids for c in together] == ALONE[lm.name]
    assert max(calls) <= rows
    for one, n in zip(together, limits, strict=True):
        assert one.seen is not None
        assert len(one.seen.heads) == len(one.ids) <= n


def test_answers_written_together_fit_what_the_device_has_for_their_caches(llama, monkeypatch):
    config = llama.text_config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    encoded = encode(llama, MANY)
    room = 3 * (max(len(e.ids) for e in encoded) + 12) * each
    weights = sum(p.numel() * p.element_size() for p in llama.model.parameters())
    monkeypatch.setattr(
        generation, "memory_for_caches", lambda _d, held: room if held == weights else None
    )
    seen = []
    llama.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    found = generate(llama, MANY, 12)
    assert max(seen) in (3, 4)
    monkeypatch.undo()
    assert [c.ids for c in found] == [c.ids for c in generate(llama, MANY, 12)]
    assert max(seen) > 12


def test_batches_are_larger_where_that_keeps_a_device_busy():
    assert enlarged(torch.device("cpu")) == 1
    assert enlarged(torch.device("cuda")) == enlarged(torch.device("mps")) == 8
    lengths, wanted = [100] * 40, [30] * 40
    assert len(plan_batches(lengths, wanted, 1000)) == 4
    assert len(plan_batches(lengths, wanted, 1000, 8 * 1024)) == 1
    assert len(plan_batches(lengths, wanted, 250_000, 8 * 1024)) == 40
    assert len(plan_batches(lengths, wanted, 250_000, 8 * 1024, 100_000_000)) == 4


def test_others_come_in_as_answers_end(llama, monkeypatch):
    """Three batches one after another would take 21 steps behind their prompts, for ever fewer rows."""
    monkeypatch.setattr(generation, "ROWS_PER_BATCH", 6)
    steps = []
    llama.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: steps.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    limits = [1 + 5 * i % 12 for i in range(len(MANY))]
    found = answer(llama, [Request(p, n) for p, n in zip(MANY, limits, strict=True)])
    rows = [rows for rows, new in steps if new == 1]
    assert len(rows) < 18
    assert sum(rows) >= sum(len(c.ids) for c in found) - len(found)
    assert max(rows) == 6


def test_settled_rows_stop_early_and_leave_the_others_alone(llama):
    whole = generate(llama, PROMPTS, 16)
    stopped = generate(
        llama,
        PROMPTS,
        16,
        settled=lambda text: text == whole[0].text[: len(text)] and len(text) > 0,
    )
    assert len(stopped[0].ids) < len(whole[0].ids)
    assert all(s.ids == w.ids[: len(s.ids)] for s, w in zip(stopped, whole, strict=True))
    assert any(s.ids == w.ids for s, w in zip(stopped, whole, strict=True))


def test_kept_head_inputs_give_the_same_logits(llama):
    rows = encode(llama, PROMPTS, encode_answers(llama, ["a b c"] * 4))
    ids, wanted = [e.ids for e in rows], [e.answer_positions for e in rows]
    kept = {}
    for batch, heads in forward(llama, ids, wanted, heads=True):
        kept.update(zip(batch.rows, batch.split(heads), strict=True))
    for batch, again in forward(
        llama, ids, wanted, extra=lambda r: torch.cat([kept[i] for i in r])
    ):
        torch.testing.assert_close(again, batch.logits)


def test_a_model_with_a_cache_of_its_own_kind_gets_none_of_another(llama, monkeypatch):
    """transformers 5.24 calls every cache `cache`, also one of a class of its own."""

    class OwnCache:
        pass

    model = type(llama.model)
    plain = model.forward

    def forward(self, input_ids=None, cache: OwnCache | None = None, **kwargs):
        assert cache is None
        return plain(self, input_ids=input_ids, **kwargs)

    expected = generate(llama, ["one two", "one three"], 3)
    monkeypatch.setattr(model, "forward", forward)
    assert not cacheable(llama)
    assert generate(llama, ["one two", "one three"], 3) == expected


def test_batches_hold_every_row_once_and_stay_within_bounds():
    lengths = [5, 900, 30, 30, 700, 1, 64, 2048, 3000]
    groups = plan_batches(lengths, [3] * 9, vocab=1000, tokens=2048)
    assert sorted(i for g in groups for i in g) == list(range(9))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 2048 for g in groups)
    assert all(
        sum(3 for _ in g) <= 6 for g in plan_batches(lengths, [3] * 9, vocab=50_000_000 // 6)
    )


def test_template_counts_tokens_around_the_users_text():
    lm = make_lm("llama")
    template = measure_template(lm)
    text = lm.tokenizer.convert_ids_to_tokens(encode(lm, ["hello"])[0].ids)
    middle = text[template.prefix_length : len(text) - template.suffix_length]
    assert "".join(middle) == "hello"
    assert text[-1] == "<bot>"


def test_bos_is_never_doubled_and_never_missing():
    lm = make_lm("llama")
    assert encode(lm, ["x"])[0].ids[:2] == (1, 3)


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert common_prefix([[1], [2]]) == 0


def test_work_is_counted(llama):
    rows = encode(llama, PROMPTS)
    list(forward(llama, [e.ids for e in rows], [[e.prompt_length - 1] for e in rows]))
    shared = common_prefix([e.ids for e in rows])
    assert llama.work.tokens == sum(len(e.ids) - shared for e in rows) + shared
    assert llama.work.head_tokens == len(rows)
    assert llama.flops > 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_close_call_goes_the_same_way_in_a_pass_and_in_writing(family):
    """In 16 bits half of a vocabulary is hardly likelier than the other: rounded, both are alike."""
    lm = make_lm(family)
    with torch.no_grad():
        weight = lm.head.weight
        weight[1::2] = weight[::2] * (1 + 2**-8)
    lm.model.to(torch.bfloat16)
    prompts = [f"{a} {b}" for a in "abcdef" for b in "ghijkl"]
    answers = [c.ids for c in generate(lm, prompts, 1)]
    drafts = [(5,)] * len(prompts)
    assert greedy_starts(lm, prompts, drafts) == answers
