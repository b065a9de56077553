"""The page: what a run, a sweep or an audit found, to sort and filter, and a run's model to talk to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from inspect import unwrap
from pathlib import Path
from typing import Any

from saber.conversation import usual_limit
from saber.errors import MissingExtra, SaberError
from saber.report import (
    audit_page,
    html_report,
    is_audit,
    is_sweep,
    read_answers,
    read_audit,
    read_run,
    read_sweep,
    reading,
    sweep_card,
    sweep_plots,
)
from saber.report.html import embedded
from saber.report.tables import Table
from saber.ui.talk import WHO, Answer, Talk, coming

# Before gradio is imported: it calls home otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr

    from saber.ui import frames
except ImportError as error:
    raise MissingExtra("gradio", "ui") from error

ALL, ANY = "all", "any"
COLOURS = ["layer", "status", "with"]
"""Columns of directions that points can be coloured by."""
CSS = """
.saber-label { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; font-weight: 600;
  border: 1px solid currentColor; }
.saber-refusal { color: #b34f00; } .saber-partial { color: #8a5f00; }
.saber-answer { color: #007a59; } .saber-incoherent { color: #6b7280; }
.dark .saber-refusal { color: #ff9a4d; } .dark .saber-partial { color: #f0c04a; }
.dark .saber-answer { color: #4fd1a5; } .dark .saber-incoherent { color: #a3abb8; }
.saber-plot { background: #fff; border-radius: 8px; padding: .8rem; }
.saber-plot img { display: block; max-width: 54rem; width: 100%; margin: 0 auto; }
"""
"""What the page adds to the look of gradio's, the colours of labels above all."""


def build_page(folder: Path, talk: Talk | None = None) -> gr.Blocks:
    """Build the page of a finished run, sweep or audit; `talk` adds a run's model.

    Raises `DataError` where the folder is none of them, or damaged.
    """
    if is_sweep(folder):
        return _sweep(folder)
    if is_audit(folder):
        return _audit(folder)
    return _run(folder, talk)


def look() -> gr.themes.Base:
    """Return the theme: fonts of the system alone, as the page loads nothing from elsewhere."""
    plain = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    return gr.themes.Soft(
        primary_hue="blue", font=plain, font_mono=["ui-monospace", "Consolas", "monospace"]
    )


def _blocks(title: str) -> gr.Blocks:
    return gr.Blocks(title=title, analytics_enabled=False, fill_width=True)


def _run(folder: Path, talk: Talk | None) -> gr.Blocks:
    run = read_run(folder)
    title = f"SABER on {reading.model_name(run)}"
    with _blocks(title) as page:
        gr.Markdown(f"# {_plain(title)}\n{_plain(reading.finding(run))}.")
        with gr.Tab("Report"):
            report = escape(html_report(run, folder / "plots"), quote=True)
            gr.HTML(
                f'<iframe srcdoc="{report}" sandbox title="report" '
                'style="width:100%;height:82vh;border:0;border-radius:8px"></iframe>'
            )
        found = frames.directions(run)
        if len(found):
            with gr.Tab("Directions"):
                _directions(found)
        said = frames.answers(run, read_answers(folder))
        if len(said):
            with gr.Tab("Answers"):
                _answers(said)
        if talk is not None:
            with gr.Tab("Talk"):
                _talk(talk)
    return page


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|$!" else c for c in text)


def _directions(whole: Any) -> None:
    passes = [ALL, *map(str, sorted(whole["pass"].unique()))]
    gr.Markdown(
        "Every direction that a pass looked at: how well it tells targets from neutral prompts that it "
        "was not fitted on, and how much of it the capabilities leave alone."
    )
    with gr.Row():
        which = gr.Dropdown(passes, value=passes[1], label="Pass", scale=1)
        first, last = int(whole["layer"].min()), int(whole["layer"].max())
        ends = first, max(last, first + 1)
        low = gr.Slider(*ends, value=first, step=1, label="From layer")
        high = gr.Slider(*ends, value=last, step=1, label="To layer")
        colour = gr.Dropdown(COLOURS, value=COLOURS[0], label="Colour", scale=1)
        taken = gr.Checkbox(value=False, label="Ablated alone", scale=1)

    def chosen(one: str, least: float | int, most: float | int, ablated: bool) -> Any:
        found = whole[whole["layer"].between(least, most)]
        found = found if one == ALL else found[found["pass"] == int(one)]
        return found[found["ablated"]] if ablated else found

    at_first = chosen(passes[1], first, last, False)
    plot = gr.ScatterPlot(
        at_first,
        x=frames.SEPARABILITY,
        y="purity",
        color=COLOURS[0],
        tooltip=["pass", "layer", "component", frames.SEPARABILITY, "purity", "strength", "with"],
        height=420,
        y_lim=[-0.02, 1.02],
    )
    table = gr.Dataframe(
        _rounded(at_first), show_search="filter", max_height=520, interactive=False
    )
    inputs: list[Any] = [which, low, high, taken, colour]

    def show(
        one: str, first: float | int, last: float | int, ablated: bool, by: str
    ) -> tuple[Any, Any]:
        found = chosen(one, first, last, ablated)
        return gr.ScatterPlot(found, color=by), _rounded(found)

    gr.on(
        [control.change for control in inputs],
        show,
        inputs,
        [plot, table],
        show_progress="hidden",
        api_name="directions",
    )


def _rounded(frame: Any) -> Any:
    return frame.map(lambda value: float(f"{value:.4g}") if isinstance(value, float) else value)


def _answers(whole: Any) -> None:
    gr.Markdown(
        "Held-out prompts with the labels that the judge gave, before and after, and battery problems with "
        "whether they were solved. Of answers the first characters are kept, and no more."
    )
    sets, labels = [ALL, *dict.fromkeys(whole["set"])], [ANY, *sorted(set(whole["after"]) - {""})]
    with gr.Row():
        kind = gr.Dropdown(sets, value=ALL, label="Prompts")
        after = gr.Dropdown(labels, value=ANY, label="Label after")
        moved = gr.Checkbox(value=False, label="Another label than before")
    table = gr.Dataframe(
        whole,
        show_search="search",
        wrap=True,
        max_height=640,
        interactive=False,
        column_widths=["8%", "10%", "28%", "9%", "9%", "18%", "18%"],
    )

    def show(one: str, label: str, changed: bool) -> Any:
        found = whole if one == ALL else whole[whole["set"] == one]
        found = found if label == ANY else found[found["after"] == label]
        return found[found["before"] != found["after"]] if changed else found

    inputs: list[Any] = [kind, after, moved]
    gr.on(
        [control.change for control in inputs],
        show,
        inputs,
        table,
        show_progress="hidden",
        api_name="answers",
    )


Heard = Mapping[str, Sequence[Sequence[str]]]
"""Both conversations as they travel to the page and back: who -> [role, text]."""


def _talk(talk: Talk) -> None:
    gr.Markdown(
        "The untouched model and the edited one, each with its own conversation. **100%** is the edit of "
        "the run; less and more of it is what validation prompts did not choose. Decoding is greedy; "
        "answers stay in this page and are written nowhere."
    )
    heard = gr.State({who: [] for who in WHO})
    with gr.Row():
        sides = [
            gr.Chatbot(label=who, height=420, render_markdown=False, buttons=["copy"])
            for who in WHO
        ]
    with gr.Row():
        labels = [gr.HTML() for _ in WHO]
    with gr.Row():
        share = gr.Slider(0, 150, 100, step=5, label="Share of the edit, %")
        limit = gr.Slider(
            16,
            4096 if talk.spec.thinking else 1024,
            usual_limit(talk.spec),
            step=16,
            label="Most tokens of an answer",
        )
    message = gr.Textbox(
        label="Message", placeholder="The model is loaded with the first message.", submit_btn=True
    )
    with gr.Row():
        again = gr.Button("Ask the last message again, with this share")
        afresh = gr.Button("New conversation")

    def send(
        text: str, said: Heard, percent: float | int, most: float | int
    ) -> Iterator[tuple[Any, ...]]:
        if not text.strip():
            raise gr.Error("There is no message to send.", print_exception=False)
        text, still = text.strip(), [gr.skip()] * len(WHO)
        asked = {who: [*said[who], ["user", text]] for who in WHO}
        yield "", said, *_shown(asked), *still
        for found in _coming(talk, text, percent / 100, int(most), said):
            told = {
                who: [*asked[who], *([["assistant", found[who].text]] if who in found else [])]
                for who in WHO
            }
            yield "", gr.skip(), *_shown(told), *still
        yield "", told, *_shown(told), *(_label(found[who], percent, who) for who in WHO)

    def repeat(said: Heard, percent: float | int, most: float | int) -> Iterator[tuple[Any, ...]]:
        if not said[WHO[0]]:
            raise gr.Error("Nothing was asked yet.", print_exception=False)
        before = {who: said[who][:-2] for who in WHO}
        yield from send(said[WHO[0]][-2][1], before, percent, most)

    def clear() -> tuple[Any, ...]:
        nothing: Heard = {who: [] for who in WHO}
        return "", nothing, *_shown(nothing), *("" for _ in WHO)

    outputs = [message, heard, *sides, *labels]
    # Gradio looks whether a function is a generator, which a decorator would hide.
    message.submit(unwrap(send), [message, heard, share, limit], outputs, api_name="send")
    again.click(unwrap(repeat), [heard, share, limit], outputs, api_name="again")
    gr.on([afresh.click, *(side.clear for side in sides)], clear, None, outputs, api_name="clear")


def _coming(
    talk: Talk, text: str, share: float, most: int, said: Heard
) -> Iterator[dict[str, Answer]]:
    """Yield both answers as they come; what is wrong is shown on the page."""
    before = {who: tuple((role, words) for role, words in said[who]) for who in WHO}
    try:
        yield from coming(talk, text, share, most, before)
    except SaberError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def _shown(said: Heard) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": text} for role, text in said[who]] for who in WHO]


def _label(answer: Answer, percent: float | int, who: str) -> str:
    """Return what stands under an answer: its label, and with which share it was given."""
    how = f"{percent:g}% of the edit" if who == "edited" else "no edit"
    chip = ""
    if answer.label:
        name = escape(str(answer.label))
        chip = f'<span class="saber-label saber-{name}">{name}</span> '
    return f"{chip}<small>{how}</small>"


def _sweep(folder: Path) -> gr.Blocks:
    record = read_sweep(folder)
    title = f"Sweep of {reading.model_name(record)}"
    with _blocks(title) as page:
        gr.Markdown(f"# {_plain(title)}")
        if record["best"]:
            said = sweep_card.vain(record) if not sweep_card.helps(record) else ""
            gr.Markdown(
                _plain(f"{said} On held-out prompts, {sweep_card.shrinkage(record)}".strip())
            )
        found = frames.settings(record)
        if len(found):
            gr.ScatterPlot(
                found,
                x=frames.COST,
                y=frames.LEFT,
                color="is",
                y_lim=[-1.0, None],
                tooltip=["setting", frames.LEFT, frames.COST, "incoherent, %"],
                height=420,
            )
        gr.Dataframe(
            frames.table_of_settings(record),
            show_search="filter",
            interactive=False,
            max_height=640,
        )
        for name in sweep_plots.applicable(record):
            _plot(folder, name, f"{name} of the sweep")
    return page


def _audit(folder: Path) -> gr.Blocks:
    record = read_audit(folder)
    what = reading.worded(record, "its refusals", "its behaviour ({})")
    title = f"How fragile {reading.model_name(record)} is: {what}"
    with _blocks(title) as page:
        gr.Markdown(f"# {_plain(title)}")
        gr.Markdown("\n".join(f"- {_plain(said)}" for said in audit_page.findings(record)))
        _plot(
            folder,
            audit_page.PLOT,
            "What is left by the size of the change, and behind given starts",
        )
        _table("Changes of the weights", audit_page.changes(record))
        if audit_page.of_kind(record, "edit"):
            _table("Left in each category, by share of the edit", audit_page.categories(record))
        if record["starts"]:
            _table(
                "Behind the first tokens of the edited model's answer", audit_page.starts(record)
            )
        gr.Markdown("\n".join(f"- {_plain(said)}" for said in audit_page.LIMITS))
    return page


def _plot(folder: Path, name: str, caption: str) -> None:
    if image := embedded(folder / "plots", name):
        gr.HTML(f'<div class="saber-plot"><img src="{image}" alt="{escape(caption)}"></div>')


def _table(title: str, table: Table) -> None:
    gr.Markdown(f"### {_plain(title)}")
    gr.Dataframe([list(row) for row in table.rows], headers=list(table.header), interactive=False)
