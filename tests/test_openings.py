"""Late behaviour: where an answer turns is found, and measured behind a forced start."""

import torch

from saber.lm.chat import encode
from saber.openings import commonest, late_opening, late_openings
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


def test_the_commonest_opening_is_taken_and_the_shortest_of_equals(llama):
    texts = ["Sure. no way", "Oh. Sure. no way", "Sure. But no way", "Fine.", "no way"]
    found = late_openings(llama, [ids(llama, t) for t in texts], lambda _i, text: shows(text))
    assert sorted(found) == [0, 1, 2]
    assert commonest(found) == ids(llama, "Sure.")
    assert commonest({0: (1, 2, 3), 1: (4, 5)}) == (4, 5)
    assert commonest({}) == ()


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
