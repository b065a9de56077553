"""Late behaviour: where an answer turns is found, and measured behind a forced start."""

import torch

from saber.lm.chat import encode
from saber.openings import late_opening, late_openings, likeliest
from saber.probing import ProbeSpec, probe
from saber.prompts import Prompt, PromptSet


def shows(text):
    return "no way" in text


def ids(lm, text):
    return tuple(lm.tokenizer.encode(text, add_special_tokens=False))


def test_an_opening_ends_with_the_sentence_before_the_behaviour(llama):
    found = late_opening(llama, ids(llama, "Sure. Good. But no way. Never."), shows)
    assert llama.tokenizer.decode(list(found)).strip() == "Sure. Good."


def test_answers_that_show_it_at_once_or_never_have_no_late_opening(llama):
    for text in ("no way. I am sorry.", "Well, no way", "Sure. Here you are.", ""):
        assert late_opening(llama, ids(llama, text), shows) == ()


def test_late_openings_are_told_by_prompt(llama):
    texts = ["Sure. no way", "Oh. Sure. no way", "Fine.", "no way"]
    found = late_openings(llama, [ids(llama, t) for t in texts], lambda _i, text: shows(text))
    assert found == {0: ids(llama, "Sure."), 1: ids(llama, "Oh. Sure.")}


def test_the_start_that_the_model_gives_most_often_is_taken(llama):
    prompts = ["one", "two two"]

    def chance(opening):
        total = 0.0
        for e in encode(llama, prompts, [opening] * 2):
            logits = llama.model(input_ids=torch.tensor([e.ids])).logits[0]
            p = logits[e.answer_positions].log_softmax(-1)
            total += float(p[range(len(opening)), list(opening)].sum().exp())
        return total

    starts = [(40, 41), (50, 51), (60, 61)]
    best = max(starts, key=chance)
    found = dict(enumerate([*starts, starts[0], starts[1], starts[2]]))
    assert likeliest(llama, prompts, found) == best
    others = [s for s in starts if s != best]
    assert likeliest(llama, prompts, {0: others[0]}) == others[0]
    assert likeliest(llama, prompts, {}) == ()


def test_probing_behind_an_opening_reads_its_last_token(llama):
    some = PromptSet("p", tuple(Prompt(str(i), "c", t) for i, t in enumerate(["one", "two two"])))
    opening = ids(llama, "Sure. Good.")
    found = probe(llama, some, ProbeSpec(positions=3), first_token=True, opening=opening)
    assert found.hidden.shape[1] == 1
    for i, e in enumerate(encode(llama, some.texts, [opening] * 2)):
        out = llama.model(input_ids=torch.tensor([e.ids]), output_hidden_states=True)
        torch.testing.assert_close(
            found.hidden[i, 0, 2], out.hidden_states[2][0, -1], atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(
            found.first_token[i], out.logits[0, -1].log_softmax(-1), atol=1e-4, rtol=1e-3
        )
