"""A second device without one: tensors that say they lie there, compute on the CPU, and refuse to meet the CPU's.

What CUDA would refuse is refused: an operation on tensors of both devices, but for scalars of the CPU, for indices, and
for copies. Everything else gives the very numbers that the CPU gives, so a run there must end as one on the CPU does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE_NAME = "second"
DEVICE = torch.device("privateuseone", 0)
"""PyTorch's name for a device that somebody else brings."""
BOTH = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXED = {
    torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl_.default, torch.ops.aten._unsafe_index.Tensor,
}  # fmt: skip
"""Operations that take indices from the CPU, their second argument."""


class Far(Tensor):
    """A tensor of the second device; `held` is what it holds, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Far:
        made: Far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        return made

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Computed(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    far = [value for value in tensors if isinstance(value, Far)]
    if far:
        _refuse_both(func, args, kwargs)
    wanted = kwargs.get("device")
    there = bool(far) if wanted is None else torch.device(wanted).type == DEVICE.type
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], Far)
    given = {id(value.held): value for value in far}
    args, kwargs = pytree.tree_map(lambda value: value.held if isinstance(value, Far) else value, (args, kwargs))
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*args, **kwargs)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or not there:
            return value
        return given[id(value)] if id(value) in given else Far(value)

    return pytree.tree_map(wrapped, out)


def _refuse_both(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if func in BOTH:
        return
    if func in INDEXED:
        args = (args[0], *args[2:])
    near = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor) and not isinstance(v, Far)]
    if any(value.dim() for value in near):
        raise RuntimeError(f"{func} on tensors of two devices, {[tuple(value.shape) for value in near]} on the CPU")


@functools.cache
def _registered() -> torch.library.Library:
    """PyTorch knows the device, and how `torch.tensor` makes a tensor there."""
    _setup_privateuseone_for_python_backend(DEVICE_NAME)
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> Far:
        return Far(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        held = [value.held if isinstance(value, Far) else value for value in (source, target)]
        held[1].copy_(held[0])
        return target

    library.impl("empty_strided", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


@contextmanager
def second_device() -> Iterator[torch.device]:
    """The device, for the length of a block."""
    _registered()
    with _Computed():
        yield DEVICE
