"""Refusal log-odds from the first answer token: a measure that needs no generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saber.linalg import log_odds


@dataclass(frozen=True)
class Readout:
    """The first tokens with which a model opens the behaviour."""

    tokens: tuple[int, ...]
    """Token ids; empty where none tells targets from neutral prompts."""

    def log_odds(self, first_token: Float[Tensor, "prompts vocab"]) -> Float[Tensor, " prompts"]:
        """Return log(p / (1 - p)), nats, p the probability that the answer opens with one of them."""
        return log_odds(first_token[:, list(self.tokens)].exp().sum(-1))


def derive_readout(
    target: Float[Tensor, "n vocab"], neutral: Float[Tensor, "m vocab"], limit: int = 32
) -> Readout:
    """Choose the tokens that open answers to targets much more often than to neutral prompts.

    From the first-token log-probabilities of the untouched model: those of at least 0.2% mean
    probability on targets and four times that on neutral prompts, the most likely first; none where
    there are no such.
    """
    p, q = target.exp().mean(0), neutral.exp().mean(0)
    apart = (p > 2e-3) & (p > 4 * q)
    ranked = torch.argsort(torch.where(apart, p - q, torch.zeros_like(p)), descending=True)
    return Readout(tuple(int(t) for t in ranked[: min(limit, int(apart.sum()))]))
