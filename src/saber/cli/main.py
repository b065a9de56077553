"""The `saber` command."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from saber import __version__
from saber.cli import diff, push, ui
from saber.errors import ExportInterrupted, ModelError, SaberError, UsageError
from saber.lm.marks import THOUGHT_TOKENS
from saber.paths import expanded

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Report wrong use in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}. See '{self.prog} --help'.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (0 done, 1 failed, 2 wrong use, 3 target missed, 130)."""
    _bear_all_texts()
    arguments = build_parser().parse_args(argv)
    arguments.line = shlex.join(["saber", *(sys.argv[1:] if argv is None else argv)])
    try:
        _require_text(sys.argv[1:] if argv is None else argv)
        if getattr(arguments, "overwrite", False) and arguments.resume:
            raise UsageError("--overwrite and --resume exclude each other.", "Leave one out.")
        _enter_runs(arguments)
        return int(arguments.handler(arguments))
    except SaberError as error:
        return _fail(error, arguments)
    except KeyboardInterrupt as interrupt:
        print(f"saber: {_interrupted(interrupt, arguments)}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except RuntimeError as error:
        from saber.lm.device import MORE_ROOM, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _fail(
            SaberError(
                "the device has no memory left for this.",
                f"{MORE_ROOM} See that nothing else runs there.",
            ),
            arguments,
        )
    except OSError as error:
        return _fail(
            SaberError(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ") + "."),
            arguments,
        )


def _bear_all_texts() -> None:
    """Let characters that the encoding of an output lacks be shown as `?`.

    Answers may hold any character, and a pipe or file on Windows takes those of one code page alone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(ValueError):  # closed, or read from already
                stream.reconfigure(errors="replace")


def _require_text(argv: Sequence[str]) -> None:
    """Raise `UsageError` for an argument whose bytes are no text: no tokenizer and no record can hold it."""
    for given in argv:
        try:
            given.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the argument {given!r} is not UTF-8.",
                "Write it in UTF-8; rename a file that is called so.",
            ) from error


def _enter_runs(arguments: argparse.Namespace) -> None:
    """Where a model is wanted and a run folder given, take the edited model in it."""
    for name in ("model", "base"):
        given = getattr(arguments, name, None)
        if given == "":
            raise UsageError(f"the name of the {name} is empty.", "Give a folder or a hub id.")
        own = arguments.command == "diff" or (arguments.command == "chat" and name == "model")
        if given and not own:
            setattr(arguments, name, _model_in(given))


def _model_in(name: str) -> str:
    folder = expanded(name)
    if not (folder / "run.json").is_file() or (folder / "config.json").is_file():
        return name
    if not (folder / "model" / "config.json").is_file():
        raise ModelError(
            f"{name} is a run folder with no edited model in it.",
            f"Make one: saber export {name} --format merged --out DIR.",
        )
    return str(folder / "model")


def _interrupted(interrupt: KeyboardInterrupt, arguments: argparse.Namespace) -> str:
    """Return what to say of an interrupt: that it was one, and how to go on."""
    if isinstance(interrupt, ExportInterrupted):
        return str(interrupt)
    if arguments.command == "apply":
        return "interrupted. The same command goes on from here."
    if not _resumable(arguments):
        return "interrupted."
    return (
        f"interrupted. Go on with: saber {arguments.command} {arguments.model} --out {arguments.out} "
        "--resume (and the same options)"
    )


def _resumable(arguments: argparse.Namespace) -> bool:
    out = arguments.out if arguments.command in ("run", "sweep", "audit") else None
    marks = ("state.json", "study.json", "audit-state.json")
    return out is not None and any((Path(out) / mark).exists() for mark in marks)


def _fail(error: SaberError, arguments: argparse.Namespace) -> int:
    if getattr(arguments, "json", False):
        with suppress(OSError):  # it may be standard output itself that cannot be written
            print(json.dumps({"error": error.problem, "remedy": error.remedy}), flush=True)
    print(f"saber: {error}", file=sys.stderr)
    return error.exit_code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="saber",
        description="Find, measure and edit the residual-stream directions that carry a behaviour.",
    )
    parser.add_argument("--version", action="version", version=f"saber {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )

    run = commands.add_parser(
        "run", help="find, measure and remove a behaviour", usage="saber run MODEL [options]"
    )
    _model_options(run)
    _config_options(run)
    run.add_argument("--out", metavar="DIR", type=Path, help="run folder (default: runs/MODEL)")
    run.add_argument(
        "--export",
        metavar="FORMAT,...",
        default="merged",
        help="any of merged, lora, gguf and gguf-lora, or none for the plan alone (default: merged)",
    )
    run.add_argument("--overwrite", action="store_true", help="replace a former run in --out")
    run.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    run.add_argument(
        "--force", action="store_true", help="edit even if the model hardly shows the behaviour"
    )
    run.add_argument(
        "--from-sweep", metavar="DIR", type=Path, help="build a trial of this sweep's folder"
    )
    run.add_argument(
        "--trial", metavar="N", type=int, help="which one (default: the one that was chosen)"
    )
    run.set_defaults(handler=_run)
    _sweep_options(
        commands.add_parser(
            "sweep",
            help="try many settings and choose one by validation prompts",
            usage="saber sweep MODEL [options]",
            conflict_handler="resolve",
        )
    )

    evaluate = commands.add_parser(
        "eval",
        help="measure a model, or an edited one against its base",
        usage="saber eval MODEL [options]",
    )
    _model_options(evaluate, edits=False, thoughts=True)
    _config_options(evaluate, edits=False, thoughts=True)
    evaluate.add_argument(
        "--base",
        metavar="MODEL",
        help="the untouched model, for divergence and paired tests; of the hub also OWNER/NAME@REVISION",
    )
    evaluate.add_argument(
        "--lm-eval",
        metavar="TASK,...",
        help="run these tasks of lm-eval instead: YAML files, or names (--limit items of each)",
    )
    evaluate.set_defaults(handler=_eval)

    audit = commands.add_parser(
        "audit",
        help="measure how little takes a behaviour out; no edit is kept",
        usage="saber audit MODEL [options]",
    )
    _model_options(audit)
    _config_options(audit, audits=True)
    audit.add_argument(
        "--out", metavar="DIR", type=Path, help="folder of the audit (default: runs/MODEL-audit)"
    )
    audit.add_argument("--overwrite", action="store_true", help="replace a former audit in --out")
    audit.add_argument("--resume", action="store_true", help="go on with the audit in --out")
    audit.add_argument(
        "--force", action="store_true", help="go on even if the model hardly shows the behaviour"
    )
    audit.set_defaults(handler=_audit)

    inspect = commands.add_parser("inspect", help="list the residual writers and prove the list")
    _model_options(inspect, edits=False)
    inspect.set_defaults(handler=_inspect)

    chat = commands.add_parser("chat", help="talk to a model, or to a run's edited model")
    _model_options(chat, edits=False, thoughts=True)
    chat.add_argument(
        "--compare",
        action="store_true",
        help="show the untouched model's answer too (a run folder)",
    )
    chat.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=int,
        help=f"length of an answer (default: 256; with --thinking {THOUGHT_TOKENS})",
    )
    _system_option(chat)
    chat.add_argument(
        "--base", metavar="MODEL", help="the untouched model, if not where the run says"
    )
    chat.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="ask this and leave; more than one: each by itself",
    )
    chat.set_defaults(handler=_chat)

    _file_commands(commands)

    export = commands.add_parser("export", help="ship a run's edit: LoRA, merged folder, GGUF")
    export.add_argument("run", metavar="RUN", type=Path, help="run folder")
    export.add_argument(
        "--format", metavar="FORMAT", required=True, help="lora, merged, gguf or gguf-lora"
    )
    export.add_argument(
        "--out",
        metavar="PATH",
        required=True,
        type=Path,
        help="folder or .gguf file; new, or an empty folder",
    )
    export.add_argument(
        "--base",
        metavar="MODEL",
        help="the model or .gguf file to build on (default: the run's)",
    )
    export.add_argument(
        "--type",
        metavar="NAME",
        default="auto",
        help="GGUF, changed tensors: keep their type, q8_0, f16, ...; auto keeps it where the edit "
        "outlives it and takes q8_0 elsewhere (default: auto)",
    )
    export.add_argument(
        "--partial", action="store_true", help="leave out what the format cannot hold"
    )
    export.add_argument(
        "--force", action="store_true", help="build on a model that does not match the run's"
    )
    push.add_options(export)
    _load_options(export, edits=False)
    export.set_defaults(handler=_export)

    report = commands.add_parser(
        "report", help="draw the plots, the HTML report and the model card again"
    )
    report.add_argument("run", type=Path, help="run folder")
    report.add_argument("--json", action="store_true", help="print the result as JSON")
    report.set_defaults(handler=_report)
    ui.add_parser(commands, _load_options).set_defaults(handler=_ui)
    push.add_parser(commands)
    diff.add_parser(commands)
    return parser


def _file_commands(commands: Any) -> None:
    """Add the commands that work on a checkpoint's files."""
    apply = commands.add_parser("apply", help="make a run's edit on a checkpoint's files, unloaded")
    apply.add_argument("run", metavar="RUN", type=Path, help="run folder")
    apply.add_argument("model", metavar="MODEL", help="folder with safetensors, or cached hub id")
    apply.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder to write; new or empty"
    )
    apply.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=0,
        help="processes that write shards (default: by size and cores)",
    )
    apply.add_argument(
        "--copy", action="store_true", help="copy untouched shards instead of hard-linking them"
    )
    apply.add_argument(
        "--force", action="store_true", help="apply the plan to another model than its own"
    )
    apply.add_argument(
        "--allow-pickle", action="store_true", help="convert .bin weights first (weights_only)"
    )
    apply.add_argument(
        "--no-sync",
        dest="sync",
        action="store_false",
        help="leave it to the system when bytes reach the disk, as cp does",
    )
    push.add_options(apply)
    apply.add_argument("--json", action="store_true", help="print the result as JSON")
    apply.set_defaults(handler=_apply)

    verify = commands.add_parser("verify", help="check where an edited model comes from")
    verify.add_argument(
        "path", metavar="DIR", type=Path, help="what SABER wrote; of a run folder, the model in it"
    )
    verify.add_argument("--run", metavar="RUN", type=Path, help="the run that it should come from")
    verify.add_argument("--base", metavar="MODEL", help="the model that it should be made from")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(handler=_verify)


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    _config_options(parser)
    add = parser.add_argument
    add("--top-k", dest="axis_top_k", metavar="N,...", help="axis: directions ablated in a pass")
    add("--alpha", dest="axis_alpha", metavar="A,...", help="axis: share of a direction removed")
    add(
        "--axis",
        action="append",
        default=[],
        metavar="FIELD=V,...",
        help="any setting as an axis; for a search also FIELD=LOW..HIGH or FIELD=LOW..HIGH:log",
    )
    add("--out", metavar="DIR", type=Path, help="sweep folder (default: runs/MODEL-sweep)")
    add("--overwrite", action="store_true", help="replace a former sweep in --out")
    add("--resume", action="store_true", help="go on with the sweep in --out")
    add("--force", action="store_true", help="go on even if the model hardly shows the behaviour")
    add(
        "--aim",
        metavar="SHARE",
        type=float,
        help="share of validation prompts that may be left amiss (default: 0.05)",
    )
    add(
        "--trials",
        metavar="N",
        type=int,
        default=0,
        help="search so many settings instead of a grid",
    )
    add(
        "--minutes",
        metavar="N",
        type=float,
        default=0.0,
        help="begin no trial after so many minutes",
    )
    add(
        "--workers",
        metavar="N",
        type=int,
        default=1,
        help="local processes, each with a model of its own (default: 1)",
    )
    add("--ray", action="store_true", help="workers are Ray's, on this machine")
    add("--ray-address", metavar="HOST:PORT", help="workers are those of this Ray cluster")
    add("--also", metavar="NAME,...", help="search: over-refusal, accuracy as further objectives")
    add("--storage", metavar="URL", default="", help="search: a database that machines may share")
    parser.set_defaults(handler=_sweep)


def _model_options(
    parser: argparse.ArgumentParser, *, edits: bool = True, thoughts: bool = False
) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, folder, .gguf file, or demo")
    _load_options(parser, edits=edits, thoughts=thoughts)


def _load_options(
    parser: argparse.ArgumentParser, *, edits: bool = True, thoughts: bool = False
) -> None:
    """Add the options that say how a model is loaded; those of `edits` and `thoughts` are refused without."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    model = parser.add_argument_group("how the model is loaded")
    model.add_argument(
        "--device", metavar="NAME", help="auto, cpu, cuda, cuda:i or mps (default: auto)"
    )
    model.add_argument(
        "--dtype",
        metavar="NAME",
        help="auto, float32, float16 or bfloat16 (default: what the device is fast at)",
    )
    model.add_argument(
        "--device-map",
        metavar="NAME",
        help="spread over several devices, as transformers does: auto, balanced, ...",
    )
    model.add_argument(
        "--offload",
        action="store_true",
        default=None,
        help="keep the layers in main memory: for models larger than the device",
    )
    model.add_argument(
        "--chat-template", metavar="FILE", help="a Jinja file to use as chat template"
    )
    model.add_argument(
        "--response-prefix",
        metavar="TEXT",
        help="text in front of every answer (default: an empty thought where the model opens one)",
    )
    model.add_argument(
        "--thinking",
        action="store_true",
        default=None,
        help="let the model think before it answers, as its chat template does (default: an empty thought)"
        if thoughts
        else argparse.SUPPRESS,
    )
    model.add_argument(
        "--layers-path", metavar="PATH", help="dotted path of the decoder's layer list"
    )
    model.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of a model on the hub (default: main; of a run, its own commit)",
    )
    model.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=None,
        help="run code that comes with the model",
    )
    model.add_argument(
        "--dequantize",
        action="store_true",
        default=None,
        help="take MXFP4 or FP8 weights as the plain ones that they stand for",
    )
    model.add_argument(
        "--allow-unproven",
        action="store_true",
        default=None,
        help="edit the writers that were found even if they cannot be proved to be all"
        if edits
        else argparse.SUPPRESS,
    )


def _system_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system prompt in front of every prompt (default: what the chat template puts there)",
    )


def _edit_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the edit").add_argument
    add(
        "--preset",
        metavar="NAME",
        help="default, orthogonal, or card: the published settings (default: default)",
    )
    add("--edit", metavar="KIND", help="selective or orthogonal (default: selective)")
    add(
        "--lambda",
        dest="lambda_",
        metavar="WEIGHT",
        type=float,
        help="selective edit: weight of what must not change; 0 lets validation prompts choose "
        "(default: 0)",
    )
    add(
        "--top-k",
        metavar="N",
        type=int,
        help="directions ablated in a pass, 0 for all (default: 0; orthogonal, card: 10)",
    )
    add(
        "--alpha",
        metavar="SHARE",
        type=float,
        help="share of a pure direction that is removed (default: 1; card: 0.85)",
    )
    add(
        "--passes",
        metavar="N",
        type=int,
        help="most passes (default: 4; orthogonal: 3; card: 5)",
    )
    add(
        "--scope",
        metavar="NAME",
        help="orthogonal edit: writers that are edited: own, nearest, upstream or all "
        "(default: nearest)",
    )


def _config_options(
    parser: argparse.ArgumentParser,
    *,
    edits: bool = True,
    audits: bool = False,
    thoughts: bool = False,
) -> None:
    """Add the options of settings; with `audits`, those of what an audit does not measure are hidden."""
    if edits:
        _edit_options(parser)
    _prompt_options(parser, audits=audits)
    _judge_options(parser, audits=audits, thoughts=thoughts)
    add = parser.add_argument_group("settings").add_argument
    add("--config", metavar="FILE", type=Path, help="a TOML file with settings")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any setting, such as spectral.components=5",
    )
    add(
        "--seed",
        metavar="N",
        type=int,
        help="of splits, nulls and bootstraps (default: 0)",
    )


def _prompt_options(parser: argparse.ArgumentParser, *, audits: bool) -> None:
    prompts = parser.add_argument_group("prompts, and what becomes of them")
    add = prompts.add_argument
    add(
        "--target",
        metavar="FILE",
        help="prompts that show the behaviour: .txt .jsonl .csv .parquet or a hub dataset",
    )
    add("--neutral", metavar="FILE", help="prompts that do not")
    add(
        "--eval-target",
        metavar="FILE",
        help="targets to measure on (default: the held-out split)",
    )
    add(
        "--eval-neutral",
        metavar="FILE",
        help="neutral prompts to measure on (default: the held-out split)",
    )
    borderline = "safe prompts that sound unsafe"
    add("--borderline", metavar="FILE", help=argparse.SUPPRESS if audits else borderline)
    add(
        "--everyday",
        metavar="FILE",
        help="ordinary requests whose answers must stay, or none (default: bundled)",
    )
    add(
        "--mode",
        metavar="NAME",
        help="removal, or over-refusal: take out false refusals alone, keep true ones "
        "(default: removal)",
    )
    add(
        "--keep",
        action="append",
        metavar="FILE",
        help="prompts whose answers must not change; may be given more than once",
    )
    add("--retain", metavar="CATEGORY,...", help="target categories that keep the behaviour")
    _system_option(prompts)


def _judge_options(parser: argparse.ArgumentParser, *, audits: bool, thoughts: bool) -> None:
    add = parser.add_argument_group("how answers are measured").add_argument
    longer = f"; with --thinking {THOUGHT_TOKENS}" if thoughts else ""
    add("--behaviour", metavar="NAME", help="what targets show, for reports (default: refusal)")
    add(
        "--limit",
        metavar="N",
        type=int,
        help="measure on at most this many prompts of each set (default: all)",
    )
    add(
        "--max-new-tokens",
        metavar="N",
        type=int,
        help=f"length of judged answers (default: 32{longer})",
    )
    lengths = "judge answers to targets at these lengths as well"
    add("--lengths", metavar="N,...", help=argparse.SUPPRESS if audits else lengths)
    add(
        "--judge",
        metavar="NAME",
        help="phrases, regex, classifier or endpoint (default: phrases)",
    )
    add("--judge-pattern", metavar="REGEX", help="regex: a pattern, or @FILE with one a line")
    add("--judge-model", metavar="NAME", help="classifier: folder or hub id; endpoint: model")
    add("--judge-label", metavar="NAME", help="classifier: label of answers with the behaviour")
    add(
        "--judge-threshold",
        metavar="SHARE",
        type=float,
        help="classifier: least probability (default: 0.5)",
    )
    add("--judge-url", metavar="URL", help="endpoint: OpenAI-compatible address, .../v1")
    add("--judge-key", metavar="VARIABLE", help="endpoint: environment variable with the key")
    add("--judge-description", metavar="TEXT", help="endpoint: when an answer shows the behaviour")


FLAGS = {
    "seed": "seed",
    "target": "data.target",
    "neutral": "data.neutral",
    "eval_target": "data.eval_target",
    "eval_neutral": "data.eval_neutral",
    "borderline": "data.borderline",
    "everyday": "data.everyday",
    "mode": "data.mode",
    "keep": "data.keep",
    "retain": "data.retain",
    "limit": "data.limit",
    "edit": "edit.kind",
    "top_k": "refine.top_k",
    "alpha": "edit.alpha",
    "lambda_": "edit.lambda",
    "passes": "refine.passes",
    "scope": "edit.scope",
    "max_new_tokens": "evaluation.max_new_tokens",
    "lengths": "evaluation.lengths",
    "behaviour": "data.behaviour",
    "judge": "evaluation.judge",
    "judge_pattern": "judging.pattern",
    "judge_model": "judging.model",
    "judge_label": "judging.label",
    "judge_threshold": "judging.threshold",
    "judge_url": "judging.url",
    "judge_key": "judging.key",
    "judge_description": "judging.description",
    "device": "load.device",
    "dtype": "load.dtype",
    "device_map": "load.device_map",
    "offload": "load.offload",
    "chat_template": "load.chat_template",
    "system": "load.system",
    "response_prefix": "load.response_prefix",
    "thinking": "load.thinking",
    "layers_path": "load.layers_path",
    "revision": "load.revision",
    "trust_remote_code": "load.trust_remote_code",
    "dequantize": "load.dequantize",
    "allow_unproven": "load.allow_unproven",
}
"""Option -> the setting that it gives."""
_NAMES = (
    *("data.target", "data.neutral", "data.eval_target", "data.eval_neutral", "data.borderline"),
    *("data.everyday", "data.keep", "data.retain", "evaluation.lengths"),
    *("load.chat_template", "load.layers_path", "load.device_map", "load.revision"),
)
"""Settings whose options name something: without a name they would be left out without a word."""


_EDITS: dict[str, tuple[str, tuple[str, ...]]] = {
    "edit.lambda": ("edit.kind", ("selective",)),
    "edit.ridge": ("edit.kind", ("selective",)),
    "edit.sensitivity": ("edit.kind", ("selective",)),
    "edit.scope": ("edit.kind", ("orthogonal",)),
}
_JUDGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "judging.pattern": ("evaluation.judge", ("regex",)),
    "judging.model": ("evaluation.judge", ("classifier", "endpoint")),
    "judging.label": ("evaluation.judge", ("classifier",)),
    "judging.threshold": ("evaluation.judge", ("classifier",)),
    "judging.url": ("evaluation.judge", ("endpoint",)),
    "judging.key": ("evaluation.judge", ("endpoint",)),
    "judging.description": ("evaluation.judge", ("endpoint",)),
    "judging.timeout": ("evaluation.judge", ("endpoint",)),
    "judging.retries": ("evaluation.judge", ("endpoint",)),
    "judging.parallel": ("evaluation.judge", ("endpoint",)),
}
"""Setting -> another setting, and the values of that one with which it does anything."""
_TASKS = (
    "data.limit",
    "load.device",
    "load.dtype",
    "load.device_map",
    "load.offload",
    "load.chat_template",
    "load.system",
    "load.layers_path",
    "load.revision",
    "load.trust_remote_code",
    "load.dequantize",
)
"""Settings that tasks of lm-eval are run by."""
_NOT_AUDITED = (
    "data.borderline",
    "data.battery",
    "evaluation.battery_new_tokens",
    "evaluation.lengths",
)
"""Settings of what an audit does not measure."""
MEASURED_BY = ("seed", "data", "load", "evaluation", "judging")
"""Settings that a measurement depends on, and sections of them."""


def require_used(
    config: Any, *, edits: bool = True, axes: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> None:
    """Raise `UsageError` for a setting, or an axis of a sweep, that does nothing; defaults are none.

    Without `edits` only the judge's are looked at.
    """
    from saber.config import RunConfig, value_of

    plain = RunConfig()
    for path, (other, wanted) in ({**_EDITS, **_JUDGES} if edits else _JUDGES).items():
        given = path in axes or value_of(config, path) != value_of(plain, path)
        now = axes.get(other) or [value_of(config, other)]
        if given and not set(now) & set(wanted):
            raise UsageError(
                f"{_option(path)} does nothing with {_option(other)} {now[0]}.",
                f"It goes with {_option(other)} {' or '.join(wanted)}.",
            )


def require_no_edit(arguments: argparse.Namespace) -> None:
    """Raise `UsageError` for an option of edits, in a command that makes none."""
    _refuse(
        arguments,
        lambda path: path == "load.allow_unproven" or path.partition(".")[0] not in MEASURED_BY,
        f"saber {arguments.command}, which edits nothing anew",
        "Leave it out: it goes with saber run and saber sweep, and with saber audit.",
    )


def require_audited(arguments: argparse.Namespace) -> None:
    """Raise `UsageError` for an option of what an audit does not measure."""
    _refuse(
        arguments,
        _NOT_AUDITED.__contains__,
        "saber audit, which asks targets and neutral prompts",
        "Leave it out: it goes with saber run and saber eval.",
    )


def require_read_by_tasks(arguments: argparse.Namespace) -> None:
    """Raise `UsageError` for an option that does nothing with --lm-eval: tasks bring prompts and scores."""
    _refuse(
        arguments,
        lambda path: path not in _TASKS,
        "--lm-eval",
        "Leave it out: tasks bring prompts and scores of their own.",
    )


def _refuse(
    arguments: argparse.Namespace, idle: Callable[[str], bool], where: str, remedy: str
) -> None:
    """Raise `UsageError` for an option whose setting is idle; none is what a file of --config sets, which
    commands share."""
    for path in filter(idle, _given(arguments)):
        raise UsageError(f"{_option(path)} does nothing with {where}.", remedy)


def _option(path: str) -> str:
    """Return the option that gives a setting, or the setting's name where there is none."""
    flag = next((f for f, known in FLAGS.items() if known == path), None)
    return f"--{flag.rstrip('_').replace('_', '-')}" if flag else path


def read_config(arguments: argparse.Namespace) -> Any:
    """Return the resolved configuration: defaults < preset < TOML < flags."""
    from saber.config import PRESETS, override, preset, read_toml, require_behaviour, with_room

    file = read_toml(arguments.config) if getattr(arguments, "config", None) else {}
    usual = "orthogonal" if getattr(arguments, "edit", None) == "orthogonal" else "default"
    name = getattr(arguments, "preset", None) or file.get("preset", usual)
    if not isinstance(name, str):
        known = ", ".join(sorted(PRESETS))
        raise UsageError(f"setting preset needs one name, not {name!r}.", f"Known: {known}.")
    config = override(preset(name), {**file, "preset": name})
    flags: dict[str, Any] = {}
    for path, value in _given(arguments).items():
        _put(flags, path, value)
    config = with_room(override(config, flags), file, flags)
    require_behaviour(config, file, flags)
    return config


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line sets, by setting: --set first, then options of their own."""
    found: dict[str, Any] = {}
    for option in getattr(arguments, "set", []):
        path, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"--set {option!r} is not of the form NAME=VALUE.")
        found[path] = value
    options = {path: getattr(arguments, flag, None) for flag, path in FLAGS.items()}
    for path in _NAMES:
        _require_named(path, options[path])
    return {**found, **{path: value for path, value in options.items() if value is not None}}


def _require_named(path: str, value: Any) -> None:
    """Raise `UsageError` for an option that names nothing, as one with a variable that is not set does."""
    every = [value] if isinstance(value, str) else value or []
    if not all(text.replace(",", " ").strip() for text in every):
        raise UsageError(f"{_option(path)} is empty.", "Name something, or leave it out.")


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UsageError(f"setting {part} is given as {tree!r} and as a table with {path}.")
    tree[leaf] = value


# Handlers import late, so that --help and wrong use answer at once.


def _without_thoughts(arguments: argparse.Namespace) -> Any:
    """Return the configuration; raise `UsageError` where the model is to think, as edits need it not to."""
    from saber.config import require_empty_thoughts

    config = read_config(arguments)
    require_empty_thoughts(config)
    return config


def _run(arguments: argparse.Namespace) -> int:
    if arguments.from_sweep is not None:
        from saber.cli.sweep import build_trial

        return build_trial(arguments)
    if arguments.trial is not None:
        raise UsageError("--trial goes with --from-sweep.")
    from saber.cli.commands import run_command

    config = _without_thoughts(arguments)
    require_used(config)
    return run_command(arguments, config)


def _sweep(arguments: argparse.Namespace) -> int:
    from saber.cli.sweep import sweep_command

    return sweep_command(arguments, _without_thoughts(arguments))


def _audit(arguments: argparse.Namespace) -> int:
    from saber.cli.audit import audit_command

    config = _without_thoughts(arguments)
    require_used(config)
    require_audited(arguments)
    return audit_command(arguments, config)


def _eval(arguments: argparse.Namespace) -> int:
    from saber.cli.commands import eval_command, tasks_command

    config = read_config(arguments)
    if arguments.lm_eval is not None:
        require_read_by_tasks(arguments)
        return tasks_command(arguments, config)
    require_used(config, edits=False)
    require_no_edit(arguments)
    return eval_command(arguments, config)


def _inspect(arguments: argparse.Namespace) -> int:
    from saber.cli.commands import inspect_command

    require_no_edit(arguments)
    return inspect_command(arguments, _without_thoughts(arguments))


def _chat(arguments: argparse.Namespace) -> int:
    from saber.cli.chat import chat_command
    from saber.conversation import usual_limit

    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UsageError("--max-new-tokens must be at least 1.")
    require_no_edit(arguments)
    limit, arguments.max_new_tokens = arguments.max_new_tokens, None
    config = read_config(arguments)
    return chat_command(arguments, config, limit or usual_limit(config.load))


def _ui(arguments: argparse.Namespace) -> int:
    require_no_edit(arguments)
    return ui.ui_command(arguments, read_config(arguments))


def _apply(arguments: argparse.Namespace) -> int:
    from saber.cli.files import apply_command

    return apply_command(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from saber.cli.files import verify_command

    return verify_command(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from saber.cli.export import export_command

    require_no_edit(arguments)
    return export_command(arguments, _without_thoughts(arguments))


def _report(arguments: argparse.Namespace) -> int:
    from saber.cli.commands import report_command

    return report_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
