"""A plan as a PEFT LoRA adapter, exactly: B = left, A = right, scaling 1, a rank for each module.

PEFT itself says what every tensor is called and how it is laid out: the adapter is put on a skeleton
of the model, filled, and read back.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from saber.ablation import EditPlan, Factor
from saber.errors import MissingExtra, ModelError, UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Place = Literal["module", "parameter", "none"]


@dataclass(frozen=True)
class Layout:
    """How a plan goes into an adapter."""

    modules: Mapping[str, str]
    """Factor -> module that takes it, a linear map or the embedding."""
    parameters: Mapping[str, str]
    """Factor -> parameter that takes it, such as a stack of experts."""
    bias: bool
    """Whether the adapter carries biases (`lora_bias`)."""
    lost: tuple[str, ...]
    """Parameters whose change has no place in an adapter."""


def require_peft() -> Any:
    """Return the `peft` package; raises `MissingExtra`."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "export") from error
    return peft


def layout(
    model: Any, plan: EditPlan, placeless: Callable[[str], bool] = lambda _weight: False
) -> Layout:
    """Decide where each factor goes; raises `ModelError` when the model has no such weight or shape.

    Linear maps are adapted as modules. Weights of other modules, and linear maps that share their name
    with a stack of experts (which PEFT would take for one of them), are adapted as parameters. A bias
    has a place only where every adapted module has one, as `lora_bias` is all or nothing. What is
    `placeless` (see there) has none.
    """
    stacks = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.ndim == 3}
    tied = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules: dict[str, str] = {}
    parameters: dict[str, str] = {}
    lost: list[str] = []
    for name, factor in plan.factors.items():
        weight = factor.weight or f"{name}.weight"
        parameter = _parameter(model, weight, factor)
        owner, _, leaf = weight.rpartition(".")
        module = model.get_submodule(owner)
        if tied[id(parameter)] > 1 or parameter.ndim not in (2, 3) or placeless(weight):
            lost.append(weight)
        elif (
            isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
            and leaf == "weight"
            and owner.rpartition(".")[2] not in stacks
        ):
            modules[name] = owner
        else:
            parameters[name] = weight
    biased = [n for n, f in plan.factors.items() if f.bias is not None]
    carried = bool(biased) and not parameters and set(biased) == set(modules)
    if not carried:
        lost += [plan.factors[n].bias_name or f"{n}.bias" for n in biased]
    return Layout(modules, parameters, carried, tuple(lost))


def placeless(model: Any) -> Callable[[str], bool]:
    """Return which weights PEFT refuses to adapt: Mamba's kernels take some and never call their module."""
    peft = require_peft()
    check = getattr(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", None)

    def refused(weight: str) -> bool:
        owner = weight.rpartition(".")[0]
        try:
            if check is not None:
                check(peft.LoraConfig(), model, owner.rpartition(".")[2])
        except ValueError:
            return True
        return False

    return refused


def _parameter(model: Any, name: str, factor: Factor) -> Tensor:
    try:
        parameter: Tensor = model.get_parameter(name)
    except AttributeError as error:
        raise ModelError(
            f"the base model has no weight {name}, which the plan changes.",
            "Give the model that the run was made on with --base.",
        ) from error
    wanted = list(factor.right.shape[1:])
    wanted.insert(factor.axis, factor.left.shape[0])
    if list(parameter.shape) != wanted:
        raise ModelError(
            f"{name} has the shape {list(parameter.shape)} in the base model and {wanted} in the plan.",
            "Give the model that the run was made on with --base.",
        )
    return parameter


def write_lora(
    model: Any,
    plan: EditPlan,
    where: Layout,
    folder: Path,
    base: str,
    metadata: Mapping[str, str],
    revision: str = "",
) -> None:
    """Write the adapter of a plan into a folder, in float32.

    `model` is a skeleton (`saber.lm.load.skeleton`), and is changed. `metadata` stands in the config
    under `auto_mapping.saber`, the one free place that PEFT reads without a warning, and in the
    `__metadata__` of the weights. `revision` is that of the base on the hub where it is not its main.
    """
    peft = require_peft()
    config = _config(peft, model, plan, where)
    with warnings.catch_warnings():
        # Of transformers to PEFT, about training; and of PEFT, which takes a bias for a lost shard.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", r".*invalid shape: \S*lora_B\.bias")
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        wrappers = _wrappers(peft, adapted)
        for name, target in where.modules.items():
            _fill_module(wrappers[target], plan.factors[name], where.bias)
        for name, target in where.parameters.items():
            _fill_parameter(peft, wrappers[target], plan.factors[name])
        state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {key: value.detach().contiguous() for key, value in state.items()}
    left = [key for key, value in tensors.items() if value.is_meta]
    assert not left, left
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **metadata})
    # PEFT has put the skeleton's own name there, which may be a path of this machine.
    config.base_model_name_or_path = base
    config.revision = revision or None
    config.inference_mode = True
    config.save_pretrained(folder, auto_mapping_dict={"saber": dict(metadata)})


def _config(peft: Any, model: Any, plan: EditPlan, where: Layout) -> Any:
    ranks = {t: plan.factors[n].left.shape[1] for n, t in where.modules.items()}
    stacked = [plan.factors[n].left.shape[1] for n in where.parameters]
    if not ranks and not stacked:
        raise UsageError(
            "nothing of this edit has a place in a LoRA adapter of PEFT.", "Use --format merged."
        )
    # Patterns are for modules: parameters all have the default rank, filled up with zeros.
    usual = max(stacked) if stacked else Counter(ranks.values()).most_common(1)[0][0]
    other = {target: rank for target, rank in sorted(ranks.items()) if rank != usual}
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=usual,
        lora_alpha=usual,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=sorted(where.modules.values()),
        target_parameters=sorted(where.parameters.values()) or None,
        lora_bias=where.bias,
        fan_in_fan_out=any(
            isinstance(model.get_submodule(t), Conv1D) for t in where.modules.values()
        ),
        lora_dropout=0.0,
    )


def _wrappers(peft: Any, adapted: Any) -> dict[str, Any]:
    """Return PEFT's layers by the module or parameter that they adapt."""
    found: dict[str, Any] = {}
    prefix = "base_model.model."
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            plain = ".".join(p for p in name.removeprefix(prefix).split(".") if p != "base_layer")
            parameter = getattr(module, "parameter_name", None)
            found[f"{plain}.{parameter}" if parameter else plain] = module
    return found


def _put(holder: Any, value: Tensor, adapter: str = "default") -> None:
    weight = holder[adapter].weight
    assert weight.shape == value.shape, (weight.shape, value.shape)
    holder[adapter].weight = nn.Parameter(value.float().contiguous(), requires_grad=False)


def _fill_module(wrapper: Any, factor: Factor, bias: bool) -> None:
    if isinstance(wrapper.get_base_layer(), nn.Embedding):
        wrapper.lora_embedding_A["default"] = nn.Parameter(factor.right.float(), False)
        wrapper.lora_embedding_B["default"] = nn.Parameter(factor.left.float(), False)
        return
    _put(wrapper.lora_A, factor.right)
    _put(wrapper.lora_B, factor.left)
    if bias and factor.bias is not None:
        wrapper.lora_B["default"].bias = nn.Parameter(factor.bias.float(), requires_grad=False)


def _fill_parameter(peft: Any, wrapper: Any, factor: Factor) -> None:
    rank = wrapper.r["default"]
    more = rank - factor.left.shape[1]
    left = torch.nn.functional.pad(factor.left.float(), (0, more))
    right = torch.cat([factor.right.float(), torch.zeros(more, *factor.right.shape[1:])])
    if right.ndim == 2:
        # PEFT takes B @ A for the weight as it is stored.
        pair = (left, right) if factor.axis == 0 else (right.T, left.T)
        _put(wrapper.lora_B, pair[0])
        _put(wrapper.lora_A, pair[1])
        return
    experts = right.shape[1]
    transposed = bool(getattr(wrapper.get_base_layer(), "is_transposed", False))
    if _reads_inputs(peft, transposed, factor.axis):
        down, up = right.movedim(1, 0), left.expand(experts, -1, -1)
    else:
        down, up = left.T.expand(experts, -1, -1), right.permute(1, 2, 0)
    # A has the experts one below the other; in B they are the innermost index.
    _put(wrapper.lora_A, down.reshape(experts * rank, -1))
    _put(wrapper.lora_B, up.permute(1, 2, 0).reshape(up.shape[1], -1))


def _reads_inputs(peft: Any, transposed: bool, axis: int) -> bool:
    """Whether this version of PEFT has the inputs of a stack of experts in A, found by trying it."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = transposed
            self.stack = nn.Parameter(torch.zeros(2, 3, 5))

    holder = nn.Module()
    holder.experts = Stack()
    config = peft.LoraConfig(r=1, target_modules=[], target_parameters=["experts.stack"])
    with torch.device("cpu"):
        adapted = peft.get_peft_model(holder, config)
    wrapper = _wrappers(peft, adapted)["experts.stack"]
    outputs, inputs = (3, 5) if axis == 1 else (5, 3)
    return bool(wrapper.lora_A["default"].weight.shape[1] == inputs and outputs != inputs)


def read_lora(folder: Path) -> EditPlan:
    """Read a plain LoRA adapter of linear maps, each of the same rank, as a plan: W += (alpha / r) B A."""
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    scale = settings["lora_alpha"] / settings["r"]
    tensors = load_file(folder / WEIGHTS)
    factors: dict[str, Factor] = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = tensors[key.replace(".lora_A.", ".lora_B.")]
            factors[name] = Factor(scale * up.float(), down.float(), None, 0)
    return EditPlan(factors)
