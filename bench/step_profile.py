"""Where a training step's time goes: torch.profiler's events, by kind of work."""

import re
import time
from collections.abc import Callable
from typing import Any

import torch

# The first that an event's name matches; what is in none of them, an ancestor decides.
KINDS = {
    "matmul": r"^aten::(mm|addmm|bmm|baddbmm|matmul|linear|_scaled_mm)$|^mkldnn::_linear|_matmul",
    "attention": r"_scaled_dot_product_|causal_attention",
    "pointwise": r"Call CompiledFxGraph",
    "loss": r"fastlm.*cross_entropy|^CrossEntropy|^aten::(nll_loss|_?log_softmax|cross_entropy)",
    "optimizer": r"Optimizer\.",
    "data": r"^data$",
}
OTHER = "other"
OUTERMOST = ("optimizer", "data")  # all that is inside belongs to them: Muon's matmuls, too
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}


def split_of_step(step: Callable[[], Any], *, steps: int = 3) -> dict[str, float]:
    """Milliseconds of one `step`, on average over `steps`, for each of KINDS and "other".

    On a CPU: what the calling thread does, which works beside its helpers and waits for them.
    "other" is the rest of the wall-clock time: Python, autograd, small operations, idling. The
    work of loading a batch is that in record_function("data").
    """
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        begin = time.perf_counter()
        with torch.profiler.record_function("all steps"):
            for _ in range(steps):
                step()
        seconds = time.perf_counter() - begin
    events = profile.events()
    thread = next(event.thread for event in events if event.name == "all steps")
    found = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if event.thread == thread and (kind := kind_of(event)) is not None:
            found[kind] += event.self_cpu_time_total / 1e3 / steps  # from us
    return found | {OTHER: 1e3 * seconds / steps - sum(found.values())}


def kind_of(event: Any) -> str | None:
    """The kind of the innermost event with one, from `event` outwards; OUTERMOST before that."""
    kind = None
    while event is not None:
        found = next((k for k, pattern in _PATTERNS.items() if pattern.search(event.name)), None)
        if found in OUTERMOST:
            return found
        kind = kind or found
        event = event.cpu_parent
    return kind
