"""One kernel, two ways to call it.

A custom op costs the host about 90 µs per forward and backward, a plain ``autograd.Function`` a third of that. So eager
code calls the function, and only what traces calls the op: torch.compile, torch.export, fake tensors, dispatch modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Kernel:
    """A function of tensors and numbers, called as it is.

    Attributes:
        op: the same as a custom op, ``torch.ops.mixreorg.<name>``.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None] | None,
        gradient: Callable[..., Any] | None,
    ) -> None:
        self.op = torch.library.custom_op(f"mixreorg::{name}", function, mutates_args=())
        self.op.register_fake(fake)
        self._function = self._differentiable = self._transformable = function
        if gradient is not None:
            self.op.register_autograd(gradient, setup_context=save)

            def forward(ctx: Any, *inputs: Any) -> Any:
                output = function(*inputs)
                save(ctx, inputs, output)
                return output

            # torch.func asks for a setup_context. With one, PyTorch inspects a signature at every call, 14 µs of host
            # time, so that calls outside of torch.func do without.
            self._transformable = _autograd(name, function, gradient, setup_context=save)
            self._differentiable = _autograd(name, forward, gradient)
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        if _traces(arguments[0]):
            return self.op(*arguments)
        if torch._C._are_functorch_transforms_active():
            return self._transformable(*arguments)
        return (self._differentiable if torch.is_grad_enabled() else self._function)(*arguments)


def _autograd(name: str, forward: Callable[..., Any], backward: Callable[..., Any], **others: Callable) -> Callable:
    methods = {"forward": forward, "backward": backward, **others}
    return type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()}).apply


def kernel(
    name: str,
    *,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a function whose first argument is a tensor and whose parameters have the types of a custom op's.

    Args:
        name: of the custom op, in the namespace "mixreorg".
        fake: the outputs' shapes and dtypes, see ``torch.library.register_fake``.
        save, gradient: ``(ctx, inputs, output)`` and ``(ctx, *gradients)``, see ``torch.library.register_autograd``.
            Without them the outputs have no gradient.
    """
    return lambda function: Kernel(name, function, fake, save, gradient)


def _traces(tensor: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )
