"""`saber diff`: what changed between two checkpoints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saber.errors import UsageError, few

PLOTS = (".png", ".svg")


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("diff", help="say what changed between two checkpoints")
    where = "hub id, model or run folder, .safetensors file, or demo"
    parser.add_argument("base", metavar="BASE", help=f"the model that was edited: {where}")
    parser.add_argument("edited", metavar="EDITED", help="what came out, the same kinds")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: a .png or .svg file")
    parser.add_argument(
        "--top",
        type=int,
        default=10,
        help="tensors listed by name, most changed first (default: 10)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random sketches (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(handler=diff_command)


def diff_command(arguments: argparse.Namespace) -> int:
    """Compare two checkpoints, and show what was found."""
    plot: Path | None = arguments.plot
    if plot is not None and plot.suffix.lower() not in PLOTS:
        raise UsageError(f"--plot {plot} is neither .png nor .svg.")
    if arguments.top < 0:
        raise UsageError("--top must be at least 0.")
    if not 0 <= arguments.seed < 2**31:
        raise UsageError(f"--seed must lie between 0 and {2**31 - 1}.")

    from saber.checkpoint.diff import compare, record
    from saber.checkpoint.reading import open_checkpoint
    from saber.cli.commands import consoles
    from saber.cli.progress import listening

    out, progress = consoles(arguments)
    with listening(progress) as listener:
        base, edited = open_checkpoint(arguments.base), open_checkpoint(arguments.edited)
        found = record(compare(base, edited, seed=arguments.seed, progress=listener.progress))
    if plot is not None:
        from saber.report import style
        from saber.report.diff_plot import difference

        with style.styled():
            drawn = difference(found)
        style.save_as(drawn, plot)
    if arguments.json:
        print(json.dumps(found, allow_nan=False))
        return 0
    for table in tables(found, arguments.top):
        out.print(table)
    for line in closing(found):
        out.print(line, highlight=False, markup=False)
    if plot is not None:
        out.print(f"plot: {plot}")
    return 0


def tables(found: Mapping[str, Any], top: int) -> list[Any]:
    """Return the table by kind, and that of the most changed tensors."""
    from rich.table import Table

    kinds = Table(
        title="what changed, by kind",
        caption="size: norm of the change over that of the weight; law: share of the change that "
        "U (U^T W) explains, U its output directions; medians",
    )
    columns = ("kind", "changed", "layers", "size", "rank", "law", "strength")
    for name in columns:
        kinds.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for row in found["kinds"]:
        layers, beyond = row["layers"], row["beyond_rounding"]
        rounding = row["changed"] - beyond
        kinds.add_row(
            row["kind"],
            f"{row['changed']}{f' ({rounding} by rounding)' if rounding else ''}",
            f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else _join(layers),
            _share(row["relative_median"]),
            _plain(row["rank_median"], 0) or ("high" if row["matrices"] else ""),
            "" if row["law_median"] is None else f"{row['law_median']:.0%}",
            _plain(row["strength_median"], 2),
        )
    shown = sorted(found["changes"], key=lambda c: -(c["relative"] or 0.0))[:top]
    most = Table(title=f"most changed ({len(shown)} of {len(found['changes'])})")
    for name in ("tensor", "size", "rank", "sv / rounding", "law"):
        tensor = name == "tensor"
        most.add_column(
            name, justify="left" if tensor else "right", overflow="fold", no_wrap=not tensor
        )
    for c in shown:
        law, floor = c["law"], c["floor"]
        ratios = [v / floor for v in c["values"][:3]] if floor > 0 else []
        rank = "rounding" if c["within_rounding"] else ("high" if c["rank"] is None else c["rank"])
        most.add_row(
            c["name"],
            _share(c["relative"]),
            str(rank) if c["values"] or c["within_rounding"] else "",
            " ".join(f"{r:.3g}" for r in ratios),
            "" if law is None else f"{law['share']:.0%}",
        )
    return [table for table in (kinds, most) if table.row_count]


def closing(found: Mapping[str, Any]) -> list[str]:
    """Return the verdict with its evidence, and what was not compared."""
    tensors, verdict = found["tensors"], found["verdict"]
    lines = [
        f"{tensors['common']} tensors in common: {tensors['unchanged']} unchanged, "
        f"{tensors['changed']} changed; {len(tensors['added'])} added, "
        f"{len(tensors['removed'])} removed, {len(tensors['reshaped'])} of another shape, "
        f"{len(tensors['retyped'])} of another dtype"
    ]
    for key in ("added", "removed", "reshaped", "unmeasured"):
        names = tensors[key]
        if names:
            lines.append(f"  {key}: {few(names)}")
    damaged = [c["name"] for c in found["changes"] if not c["finite"]]
    if damaged:
        lines.append(f"  NaN or infinity in {damaged[0]} ({len(damaged)} in all): not judged")
    rate = found["bytes"] / max(found["seconds"], 1e-9) / 1e6
    lines.append(f"{found['bytes'] / 1e9:.2f} GB in {found['seconds']:.1f} s ({rate:.0f} MB/s)")
    lines.append(f"verdict: {verdict['text']}")
    return lines + [f"  - {one}" for one in verdict["evidence"]]


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}" if value >= 1e-4 else f"{value:.1e}"


def _plain(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
