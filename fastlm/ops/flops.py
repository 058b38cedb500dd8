"""What torch.utils.flop_counter.FlopCounterMode counts for the ops of this package."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def count_flops(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Registers each op's formula, which takes the op's tensors and `out_val`.

    If FlopCounterMode is loaded, that is: at import it would load Triton.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None or all(op in module.flop_registry for op in formulas):
        return
    for op, formula in formulas.items():
        module.register_flop_formula(op, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():  # its registry is an earlier copy
        if isinstance(mode, module._FlopCounterMode):
            mode.counter.flop_registry.update({op: module.flop_registry[op] for op in formulas})
