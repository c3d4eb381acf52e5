"""torch.compile for blocks: what it cannot compile runs as it is, with a warning."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

MOST_GRAPHS = 256
"""Of one piece of code; a U-Net runs the same code with many widths. torch's 8 would leave the rest uncompiled."""
ALL_GRAPHS = 4 * MOST_GRAPHS


def compile_modules(modules: Iterable[nn.Module], memory_budget: float | None = None) -> None:
    """Has modules compiled when they are first called; alike ones share one compilation.

    Sizes that change become variables at the first change, so that buckets of transformers do not compile anew.

    Args:
        memory_budget: Share of the activations that is kept; left out, what is needed.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, ALL_GRAPHS)
    functorch: Any = torch._functorch.config
    functorch.activation_memory_budget = 1.0 if memory_budget is None else memory_budget
    if hasattr(functorch, "force_non_lazy_backward_lowering"):
        functorch.force_non_lazy_backward_lowering = True  # else the backward pass would fail when it is too late
    _keep_sizes_variable()
    # On a CPU torch would turn variable sizes to channels-last, and fix them by the strides that it keeps
    options: dict[str, Any] | None = None if torch.cuda.is_available() else {"layout_optimization": False}
    all_of_them = list(modules)
    for module in all_of_them:
        module.compile(options=options)
        module._compiled_call_impl = _Guarded(module, all_of_them)


def _keep_sizes_variable() -> None:
    """Lets convolutions of variable height and width go backward through the library.

    torch 2.13 fixes the sizes of a convolution before it looks for Triton kernels of its backward pass, so that each
    size would compile anew. Convolutions of fixed sizes are left to it.
    """
    from torch._inductor import lowering

    operator = torch.ops.aten.convolution_backward.default
    table: dict[Any, Any] = lowering.lowerings
    known = table.get(operator)
    if known is None or getattr(known, "_is_fallback_handler", False) or getattr(known, "keeps_sizes", False):
        return
    library = lowering.fallback_handler(operator)

    def lower(gradient: Any, value: Any, *rest: Any, **options: Any) -> Any:
        sizes = (*gradient.get_size(), *value.get_size())
        is_variable = any(getattr(size, "free_symbols", None) for size in sizes)
        return (library if is_variable else known)(gradient, value, *rest, **options)

    lower.keeps_sizes = True  # type: ignore[attr-defined]
    table[operator] = lower


class _Guarded:
    """A compiled call that gives up compiling all modules when compiling fails."""

    def __init__(self, module: nn.Module, all_of_them: list[nn.Module]) -> None:
        self._module, self._all = module, all_of_them
        self._compiled: Any = module._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            first = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning("compile: torch.compile failed for %s, so the training goes on uncompiled, which is slower "
                           "(%s); set compile = false to be rid of this message",
                           type(self._module).__name__, first[0])  # fmt: skip
            for module in self._all:
                module._compiled_call_impl = None
            return self._module(*args, **kwargs)
