"""Tasks of EleutherAI's lm-eval on a model in memory: local YAML files, or tasks by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from saber.errors import DataError, MissingExtra, UsageError
from saber.lm.model import LanguageModel
from saber.paths import expanded

BATCH = 8
YAML = (".yaml", ".yml")


def task_list(value: str) -> list[str]:
    """Split a comma-separated list of tasks; raises `UsageError` for an empty one or a missing file."""
    tasks = [name.strip() for name in value.split(",") if name.strip()]
    if not tasks:
        raise UsageError("--lm-eval names no task.", "Give YAML files or names, comma-separated.")
    for name in tasks:
        if name.endswith(YAML) and not expanded(name).is_file():
            raise UsageError(f"there is no task file {name}.")
    return tasks


def load_tasks(tasks: Sequence[str]) -> Any:
    """Read tasks and their data, before any model is loaded.

    A task is a YAML file, whose `data_files` are relative to the current folder, or the name of one
    that comes with lm-eval, whose data the hub has to give. Raises `MissingExtra`, `UsageError` for
    a task that is unknown or badly written, and `DataError` where its data cannot be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra("lm-eval", "lm-eval") from error
    names = ", ".join(tasks)
    own = all(name.endswith(YAML) for name in tasks)
    try:
        with _quiet():
            return TaskManager(include_defaults=not own).load(list(tasks))
    except (OSError, RuntimeError) as error:
        raise DataError(f"lm-eval cannot read the data of {names}: {_line(error)}.") from error
    except Exception as error:  # a task file can be wrong in any way
        raise UsageError(f"lm-eval cannot load {names}: {_line(error)}.") from error


def run_tasks(lm: LanguageModel, tasks: Any, *, limit: int = 0) -> dict[str, Any]:
    """Run tasks that `load_tasks` gave through the model's chat template.

    At most `limit` items of each are asked (0: all), without sampling. Returns the library's version
    and, by task and group, the items asked and each metric with its standard error, in the metric's
    unit. Raises `UsageError` for a task that cannot be run, or runs code that a model wrote.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        with _quiet():
            model = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=BATCH)
            results = lm_eval.evaluate(
                model,
                tasks,
                limit=limit or None,
                system_instruction=dict(lm.before).get("system"),
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                bootstrap_iters=1000,
                log_samples=False,
            )
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"lm-eval cannot run these tasks: {_line(error)}.") from error
    counts = results["n-samples"]
    return {
        "version": lm_eval.__version__,
        "chat_template": True,
        "tasks": {
            name: {
                "n": counts.get(name, {}).get("effective"),
                "shots": results["n-shot"].get(name),
                "metrics": _metrics(values),
            }
            for name, values in {**results["results"], **results.get("groups", {})}.items()
        },
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's notes off the terminal; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Give each metric its standard error; lm-eval names them `acc,none` and `acc_stderr,none`."""
    found = {}
    for key, value in values.items():
        name, comma, filter_ = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        error = values.get(f"{name}_stderr,{filter_}")
        title = name if filter_ == "none" else f"{name} ({filter_})"
        stderr = float(error) if isinstance(error, (int, float)) else None
        found[title] = {"value": float(value), "stderr": stderr}
    return found


def _line(error: BaseException) -> str:
    """Return an error in one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
