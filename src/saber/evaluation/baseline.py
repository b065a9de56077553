"""The untouched model, measured once and kept on disk under what the numbers depend on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import saber
from saber import codec
from saber.errors import OutputError, SaberError
from saber.evaluation.judge import Judge, excerpt
from saber.evaluation.measure import EvaluationSets, EvaluationSpec, Judged, Measurement, measure
from saber.lm.chat import encode
from saber.lm.forward import Progress, silent
from saber.lm.model import LanguageModel
from saber.paths import expanded


def cache_folder() -> Path | None:
    """Return where baselines are kept: $SABER_CACHE, or `saber` in the user's cache folder.

    None, where nothing is kept, if $SABER_CACHE is `off`.
    """
    if own := os.environ.get("SABER_CACHE"):
        return None if own == "off" else expanded(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saber"


def baseline(
    lm: LanguageModel,
    mark: str,
    sets: EvaluationSets,
    spec: EvaluationSpec,
    judge: Judge,
    described: Mapping[str, Any],
    *,
    folder: Path | None = None,
    progress: Progress[Any] = silent,
) -> tuple[Measurement, int]:
    """Return the untouched model's measurement and the tokens that it cost when it was made.

    `mark` is the model's fingerprint and `described` the judge's description. A kept one is taken
    where model, prompts, settings, judge, device, dtype, versions and this package's code are the same;
    one that cannot be read is measured anew. Answers are kept as short excerpts. A folder that cannot be
    written keeps nothing and is no error.
    """
    root = folder or cache_folder()
    place = root / "baselines" / _key(lm, mark, sets, spec, described) if root else None
    if place is not None and place.is_dir():
        try:
            found, meta = codec.load(place)
            if isinstance(found, Measurement):
                return found, int(meta["tokens"])
        except (SaberError, OSError, KeyError, ValueError):
            shutil.rmtree(place, ignore_errors=True)
    before = lm.work.tokens
    found = _brief(measure(lm, sets, spec, judge, progress=progress))
    tokens = lm.work.tokens - before
    with suppress(OutputError, OSError):
        if place is not None:
            codec.save(place, found, {"tokens": tokens, "fingerprint": mark})
    return found, tokens


@cache
def _code() -> str:
    """Return a digest of this package's source: other code may measure or judge in another way."""
    root = Path(saber.__file__).parent
    files = sorted(root.rglob("*.py"))
    return codec.digest(*((f.relative_to(root).as_posix(), f.read_text("utf-8")) for f in files))


def _key(
    lm: LanguageModel,
    mark: str,
    sets: EvaluationSets,
    spec: EvaluationSpec,
    described: Mapping[str, Any],
) -> str:
    named = [sets.target, sets.neutral, sets.borderline, sets.battery, sets.everyday, *sets.kept]
    prompts = [None if s is None else (s.name, s.fingerprint()) for s in named]
    versions = (_code(), torch.__version__, transformers.__version__)
    where = (lm.device.type, str(lm.dtype), sorted(lm.eos_ids), _settings(lm))
    # Prompts as the model gets them: the same words are other tokens under another chat template.
    read = [encode(lm, s.texts) for s in named if s is not None]
    asked = sorted(described.items())
    found = (mark, str(prompts), str(read), sorted(sets.seen), spec, asked, versions, where)
    return codec.digest(*found)[:32]


def _settings(lm: LanguageModel) -> str:
    """Return the model's configuration but for where it lies."""
    given = lm.model.config.to_dict()
    return json.dumps({**given, "_name_or_path": None}, sort_keys=True, default=str)


def _brief(found: Measurement) -> Measurement:
    """Return the measurement with excerpts in place of answers: these are not for files."""

    def cut(judged: Judged) -> Judged:
        return replace(judged, texts=tuple(excerpt(text) for text in judged.texts))

    everyday = found.everyday
    return replace(
        found,
        target=cut(found.target),
        neutral=cut(found.neutral),
        borderline=cut(found.borderline) if found.borderline else None,
        kept=tuple(replace(k, judged=cut(k.judged)) for k in found.kept),
        everyday=everyday and replace(everyday, judged=cut(everyday.judged)),
    )
