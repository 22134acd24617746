"""The twin: a torch module that computes the integers of an `IntegerGraph` and has straight-through gradients.

Integers travel as float32. Forward, a product runs in float32 only where a bound on its accumulator proves that every
partial sum is an exact integer, and only on the CPU: elsewhere a library may choose TF32 or Winograd kernels, so the
product runs in float64. Backward, rounding is the identity and a clamp passes the gradient inside its range, limits
included; gradients are plain float32.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.backends import nnpack

from edgeguard import graph as g
from edgeguard.errors import EngineError, InputError
from edgeguard.graph import IntegerGraph
from edgeguard.targets import BaseEngine
from edgeguard.targets.twin_steps import step_of


class Twin(nn.Module):
    """A differentiable copy of an integer graph, on the CPU or a CUDA device (`.to(device)`).

    Same integers as the reference, hence the same logits bit for bit. It has no trainable parameters.
    """

    def __init__(self, graph: IntegerGraph) -> None:
        super().__init__()
        self.graph = graph
        self.steps = nn.ModuleList(step_of(graph, node) for node in graph.nodes)
        self._last_use = {name: index for index, node in enumerate(graph.nodes) for name in g.node_inputs(node)}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) float32 of images (N, 3, H, W), pixel values 0 to 255 as uint8 or float32.

        Gradients flow to float images. Other than whole pixel values are allowed and rounded with the first quantizer.

        Raises:
            InputError: images of another shape or type.
        """
        return self.run(images)[self.graph.output]

    def run(self, images: Tensor, keep: Collection[str] = ()) -> dict[str, Tensor]:
        """Like `forward`, with the intermediate tensors named in `keep` as well, as integers in float32.

        Accumulators of 2**24 and more appear rounded to float32, as the next step reads them.
        """
        unknown = set(keep) - self.graph.tensors.keys() - {self.graph.output}
        if unknown:
            raise InputError(f"the graph has no tensor {sorted(unknown)}")
        if images.dtype not in (torch.uint8, torch.float32) or tuple(images.shape[1:]) != self.graph.input_shape:
            raise InputError(
                f"the twin got images {tuple(images.shape)} {images.dtype}, "
                f"expected (N, {', '.join(map(str, self.graph.input_shape))}) uint8 or float32"
            )
        values: dict[str, Tensor] = {self.graph.input: images.float()}
        # Neither reduced precision nor Winograd kernels, whatever the caller has switched on.
        with torch.autocast(images.device.type, enabled=False), nnpack.flags(enabled=False):
            for index, (node, step) in enumerate(zip(self.graph.nodes, self.steps, strict=True)):
                names = g.node_inputs(node)
                values[node.output] = step(*(values[name] for name in names))
                for name in names:
                    if self._last_use[name] == index and name not in keep:
                        values.pop(name, None)
        return {name: value for name, value in values.items() if name in keep or name == self.graph.output}


class TwinEngine(BaseEngine):
    """The twin behind the `Engine` protocol, without gradients."""

    name = "twin"

    def __init__(self, graph: IntegerGraph, device: str = "cpu", threads: int = 0) -> None:
        super().__init__(graph.input_shape, graph.num_classes)
        self.device, self.threads = torch.device(device), threads
        try:
            self.twin = Twin(graph).to(self.device)
        except RuntimeError as exc:
            raise EngineError(f"twin: device {device!r} cannot be used: {exc}") from exc

    def _logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(self.threads or threads)
            with torch.inference_mode():
                logits: NDArray[np.float32] = self.twin(torch.tensor(images, device=self.device)).cpu().numpy()
            return logits
        except RuntimeError as exc:
            raise EngineError(f"twin: {exc}") from exc
        finally:
            torch.set_num_threads(threads)

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(), "version": torch.__version__, "provider": str(self.device),
            "threads": self.threads or torch.get_num_threads(),
        }  # fmt: skip
