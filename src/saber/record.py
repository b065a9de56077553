"""What `run.json` tells of a run: its surroundings, model, prompts and passes."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers

from saber.config import RunConfig
from saber.evaluation.measure import (
    EvaluationSets,
)
from saber.gathering import RunData, none_of
from saber.linalg import finite
from saber.lm.model import LanguageModel
from saber.lm.writers import embedding_share
from saber.passes import Candidate, Pass, Refinement
from saber.prompts import (
    PromptSet,
)
from saber.spectral import candidate_layers
from saber.strength import Trial


def environment(started: datetime.datetime) -> dict[str, Any]:
    """Return what the numbers may depend on, and when they were made."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.system(),
        "processor": f"{os.cpu_count()}-core {platform.machine()}",
        "threads": torch.get_num_threads(),
        "started": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def describe_model(lm: LanguageModel, mark: str) -> dict[str, Any]:
    """Return the model as it stands in `run.json`."""
    return {
        "name": lm.name,
        "source": lm.source,
        "model_type": lm.model.config.model_type,
        "base": lm.base,
        "revision": lm.revision,
        "fingerprint": mark,
        "layers": len(lm.layers),
        "d_model": lm.d_model,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "compute_dtype": str(lm.dtype).removeprefix("torch."),
        "storage_dtype": str(lm.stored_dtype).removeprefix("torch."),
        "device": lm.device.type,
        "response_prefix": lm.response_prefix,
        **({"notes": list(lm.notes)} if lm.notes else {}),
    }


def describe_data(
    data: RunData, left_out: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the prompt sets as they stand in `run.json`, and how many of a kind were not used.

    `fingerprint` is that of the prompts to fit on, or of all where there is no split; the other splits have
    their own.
    """
    chosen, held = data.selecting, data.reporting
    # In over-refusal mode borderline prompts are fitted on, and what is kept first are the targets.
    narrow = len(chosen.keep) > len(held.kept)

    def splits(fit: PromptSet, validation: PromptSet, heldout: PromptSet) -> dict[str, Any]:
        return {
            "name": fit.name.removesuffix("/fit"),
            "fit": len(fit),
            "validation": len(validation),
            "heldout": len(heldout),
            "fingerprint": (fit if len(fit) else heldout).fingerprint(),
            "validation_fingerprint": validation.fingerprint(),
            "heldout_fingerprint": heldout.fingerprint(),
        }

    everyday, nothing = None, none_of(chosen.target)
    if len(chosen.everyday) or held.everyday:
        everyday = {
            **splits(chosen.everyday, nothing, held.everyday or nothing),
            "left_out": left_out.get("everyday", 0),
        }
    fitted = splits(chosen.target, chosen.target_validation, held.target)
    border = _described(held.borderline) if held.borderline else None
    kept = list(zip(chosen.keep, chosen.keep_validation, strict=True))
    if narrow:
        border = splits(chosen.target, chosen.target_validation, held.borderline or nothing)
        fitted = splits(*kept.pop(0), held.target)
    rest = [splits(*some, heldout) for some, heldout in zip(kept, held.kept, strict=True)]
    return {
        "target": fitted,
        "neutral": {
            **splits(chosen.neutral, chosen.neutral_validation, held.neutral),
            "left_out": left_out.get("neutral", 0),
        },
        "borderline": border,
        "capability": {**_described(chosen.capability), "left_out": left_out.get("capability", 0)},
        "everyday": everyday,
        "battery": _described(held.battery),
        **({"kept": rest} if rest else {}),
    }


def _described(prompts_: PromptSet) -> dict[str, Any]:
    """Return a set that is not split as it stands in `run.json`."""
    return {
        "name": prompts_.name,
        "n": len(prompts_),
        "categories": dict(sorted(Counter(prompts_.categories).items())),
        "fingerprint": prompts_.fingerprint(),
    }


def describe_reporting(held: EvaluationSets) -> dict[str, Any]:
    """Return the sets that a model is measured on, as `saber eval` tells them."""
    sets = {kind: getattr(held, kind) for kind in ("target", "neutral", "borderline", "everyday")}
    found: dict[str, Any] = {kind: _described(some) for kind, some in sets.items() if some}
    return {**found, "battery": _described(held.battery), "kept": list(map(_described, held.kept))}


def describe_passes(lm: LanguageModel, outcome: Refinement, config: RunConfig) -> dict[str, Any]:
    """Return what was found and edited as it stands in `run.json`, pass by pass."""
    removals = outcome.removals
    return {
        "directions_ablated": len(removals),
        "layers_edited": len({r.layer for r in removals}),
        "writers_edited": len(outcome.plan.factors),
        "candidate_layers": candidate_layers(len(lm.layers), config.spectral),
        "stop_reason": outcome.stop_reason,
        "passes": [_describe_pass(lm, p) for p in outcome.passes],
    }


def _describe_pass(lm: LanguageModel, this: Pass) -> dict[str, Any]:
    back = this.hydra.compensation
    rows = [_describe_candidate(c) for c in this.ablated]
    patterns = [c.direction.pattern for c in this.ablated]
    for row, share in zip(rows, embedding_share(lm, torch.stack(patterns)), strict=True):
        row["embedding_share"] = finite(share)
    return {
        "index": this.index,
        "log_odds_before": this.log_odds_before,
        "log_odds_after": this.log_odds_after,
        "rate_before": this.rate_before,
        "rate_after": this.rate_after,
        "incoherent_after": this.incoherent_after,
        "lost_after": this.lost_after,
        "opening": this.opening,
        "late_after": this.late,
        "by_answers": this.by_answers,
        "in_vain": [str(lm.tokenizer.decode(list(start))) for start in this.in_vain],
        "search": [_describe_trial(t) for t in this.trials],
        "directions": rows,
        "candidates": [_describe_candidate(c) for c in this.candidates],
        "hydra": {
            **{k: v for k, v in dataclasses.asdict(this.hydra).items() if k != "compensation"},
            "compensation": dataclasses.asdict(back) if back else None,
        },
    }


def _describe_trial(t: Trial) -> dict[str, Any]:
    row = dataclasses.asdict(t)
    return {"lambda": row.pop("lambda_"), **row}


def _describe_candidate(c: Candidate) -> dict[str, Any]:
    d, e = c.direction, c.entanglement
    return {
        "layer": d.layer,
        "component": d.component,
        "position": d.position,
        "d_prime": d.d_prime,
        "auroc": d.auroc,
        "auroc_low": d.auroc_low,
        "auroc_high": d.auroc_high,
        "p_value": d.p_value,
        "q_value": d.q_value,
        "entanglement": dict(e.by_category),
        "overlap": dict(e.overlap),
        "worst_category": e.worst_category,
        "worst_entanglement": e.worst,
        "null_percentile": e.null_percentile,
        "purity": e.purity,
        "score": c.score,
        "causal": c.causal,
        "causal_kl": c.causal_kl,
        "strength": c.strength,
        "lambda": c.lambda_,
        "sensitivity": c.sensitivity,
        "removed": c.removed,
        "collateral": c.collateral,
        "status": c.status,
    }
