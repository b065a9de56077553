"""A finished run as a model card: README.md with the hub's metadata block."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from saber.notices import GENERIC, NARROW, WARNING
from saber.report import reading, tables, toml
from saber.report.plots import CAPTIONS, applicable
from saber.report.reading import Run, count, dig, number
from saber.report.tables import Table

DEMO_LICENSE = "apache-2.0"
"""The licence of the demo model's base and of its adapter."""

PRIOR_ART = """\
- Arditi et al. 2024, *Refusal in language models is mediated by a single direction* \
([arXiv:2406.11717](https://arxiv.org/abs/2406.11717)): directional ablation.
- DJLougen, *SABER* ([github.com/DJLougen/SABER](https://github.com/DJLougen/SABER)): the five \
stages, and the idea of an entanglement gate.
- Belrose et al. 2023, *LEACE* ([arXiv:2306.03819](https://arxiv.org/abs/2306.03819)): concept \
erasure in closed form.
- Fang et al. 2024, *AlphaEdit* ([arXiv:2410.02355](https://arxiv.org/abs/2410.02355)): edits in \
the null space of what must be kept.
- McGrath et al. 2023, *The hydra effect* \
([arXiv:2307.15771](https://arxiv.org/abs/2307.15771)): later layers make up for what is ablated.
- p-e-w, *heretic* ([github.com/p-e-w/heretic](https://github.com/p-e-w/heretic)): automatic \
search over abliteration settings.
- Haufe et al. 2014, *On the interpretation of weight vectors of linear models in multivariate \
neuroimaging* ([doi:10.1016/j.neuroimage.2013.10.067]\
(https://doi.org/10.1016/j.neuroimage.2013.10.067)): what reads a signal is not what writes it."""


def model_card(run: Mapping[str, Any], *, repo_name: str | None = None) -> str:
    """The text of README.md for this run; holds numbers and settings, never a completion.

    `repo_name` is where the edited model is published (`owner/name`); without it the card tells
    how to load the run's own `model/` folder.
    """
    edited = run.get("edited") is not None
    sections = [
        f"# {_title(run, repo_name)}",
        _introduction(run),
        f"> [!WARNING]\n> {warning(run)}" if edited else "",
        _plot(run, "pipeline"),
        results(run),
        _passes(run),
        _measured(run),
        _usage(run, repo_name) if edited else "",
        f"## Configuration\n\n{_fenced(toml.dumps(run.get('config') or {}), 'toml')}",
        provenance(run),
        limits(run),
        f"## Prior art\n\n{PRIOR_ART}",
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{metadata(run).to_yaml()}\n---\n\n{body}\n"


def warning(run: Run) -> str:
    """What whoever runs the edited model has to know."""
    if not reading.refusals(run):
        return GENERIC
    return NARROW if reading.narrow(run) else WARNING


def metadata(
    run: Run, *, library: str = "transformers", relation: str = "finetune"
) -> ModelCardData:
    """The block that the hub reads; what is not known is left out."""
    base = base_model(run)
    demo = dig(run, "model", "source") == "demo"
    edited = run.get("edited") is not None
    more: dict[str, Any] = {"base_model_relation": relation} if base else {}
    return ModelCardData(
        base_model=base,
        library_name=library,
        pipeline_tag="text-generation",
        license=dig(run, "model", "license") or (DEMO_LICENSE if demo else None),
        license_name=dig(run, "model", "license_name"),
        license_link=dig(run, "model", "license_link"),
        tags=[
            "saber",
            *(
                ["abliterated"]
                if edited and reading.refusals(run) and not reading.narrow(run)
                else []
            ),
            "interpretability",
        ],
        **more,
    )


def base_model(run: Run) -> str | None:
    """The hub id of the model that was edited, where it has one."""
    model = run.get("model") or {}
    name = model.get("base") or (model.get("name") if model.get("source") == "hub" else None)
    return str(name) if name else None


def cell(text: str) -> str:
    """Text as it must stand in Markdown so that it stays text."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|`*_]|\](?=[(\[:]))", r"\\\1", text)


def markdown(table: Table) -> str:
    """A table of the report in Markdown; columns of numbers stand to the right."""
    lines = [
        tuple(map(cell, table.header)),
        (":--", *[":--" if table.words else "--:"] * (len(table.header) - 1)),
    ]
    rows = [tuple(cell(text) for text in row) for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*lines, *rows])


def _title(run: Run, repo_name: str | None) -> str:
    name = cell(reading.model_name(run))
    if repo_name:
        return cell(repo_name.rsplit("/", 1)[-1])
    return f"{name}, edited by SABER" if run.get("edited") else f"{name}, measured by SABER"


def _introduction(run: Run) -> str:
    name = cell(base_model(run) or reading.model_name(run))
    if run.get("edited") is None:
        lead = f"Measurements of {name}: nothing was edited. {cell(reading.finding(run))}."
    else:
        lead = (
            f"{name} with {count(run.get('directions_ablated'), 'direction')} of its residual "
            f"stream that carry {'false refusals' if reading.narrow(run) else cell(reading.behaviour(run))} "
            f"taken out of the weights of "
            f"{count(run.get('layers_edited'), 'layer')}, by "
            f"[SABER](https://github.com/DJLougen/SABER)'s five stages. {cell(reading.finding(run))}; "
            f"perplexity {reading.change(run, number, 'perplexity', 'overall')} on reference "
            "answers."
        )
    if dig(run, "model", "source") == "demo":
        lead += (
            "\n\nThis is a **model organism**, not a product: SmolLM2-135M-Instruct with an "
            "adapter that trained it to refuse, merged in, so that a small model has a strong "
            "refusal to study. Its refusals were trained for this demonstration, and what holds "
            "for them need not hold for the safety training of larger models."
        )
    return lead


def _plot(run: Run, name: str) -> str:
    return f"![{CAPTIONS[name]}](plots/{name}.png)" if name in applicable(run) else ""


def results(run: Run, *, heading: str = "## Results", plots: bool = True) -> str:
    """Every measurement before and after; `plots` shows the pictures that lie beside a run's card."""
    parts = [heading, markdown(tables.results(run)), tables.BRACKETS]
    said = tables.comparisons(run)
    if said:
        parts.append(
            "The same prompts put to both models:\n\n" + "\n".join(f"- {cell(s)}" for s in said)
        )
    if plots:
        parts += [_plot(run, "refusal_rates"), _plot(run, "capability")]
    kinds = tables.by_category(run)
    if kinds.rows:
        title = reading.worded(run, "Refusal by category", "{} by category")
        parts += [f"### {cell(title)}", markdown(kinds)]
    cuts = tables.by_length(run)
    if cuts.rows:
        parts += ["### By length of the answers", markdown(cuts)]
    kept = tables.kept_by_category(run)
    if kept.rows:
        parts += [
            f"### {reading.worded(run, 'Retained refusals', 'Kept prompts')}",
            "Held-out prompts whose answers the edit was told to leave as they are.",
            markdown(kept),
        ]
    return "\n\n".join(part for part in parts if part)


def _passes(run: Run) -> str:
    if not reading.passes(run):
        return ""
    return "\n\n".join(part for part in (
        "## Pass by pass",
        f"Each pass probes the model as the passes before left it. Log-odds of "
        f"{cell(reading.behaviour(run))} are means "
        f"over the validation {_selected(run)}, in nats; *dormant woken* counts ablated "
        "directions that separate over twice as well as in the untouched model; *compensation* "
        "is the share of the removed contribution that unedited writers make up for.",
        markdown(tables.hydra(run)),
        *_search(run),
        f"Stopped at: {cell(str(run['stop_reason']))}." if run.get("stop_reason") else "",
        *(_plot(run, name) for name in ("hydra", "purity_separability", "entanglement_heatmap")),
    ) if part)  # fmt: skip


def _selected(run: Run) -> str:
    """The prompts whose behaviour is to go."""
    return "borderline prompts that the base refuses" if reading.narrow(run) else "target prompts"


def _search(run: Run) -> tuple[str, ...]:
    found = tables.search(run)
    if not found.rows:
        return ()
    lead = (
        "Strengths tried on validation prompts, from the weakest on: λ is the weight of what must not "
        "change. The first at which answers open with the behaviour as rarely as those to neutral prompts "
        "do is confirmed by judged answers."
    )
    return lead, markdown(found), cell(reading.search_note(run))


def _measured(run: Run) -> str:
    some = "borderline, target" if reading.narrow(run) else "target"
    parts = [
        "## What the numbers were measured on",
        markdown(tables.prompts(run)),
        "Directions are fitted on the *fit* split and chosen on the *validation* split; every rate "
        f"on {some} and neutral prompts is of the *held-out* split, which neither saw.",
    ]
    found = tables.settings(run, ("judge", "tokens", "length"))
    if found:
        quoted = "; ".join(f"`{setting.replace('`', '')}`" for setting in found)
        parts.append(f"Lengths and judge: {quoted}.")
    return "\n\n".join(parts)


def _usage(run: Run, repo_name: str | None) -> str:
    intro = "" if repo_name else " The path is the `model/` folder of this run."
    lead = f"An ordinary `transformers` model: no code of SABER is needed.{intro}"
    return f"## Use\n\n{lead}\n\n{loading(repo_name or 'model')}"


def loading(place: str) -> str:
    """Python that loads and asks the model in a folder or repository."""
    where = json.dumps(place)
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({where})
model = AutoModelForCausalLM.from_pretrained({where})
chat = [{{"role": "user", "content": "Explain how vaccines work."}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
    return _fenced(code, "python")


def provenance(run: Run) -> str:
    """What the numbers were made of and with, as a section of its own."""
    model, config = run.get("model") or {}, run.get("config") or {}
    environment = run.get("environment") or {}
    rows = [
        ("base model", base_model(run) or reading.model_name(run)),
        ("base commit", model.get("revision")),
        ("base fingerprint", model.get("fingerprint")),
        ("architecture", model.get("model_type")),
        ("size", f"{count(model.get('layers'), 'layer')}, d_model {number(model.get('d_model'))}, "
                 f"{count(model.get('parameters'), 'parameter')}"),
        ("computed in", model.get("compute_dtype")),
        ("stored in", model.get("storage_dtype")),
        ("device", model.get("device")),
        ("loaded with a note", " ".join(model.get("notes") or ()) or None),
        ("SABER", run.get("saber_version")),
        ("command", run.get("command")),
        ("settings", _origin(run)),
        ("system prompt", dig(config, "load", "system") or None),
        ("judge", judged_by(run)),
        ("seed", config.get("seed")),
        ("started", environment.get("started")),
        ("took", reading.duration(dig(run, "seconds", "total"))),
        ("torch", environment.get("torch")),
        ("transformers", environment.get("transformers")),
    ]  # fmt: skip
    table = Table(
        ("what", "value"), tuple((k, str(v)) for k, v in rows if v is not None), words=True
    )
    return f"## Provenance\n\n{markdown(table)}\n\nThe prompt sets' fingerprints are above."


def _origin(run: Run) -> str | None:
    """Which trial of a sweep the settings are, where they are one's."""
    sweep = run.get("sweep")
    if not sweep:
        return None
    same = "the very same edit" if sweep["same_plan"] else "an edit that differs in its digits"
    return f"trial {sweep['trial']} of the sweep {cell(sweep['name'])}; {same}"


def judged_by(run: Run) -> str | None:
    """The judge with what its labels depend on."""
    found = dict(run.get("judge") or {})
    name = found.pop("name", None)
    return name and ", ".join([name, *(f"{key}: {value}" for key, value in found.items())])


def limits(run: Run) -> str:
    """What the numbers do not show."""
    n = dig(run, "baseline", "accuracy", "n")
    items = [
        f"{cell(reading.worded(run, 'Refusal', '{}'))} is judged from the first tokens of each "
        "answer, by the judge named above; a judge errs, and the behaviour may come later than the "
        "length measured.",
        "The target prompts are one sample, in one language and single turns; other phrasings, "
        "languages and longer dialogues may show the behaviour more or less often.",
        "Low entanglement and small KL on these sets do not show that nothing else changed.",
        "An answer is not a correct answer: the edit removes a behaviour, it adds no ability.",
    ]
    if n:
        items.insert(2, f"Accuracy on {count(n, 'item')} cannot show a change of a few points; the "
                        "intervals say how many.")  # fmt: skip
    return "## Limits\n\n" + "\n".join(f"- {item}" for item in items)


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
