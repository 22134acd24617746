"""Batch norm with statistics and affine parameters of its own at every width (switchable, Yu et al. 2019)."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from edgeguard.quant.width import WidthControl


class SwitchableBatchNorm2d(nn.Module):
    """One `BatchNorm2d` per width, all starting as copies of the given one; the current width's is used."""

    control: WidthControl

    def __init__(self, norm: nn.BatchNorm2d, control: WidthControl) -> None:
        super().__init__()
        self.__dict__["control"] = control
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in control.widths)

    def current(self) -> nn.BatchNorm2d:
        norm = self.norms[self.control.index]
        if not isinstance(norm, nn.BatchNorm2d):
            raise TypeError(f"expected a BatchNorm2d, found {type(norm).__name__}")
        return norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norms[self.control.index](x)
        return out
