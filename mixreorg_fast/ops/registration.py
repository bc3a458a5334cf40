"""One kernel, two ways to call it.

A custom op costs the host about 90 µs per forward and backward, a plain ``autograd.Function`` a third of that. So eager
code calls the function. Only code that traces calls the op: torch.compile, torch.export, fake tensors, dispatch modes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.variants import on_device

_KERNELS = f"{__name__.split('.')[0]}.kernels"


def kernel(
    launcher: str,
    *,
    save: Callable[..., None] = lambda ctx, inputs, output: None,
    gradient: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate the declaration of a kernel.

    The declaration is a function that makes the kernel's outputs empty: PyTorch traces with it. Its name, without a
    leading underscore, is the custom op's. Its parameters are the launcher's: the first is a tensor, the others have
    types that a custom op takes, and the last may be one of :mod:`..kernels.settings`.

    Args:
        launcher: "module.function" of :mod:`..kernels`, imported at the first launch.
        save: ``(ctx, inputs, output)``, keeps what `gradient` needs.
        gradient: ``(ctx, *gradients)``, gives the gradient of the first input, or a tuple of those of the first inputs.
            Without it the outputs have no gradient.
    """
    return lambda declaration: Kernel(declaration, launcher, save, gradient)


class Kernel:
    """A kernel that is called with its declaration's arguments.

    Attributes:
        op: the custom op, ``torch.ops.mixreorg.<name>``; it takes the fields of settings as arguments of their own.
    """

    def __init__(
        self,
        declaration: Callable[..., Any],
        launcher: str,
        save: Callable[..., None],
        gradient: Callable[..., Any] | None,
    ) -> None:
        functools.update_wrapper(self, declaration)
        name = declaration.__name__.lstrip("_")
        module, _, function = launcher.partition(".")
        module = f"{_KERNELS}.{module}"

        def launch(*arguments: Any) -> Any:
            with on_device(arguments[0]):
                return getattr(importlib.import_module(module), function)(*arguments)

        self._parameters = parameters = _Parameters(declaration)
        self.op = torch.library.custom_op(f"mixreorg::{name}", parameters.spread(launch), mutates_args=())
        self.op.register_fake(parameters.spread(declaration))
        self._launch = self._differentiable = self._transformable = launch
        if gradient is not None:
            assert save is not None, f"{name}: a gradient needs save"

            def forward(ctx: Any, *inputs: Any) -> Any:
                output = launch(*inputs)
                save(ctx, inputs, output)
                return output

            def save_spread(ctx: Any, inputs: tuple, output: Any) -> None:
                save(ctx, parameters.bundled(inputs), output)

            # torch.func asks for a setup_context. With one, PyTorch inspects a signature at every call, 14 µs of host
            # time, so that calls outside of torch.func do without.
            backward = _padded(gradient, parameters.count)
            self._transformable = _autograd(name, launch, backward, setup_context=save)
            self._differentiable = _autograd(name, forward, backward)
            self.op.register_autograd(_padded(gradient, parameters.spread_count), setup_context=save_spread)

    def __call__(self, *arguments: Any) -> Any:
        if traces(arguments[0]):
            return self.op(*self._parameters.flattened(arguments))
        if torch._C._are_functorch_transforms_active():
            return self._transformable(*arguments)
        return (self._differentiable if torch.is_grad_enabled() else self._launch)(*arguments)


class _Parameters:
    """The parameters of a declaration, and those of its custom op: in place of settings their fields."""

    def __init__(self, declaration: Callable[..., Any]) -> None:
        signature = inspect.signature(declaration, eval_str=True)
        *others, last = signature.parameters.values()
        self._settings = last.annotation if hasattr(last.annotation, "_fields") else None
        self.count = self.spread_count = len(signature.parameters)
        if self._settings is not None:
            fields = typing.get_type_hints(self._settings).items()
            others += [inspect.Parameter(name, last.kind, annotation=kind) for name, kind in fields]
            signature, self.spread_count = signature.replace(parameters=others), len(others)
        self._signature = signature

    def flattened(self, arguments: tuple) -> tuple:
        return arguments if self._settings is None else (*arguments[:-1], *arguments[-1])

    def bundled(self, arguments: tuple) -> tuple:
        if self._settings is None:
            return arguments
        first = self.count - 1
        return (*arguments[:first], self._settings(*arguments[first:]))

    def spread(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, called with the custom op's arguments."""

        def called(*arguments: Any) -> Any:
            return function(*self.bundled(arguments))

        called.__signature__ = self._signature
        return called


def _autograd(name: str, forward: Callable[..., Any], backward: Callable[..., Any], **others: Callable) -> Callable:
    methods = {"forward": forward, "backward": backward, **others}
    return type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()}).apply


def _padded(gradient: Callable[..., Any], count: int) -> Callable[..., tuple]:
    """`gradient`, followed by None for the inputs that it leaves out."""
    rest = (None,) * count

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        found = gradient(ctx, *gradients)
        found = found if isinstance(found, tuple) else (found,)
        return (*found, *rest[len(found) :])

    return backward


def traces(tensor: Tensor) -> bool:
    """Whether a call with `tensor` is traced."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )
