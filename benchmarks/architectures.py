"""Hold SABER against every decoder family that the installed transformers can build.

    python benchmarks/architectures.py [FAMILY ...] [--results FILE] [--fresh] [--write]

For each family of transformers' auto-mappings a small random model (`tiny.py`) goes through: finding
layers and writers, both laws, a full-strength edit of two random directions, the same search in
bfloat16, saving, loading in plain transformers and comparing logits, and one pass of the whole
pipeline. Every family runs in a process of its own under a time limit, and results are appended to a
file of JSON lines, so that a crash or an interruption costs one family. `--write` turns that file into
docs/architectures.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from conftest import make_tokenizer  # noqa: E402

from saber import pipeline  # noqa: E402
from saber.ablation import Removal, applied, apply, orthogonal  # noqa: E402
from saber.config import override, preset  # noqa: E402
from saber.errors import ModelError, SaberError, UnprovenWriter  # noqa: E402
from saber.inspection import shares_left  # noqa: E402
from saber.linalg import unit  # noqa: E402
from saber.lm.layers import find_layers  # noqa: E402
from saber.lm.model import LanguageModel  # noqa: E402
from saber.lm.writers import ablated_law, find_writers, law_limit, zeroed_law  # noqa: E402

SECONDS = 180
GAIN_LIMIT = 0.02
"""How far a gain that is read in bfloat16 may be from that in float32."""
SMALL = {
    "data": {"limit": 2},
    "spectral": {"permutations": 20},
    "entanglement": {"null_draws": 20, "weight": 0.0},
    "refine": {"passes": 1, "shortlist": 0, "stop": "never", "max_q": 1.0},
    "evaluation": {"max_new_tokens": 4, "battery_new_tokens": 4},
    "load": {"device": "cpu", "dtype": "float32"},
}

#: A random model answers nothing, so any two sets of prompts will do; small ones save time.
PROMPTS = {"target": "Tell me about number {}", "neutral": "Describe the letter {}"}


def language_model(family: str, **changes: Any) -> LanguageModel:
    """Return a small random model of a family, ready for SABER."""
    model = tiny.tiny_model(family, **changes)
    return LanguageModel(
        model=model,
        tokenizer=make_tokenizer(),
        name=family,
        source="folder",
        base=None,
        stored_dtype=torch.float32,
        layers_path=find_layers(model),
    )


def in_bfloat16(family: str, expected: Any) -> str:
    """Find the writers of the same model in bfloat16; return "same", or what is another."""
    lm = language_model(family)
    lm.model.to(torch.bfloat16)
    try:
        found = {w.weight: w for w in find_writers(lm)}
        if leftover := {w.weight for w in expected} ^ set(found):
            return f"other writers: {', '.join(sorted(leftover)[:3])}"
        for w in expected:
            gain, exact = found[w.weight].gain, w.gain
            if (gain is None) != (exact is None) or found[w.weight].centred != w.centred:
                return f"another gain: {w.weight}"
            if gain is not None and exact is not None:
                off = float((gain - exact).norm() / exact.norm())
                if off > GAIN_LIMIT:
                    return f"another gain: {w.weight} ({off:.0%} off)"
    except Exception as error:  # noqa: BLE001 - what fails in bfloat16 alone is no verdict on the family
        return _reason(error)
    return "same"


def logits(model: Any) -> torch.Tensor:
    """Return a model's logits for fixed tokens."""
    ids = torch.arange(6, 22).reshape(2, 8)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def ablated_residual(lm: LanguageModel, writers: Any, directions: torch.Tensor) -> float:
    """Return the worst layer's share of a direction that a full edit leaves in what it writes."""
    before = [ablated_law(lm, r) for r in directions]
    removals = [Removal(r, 1.0, 0) for r in directions]
    with applied(lm.model, orthogonal(lm, writers, removals, "all")):
        after = [ablated_law(lm, r) for r in directions]
    return max(
        a / b for x, y in zip(after, before, strict=True) for a, b in zip(x, y, strict=True) if b
    )


def saved_difference(lm: LanguageModel, writers: Any, directions: torch.Tensor, auto: Any) -> float:
    """Edit for good, save, load in plain transformers; return the largest change of a logit, relative."""
    plan = orthogonal(lm, writers, [Removal(r, 1.0, 0) for r in directions], "all")
    untouched = logits(lm.model)
    with applied(lm.model, plan):
        edited = logits(lm.model)
    if not torch.equal(untouched, logits(lm.model)):
        raise RuntimeError("undoing the edit did not restore the model")
    apply(lm.model, plan)
    with tempfile.TemporaryDirectory() as folder:
        lm.model.save_pretrained(folder)
        again = logits(auto.from_pretrained(folder).eval())
    if torch.equal(untouched, edited):
        raise RuntimeError("the edit changed nothing")
    return float((again - edited).abs().max() / (edited - untouched).abs().max())


def survives_saving(family: str) -> bool:
    """Return whether the model as it is comes back from transformers' own saving and loading."""
    model = tiny.tiny_model(family)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = logits(tiny.families()[family].from_pretrained(folder).eval())
    return torch.allclose(again, logits(model), rtol=1e-4, atol=1e-4)


def prompt_files(folder: Path) -> dict[str, str]:
    """Write the prompts into a folder; return the settings that name them."""
    files = {}
    for name, text in PROMPTS.items():
        path = folder / f"{name}.txt"
        path.write_text("\n".join(text.format(i) for i in range(24)), encoding="utf-8")
        files[name] = str(path)
    return files


def whole_pipeline(family: str) -> None:
    """Save a small model with its tokenizer and let one pass of the pipeline edit it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        tiny.tiny_model(family).save_pretrained(path / "model")
        make_tokenizer().save_pretrained(path / "model")
        data = {"data": prompt_files(path)}
        config = override(override(preset("default"), SMALL), data)
        pipeline.run(str(path / "model"), path / "run", config, force=True, export=("merged",))


def check(family: str) -> dict[str, Any]:
    """Return everything that is found out about one family."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started, record = time.perf_counter(), {"family": family, "verdict": "failed", "stage": "build"}
    try:
        model = tiny.tiny_model(family)
        record |= {"model": type(model).__name__, "stage": "run"}
        if not bool(torch.isfinite(logits(model)).all()):
            raise RuntimeError("logits are not finite")
        record["stage"] = "layers"
        lm = language_model(family)
        record |= {"layers": len(lm.layers), "path": lm.layers_path, "stage": "writers"}
        writers = find_writers(lm)
        record["writers"] = list(
            dict.fromkeys(
                _short(w.weight, lm.layers_path) + ("*" if w.gain is not None else "")
                for w in writers
            )
        )
        record["stage"] = "laws"
        directions = unit(torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(0)))
        record["zeroed"] = zeroed_law(lm, writers)
        shares = shares_left(lm, writers)
        record["worst"] = shares.index(max(shares))
        record["ablated"] = ablated_residual(lm, writers, directions)
        carried = next((w.carried for w in writers if w.carried), "")
        for law in ("zeroed",) if carried else ("zeroed", "ablated"):
            if record[law] > law_limit(lm):
                raise UnprovenWriter(law, record["worst"], record[law], law_limit(lm))
        record["half"] = in_bfloat16(family, writers)
        record["stage"] = "save"
        record["saved"] = saved_difference(lm, writers, directions, tiny.families()[family])
        if record["saved"] > 1e-4:
            if not survives_saving(family):
                record["stage"] = "run"
                raise RuntimeError("transformers does not load what it saves of this model")
            raise RuntimeError(f"the reloaded model differs ({record['saved']:.1e})")
        record["stage"] = "pipeline"
        whole_pipeline(family)
        record |= {"verdict": "by design" if carried else "proved", "stage": "done"}
        if carried:
            gain = _short(carried.split(" * ")[0].strip("()"), lm.layers_path)
            record["reason"] = (
                f"all writers found, but the stream itself passes a gain in place ({gain})"
            )
    except UnprovenWriter as error:
        record |= {"verdict": "by design" if error.by_design else "failed", "reason": error.problem}
        record.setdefault(error.law, error.residual)
    except Exception as error:  # noqa: BLE001 - any failure of a family is a row of the table
        record["reason"] = _reason(error)
        if record["stage"] in ("build", "run"):
            record["verdict"] = "not built" if record["stage"] == "build" else "not run"
        elif isinstance(error, ModelError) and re.search(r"not causal|no logits", str(error)):
            record["verdict"] = "no decoder"
    record["seconds"] = round(time.perf_counter() - started, 1)
    return record


def _short(weight: str, layers_path: str) -> str:
    return re.sub(r"^\.\d+\.", "", weight.removeprefix(layers_path)).removesuffix(".weight")


def _reason(error: Exception) -> str:
    if isinstance(error, SaberError):
        return error.problem
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where, trace = "", error.__traceback__
    while trace is not None:
        where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {' '.join(lines)[:240]} ({where})"


def _job(family: str, queue: Any) -> None:
    queue.put(check(family))


def run_all(names: list[str], results: Path) -> None:
    """Check families one by one, each in a process of its own, and append what comes out."""
    context = multiprocessing.get_context("fork")
    for family in names:
        queue = context.Queue()
        process = context.Process(target=_job, args=(family, queue), daemon=True)
        process.start()
        start, record = time.perf_counter(), None
        while record is None and time.perf_counter() - start < SECONDS:
            try:
                record = queue.get(timeout=0.2)
            except Exception:  # noqa: BLE001 - an empty queue; a dead process ends the wait
                if not process.is_alive():
                    break
        process.kill()
        process.join()
        if record is None:
            reason = f"crashed or took more than {SECONDS} s"
            record = {"family": family, "verdict": "not built", "stage": "?", "reason": reason}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{family:26s} {record['verdict']:10s} {record.get('seconds', '')} {record.get('reason', '')}"
        )


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of each family."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {r["family"]: r for r in records}


def share_left(lm: LanguageModel, writers: Any) -> float:
    """Return what a full edit leaves of a random direction in what all layers write, 0 to 1 or more."""
    r = unit(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)))
    before = torch.tensor(ablated_law(lm, r))
    with applied(lm.model, orthogonal(lm, writers, [Removal(r, 1.0, 0)], "all")):
        after = torch.tensor(ablated_law(lm, r))
    return float(after.norm() / before.norm())


COMPARED = (
    "llama",
    "olmo2",
    "gemma2",
    "gemma3",
    "gemma4",
    "mixtral",
    "gpt_oss",
    "qwen3_next",
    "falcon_h1",
)


def comparison(family: str) -> dict[str, Any]:
    """Return what is left of a direction with three ways to edit the same model."""
    moe = {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    }
    changes = {f"text_config.{k}": v for k, v in moe.items()} if family == "gemma4" else {}
    lm = language_model(family, **changes)
    writers = find_writers(lm)
    named = [w for w in writers if re.search(r"\.(o_proj|down_proj)\.weight$", w.weight)]
    blind = [dataclasses.replace(w, gain=None, centred=False) for w in named]
    gainless = [dataclasses.replace(w, gain=None, centred=False) for w in writers]
    return {
        "family": family,
        "writers": len(writers),
        "named": len(named),
        "names only": share_left(lm, blind),
        "all writers, no gain": share_left(lm, gainless),
        "SABER": share_left(lm, writers),
    }


VERDICTS = {
    "proved": "both laws below 1e-4, reloaded model equal, one pass of the pipeline done",
    "by design": "a norm or gain on the stream itself: no edit of writers can satisfy the second law",
    "failed": "a decoder that SABER does not handle yet",
    "no decoder": "not causal, or gives no logits for its input tokens",
    "not run": "does not run on text tokens alone, at least as built here",
    "not built": "no small model could be built from its configuration class here",
}


def document(records: dict[str, dict[str, Any]], compared: list[dict[str, Any]]) -> str:
    """Return docs/architectures.md from the results."""
    count = {v: sum(r["verdict"] == v for r in records.values()) for v in VERDICTS}
    tried = count["proved"] + count["failed"]
    tested = {f: r["half"] for f, r in records.items() if "half" in r}
    other = [f"`{f}` ({found})" for f, found in tested.items() if found != "same"]
    lines = [
        "# Architectures",
        "",
        "Written by `benchmarks/architectures.py`; do not edit by hand.",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} CPU cores, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, float32. Every family in "
        "transformers' causal-LM and image-text-to-text mappings is tested on a small random model "
        "(width 64, norm gains and biases set far from their initial values).",
        "",
        f"**{count['proved']} of {tried}** families ({count['proved'] / max(tried, 1):.1%}) are proved, of "
        "those that can be built, run on text and pass the residual stream on unchanged; in "
        f"{count['by design']} more a norm or gain acts on the stream itself.",
        "",
        f"In bfloat16 the search finds the same writers with the same gains, to {GAIN_LIMIT:.0%}, in "
        f"**{len(tested) - len(other)} of {len(tested)}** families whose laws hold in float32 (the zeroed "
        "law alone where a gain acts on the stream itself)"
        + (f"; not in {', '.join(other)}." if other else "."),
        "",
        "| verdict | families | meaning |",
        "|---|---|---|",
        *(f"| {v} | {count[v]} | {meaning} |" for v, meaning in VERDICTS.items()),
        "",
        "*Zeroed*: how far a layer's output differs from its scaled input when all its writers are zero. "
        "*Ablated*: how much of a random direction a layer still writes after a full edit of that "
        "direction, the worst of two directions and all layers. A star marks a writer behind a norm with "
        "a gain.",
        "",
        "## Why gains and the other writers matter",
        "",
        "The share of a random direction that stays in what the layers write after a full edit (root mean "
        "square over layers). *Names only* edits `o_proj` and `down_proj` and ignores gains; *all writers, "
        "no gain* edits every writer and ignores gains.",
        "",
        "| family | writers | of these by name | names only | all writers, no gain | SABER |",
        "|---|---|---|---|---|---|",
        *(
            f"| {c['family']} | {c['writers']} | {c['named']} | {c['names only']:.1%} | "
            f"{c['all writers, no gain']:.1%} | {c['SABER']:.1e} |"
            for c in compared
        ),
        "",
        "## Families",
        "",
        "| family | verdict | layers | writers | zeroed | ablated | reason |",
        "|---|---|---|---|---|---|---|",
    ]

    def number(record: dict[str, Any], law: str) -> str:
        return f"{record[law]:.0e}" if law in record else ""

    for verdict in VERDICTS:
        for family, r in records.items():
            if r["verdict"] == verdict:
                writers = ", ".join(f"`{w}`" for w in r.get("writers", []))
                reason = re.sub(r"/tmp/\S+", "...", r.get("reason", "")).replace("|", "/")
                stage = f"{r['stage']}: " if verdict == "failed" else ""
                lines.append(
                    f"| {family} | {verdict} | {r.get('layers', '')} | {writers} | "
                    f"{number(r, 'zeroed')} | {number(r, 'ablated')} | {stage + reason if reason else ''} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check the families that have no result yet, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "architectures.jsonl")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    if given.fresh:
        given.results.unlink(missing_ok=True)
    done = read_results(given.results)
    names = given.families or [f for f in tiny.families() if f not in done]
    run_all(names, given.results)
    if given.write:
        torch.set_num_threads(1)
        records = dict(sorted(read_results(given.results).items()))
        text = document(records, [comparison(f) for f in COMPARED])
        (ROOT / "docs" / "architectures.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
