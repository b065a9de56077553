"""Types are checked as the tests run, cheaply or not."""

import pytest
import torch
from beartype import beartype
from checks import checked, of_arrays
from jaxtyping import Float, TypeCheckError

from saber.lm.forward import Share, placed, silent
from saber.lm.generate import Seen, agreed
from saber.lm.model import Work
from saber.prompts import Prompt


def test_what_is_no_array_is_checked():
    with pytest.raises(TypeCheckError):
        agreed([1], "no tokens")
    with pytest.raises(TypeCheckError):
        silent(1, "", 1)
    with pytest.raises(TypeCheckError):
        Prompt(id=1, category="", text="")
    with pytest.raises(TypeCheckError):
        Work(tokens="many")
    with pytest.raises(TypeCheckError):
        Share(0, 1).cut(5)


def test_arrays_are_checked_and_their_axes_agree(llama):
    with pytest.raises(TypeCheckError):
        placed(llama, torch.zeros(1, 2))
    Seen(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(TypeCheckError):
        Seen(torch.zeros(2, 4), torch.zeros(3))


def test_what_is_returned_is_checked_too():
    def wrong(x: int) -> str:
        return x

    def short(x: Float[torch.Tensor, " n"]) -> Float[torch.Tensor, " n"]:
        return x[1:]

    def unknown(x: "Elsewhere") -> int:  # what only a type checker imports
        return x

    assert [of_arrays(f) for f in (wrong, short, unknown)] == [False, True, False]
    with pytest.raises(TypeCheckError):
        checked(wrong, beartype)(1)
    with pytest.raises(TypeCheckError):
        checked(short, beartype)(torch.zeros(2))
    assert checked(unknown, beartype)(3) == 3
