"""Names of a model's parameters in its checkpoint files.

transformers 5 renames, splits and fuses tensors between files and memory. This module is the only
one that touches that mapping, so that a change of it there is a change in one place here.
"""

from __future__ import annotations

import torch
from transformers import core_model_loading
from transformers.modeling_utils import PreTrainedModel


def disk_names(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Return the names of the tensors that hold a parameter when the model is saved.

    A fused weight of E experts has E names where the files keep experts apart. Empty where the files
    weave it together with other parameters, so that no name is its own.
    """
    shape = model.get_parameter(name).shape
    stand_in = {name: torch.empty(shape, device="meta")}
    try:
        return tuple(core_model_loading.revert_weight_conversion(model, stand_in))
    except ValueError:
        return ()
