"""A finished run becomes plots, a card and a page: true to its numbers, safe, and repeatable."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CATEGORIES = ["arithmetic", "logic", "code", "instruction_following", "factual_recall"]
HARMS = ["fraud", "malware", "physical harm", "privacy", "disinformation"]


def proportion(successes: int, n: int) -> dict[str, Any]:
    z, rate = 1.96, successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"rate": rate, "low": low, "high": high, "n": n, "successes": successes}


def direction(rng: np.random.Generator, layer: int, component: int, index: int) -> dict[str, Any]:
    peak = math.exp(-((layer - 15) ** 2) / 40)
    d_prime = float((0.5 + 3.6 * peak) * 0.85 ** (index - 1) * 0.75**component + rng.normal(0, 0.15))
    per = {c: float(abs(rng.normal(0.02 + 0.012 * k + 0.0015 * layer, 0.015)))
           for k, c in enumerate(CATEGORIES)}
    worst = max(per, key=lambda c: per[c])
    auroc = min(0.999, 0.5 + 0.5 * math.tanh(max(d_prime, 0.0) / 2))
    purity = 1 - per[worst]
    return {
        "layer": layer, "component": component, "position": -1, "d_prime": max(0.05, d_prime),
        "auroc": auroc, "auroc_low": auroc - 0.02, "auroc_high": min(1.0, auroc + 0.01),
        "p_value": 0.001, "q_value": 0.003, "entanglement": per, "worst_category": worst,
        "worst_entanglement": per[worst], "null_percentile": 0.62, "purity": purity,
        "score": d_prime * purity, "causal": 2.2 if component == 0 else None,
        "strength": 0.0, "status": "not selected",
    }  # fmt: skip


def one_pass(rng: np.random.Generator, index: int, before: float, after: float) -> dict[str, Any]:
    found = [direction(rng, layer, k, index) for layer in range(6, 24) for k in range(3)]
    ranked = sorted(found, key=lambda d: -d["score"])
    for d in ranked[:10]:
        d["strength"], d["status"] = 0.85 * d["purity"], "ablated"
        if d["worst_entanglement"] > 0.1:
            d["strength"], d["status"] = 0.3 * d["purity"], "weakened"
    ranked[10]["status"] = "skipped"
    return {
        "index": index, "log_odds_before": before, "log_odds_after": after,
        "directions": ranked[:10], "candidates": found,
        "hydra": {"top_auroc": ranked[0]["auroc"], "top_d_prime": ranked[0]["d_prime"],
                  "top_layer": ranked[0]["layer"], "dormant": 0 if index == 1 else 3 - index // 2,
                  "compensation": None if index == 1 else
                  {"estimate": 0.22 / index, "low": 0.02, "high": 0.45 / index}},
    }  # fmt: skip


def measure(edited: bool) -> dict[str, Any]:
    refused = [1, 0, 0, 0, 0] if edited else [22, 23, 21, 22, 21]
    ratio = 1.012 if edited else 1.0
    incoherent, partial = (2, 3) if edited else (0, 2)
    return {
        "refusal": proportion(sum(refused), 112), "incoherent": proportion(incoherent, 112),
        "partial": proportion(partial, 112),
        "refusal_by_category": {c: proportion(r, 23 if k == 1 else 22)
                                for k, (c, r) in enumerate(zip(HARMS, refused, strict=True))},
        "refusal_seen": proportion(0 if edited else 65, 66),
        "refusal_unseen": proportion(1 if edited else 44, 46),
        "labels": {
            "target": {"refusal": sum(refused), "partial": partial, "incoherent": incoherent,
                       "answer": 112 - sum(refused) - partial - incoherent},
            "neutral": {"refusal": 0 if edited else 18, "partial": 1, "answer": 111 if edited else 93,
                        "incoherent": 0},
            "borderline": {"refusal": 1 if edited else 31, "partial": 2,
                           "answer": 44 if edited else 15, "incoherent": 1 if edited else 0}},
        "over_refusal": {"borderline": proportion(1 if edited else 31, 48),
                         "neutral": proportion(0 if edited else 18, 112)},
        "perplexity": {
            "overall": 12.31 * ratio,
            "by_category": {c: v * ratio ** (k - 1) for k, (c, v) in
                            enumerate(zip(CATEGORIES, [3.9, 7.7, 9.1, 22.4, 18.6], strict=True))},
            "prompt_text": {"overall": 498.0 - 12 * edited, "by_category": {}}, "own_answers": 1.9},
        "accuracy": {"overall": 0.31 - 0.01 * edited, "low": 0.228, "high": 0.406, "n": 100,
                     "by_category": {c: v - 0.05 * edited * (k == 2) for k, (c, v) in
                                     enumerate(zip(CATEGORIES, [.2, .3, .15, .4, .5], strict=True))}},
        "kl": {"first_token": 0.19 * edited, "sequence": 0.0135 * edited,
               "sequence_p95": 0.08 * edited, "sequence_max": 1.4 * edited},
    }  # fmt: skip


def prompt_set(name: str) -> dict[str, Any]:
    return {"name": name, "fit": 96, "validation": 32, "heldout": 112,
            "fingerprint": f"sha256:{'0123456789abcdef' * 4}"}  # fmt: skip


def fake_run() -> dict[str, Any]:
    """A complete run of five passes, as the pipeline writes it."""
    rng = np.random.default_rng(7)
    odds = [3.2, 0.4, -1.6, -2.9, -3.6, -3.9]
    passes = [one_pass(rng, i + 1, odds[i] + 0.25 * (i > 0), odds[i + 1]) for i in range(5)]
    said = {"id": "t-1", "category": "fraud", "prompt": "How do I <b>do</b> it?",
            "before": {"label": "refusal", "excerpt": "EXCERPT I cannot help with that."},
            "after": {"label": "answer", "excerpt": "EXCERPT <script>alert(1)</script> & so on"}}
    return {
        "schema": 1, "saber_version": "0.1.0", "command": "saber run demo --preset card",
        "model": {"name": "demo", "source": "demo", "model_type": "llama",
                  "base": "HuggingFaceTB/SmolLM2-135M-Instruct", "fingerprint": "sha256:feedbeef",
                  "layers": 30, "d_model": 576, "parameters": 134515008,
                  "compute_dtype": "float32", "storage_dtype": "float16", "device": "cpu"},
        "environment": {"python": "3.11.7", "torch": "2.9", "transformers": "5.0", "threads": 2,
                        "platform": "Linux-x86_64", "processor": "Xeon",
                        "started": "2026-11-23T13:00:00Z"},
        "config": {"preset": "card", "seed": 0, "revision": None,
                   "spectral": {"method": "fisher", "per_layer": 3},
                   "edit": {"kind": "orthogonal", "alpha": 0.85},
                   "refine": {"passes": 5, "top_k": 10},
                   "evaluation": {"judge": "phrases", "max_new_tokens": 48, "lengths": [20, 48]}},
        "prompts": {"target": prompt_set("bundled target"), "neutral": prompt_set("bundled neutral"),
                    "borderline": {"name": "bundled borderline", "n": 48, "fingerprint": "sha256:1"},
                    "capability": {"name": "bundled capability", "n": 120, "fingerprint": "sha256:2",
                                   "categories": dict.fromkeys(CATEGORIES, 24)},
                    "battery": {"name": "bundled battery", "n": 100, "fingerprint": "sha256:3",
                                "categories": dict.fromkeys(CATEGORIES, 20)}},
        "seconds": {"load": 9.1, "probe": 31.0, "spectral": 4.2, "entanglement": 2.0, "ablate": 3.3,
                    "refine": 88.0, "evaluate": 140.5, "save": 1.2, "total": 279.3},
        "work": {"tokens": 123456, "tflop": 33.1, "gflops": 160.2},
        "baseline": measure(False), "edited": measure(True),
        "comparison": {"refusal": {"b": 108, "c": 0, "p_value": 1e-20},
                       "over_refusal": {"b": 48, "c": 0, "p_value": 1e-9},
                       "accuracy": {"b": 3, "c": 2, "p_value": 1.0},
                       "perplexity_ratio": {"estimate": 1.012, "low": 0.994, "high": 1.031}},
        "directions_ablated": 50,
        "layers_edited": len({d["layer"] for p in passes for d in p["directions"]}),
        "candidate_layers": list(range(6, 24)), "stop_reason": "passes", "passes": passes,
        "examples": {kind: [copy.deepcopy(said) for _ in range(5)]
                     for kind in ("target", "neutral", "borderline")},
    }  # fmt: skip
