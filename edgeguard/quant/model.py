"""`quantize_model`: a float model becomes one Brevitas model for every width."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from edgeguard.errors import ExportError
from edgeguard.quant.batchnorm import SwitchableBatchNorm2d
from edgeguard.quant.place import Placement, place
from edgeguard.quant.prepare import unify
from edgeguard.quant.quantizers import (
    ActivationQuantizer,
    GradientNoise,
    InputQuantizer,
    ScaleGroup,
    WeightQuantizer,
    quant_identity,
    quant_layer,
)
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import Width, WidthControl

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Brevitas warns about an optional package that is not used here
    from brevitas.graph.quantize import preprocess_for_quantize


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of pixels scaled to [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class QuantizedModel(nn.Module):
    """A traced Brevitas model whose width is switched in one write.

    forward: (N, 3, H, W) float32 pixel values 0 to 255 -> (N, classes) float32 logits, at `control.current`.
    """

    def __init__(self, body: fx.GraphModule, scheme: QuantScheme, control: WidthControl, groups: list[ScaleGroup],
                 noise: GradientNoise, normalization: Normalization) -> None:  # fmt: skip
        super().__init__()
        self.scheme, self.control = scheme, control
        self.input_quantizer = InputQuantizer(normalization.mean, normalization.std, scheme.boundary_bits)
        self.body = body
        self.scales = nn.ModuleList(groups)
        self.noise = noise

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.body(self.input_quantizer(pixels))
        return logits

    @contextmanager
    def at(self, width: Width) -> Iterator[QuantizedModel]:
        """The model at a width, for the length of a block."""
        with self.control.at(width):
            yield self

    def groups(self) -> list[ScaleGroup]:
        """The learned scales, in the order of their first quantizer."""
        return [group for group in self.scales if isinstance(group, ScaleGroup)]

    def activation_quantizers(self) -> dict[str, ActivationQuantizer]:
        """Activation quantizers by the name of their layer, in execution order."""
        found = {}
        for node in self.body.graph.nodes:
            if node.op == "call_module":
                quantizer = activation_quantizer(self.body.get_submodule(str(node.target)))
                if quantizer is not None:
                    found[str(node.target)] = quantizer
        return found

    def members(self, group: ScaleGroup) -> list[ActivationQuantizer]:
        """The quantizers that share a group's learned scale."""
        return [q for q in self.activation_quantizers().values() if q.group is group]

    def enable_quantization(self, enabled: bool) -> None:
        """Switch activation and input quantization (weights stay quantized only when enabled); used by calibration."""
        self.input_quantizer.enabled = enabled
        for quantizer in self.activation_quantizers().values():
            quantizer.enabled = enabled
        for module in self.body.modules():
            proxy: Any = getattr(module, "weight_quant", None)
            if proxy is not None:
                proxy.disable_quant = not enabled


def activation_quantizer(layer: nn.Module) -> ActivationQuantizer | None:
    """The own quantizer inside a Brevitas activation layer, or None."""
    proxy = getattr(getattr(layer, "act_quant", None), "fused_activation_quant_proxy", None)
    inner = getattr(proxy, "tensor_quant", None)
    return inner if isinstance(inner, ActivationQuantizer) else None


def weight_quantizer(layer: nn.Module) -> WeightQuantizer | None:
    """The own quantizer inside a Brevitas compute layer, or None."""
    inner = getattr(getattr(layer, "weight_quant", None), "tensor_quant", None)
    return inner if isinstance(inner, WeightQuantizer) else None


def quantize_model(model: nn.Module, scheme: QuantScheme, normalization: Normalization) -> QuantizedModel:
    """Trace a float model and put own quantizers into it. The caller's model is not changed.

    The float model takes normalized images; the result takes pixels. Batch norms stay live, one per width. Scales are not
    set yet: run `edgeguard.calib.calibrate` next.

    Raises:
        ExportError: the model cannot be traced, or a layer has no integer form (which one, and why).
    """
    control = WidthControl(scheme.widths)
    noise = GradientNoise()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="brevitas")
            body = preprocess_for_quantize(copy.deepcopy(model), relu6_to_relu=False, merge_bn=False)
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as exc:
        raise ExportError(f"the model cannot be traced by torch.fx: {exc}") from exc
    unify(body)
    placement = place(body)
    groups = {number: ScaleGroup(len(scheme.widths)) for number in sorted({p.group for p in placement.points.values()})}
    for index, point in enumerate(placement.points.values()):
        quantizer = ActivationQuantizer(
            control, scheme, groups[point.group], noise, role=point.role, signed=point.signed, ceiling=point.ceiling,
            wide=point.wide, tie=point.tie,
        )  # fmt: skip
        _insert_after(body, point.tail, f"quant_{index}_{point.head.name}", quant_identity(quantizer))
        if point.relu is not None:
            point.relu.replace_all_uses_with(point.relu.all_input_nodes[0])
            body.graph.erase_node(point.relu)
    _replace_layers(body, placement, scheme, control)
    body.graph.lint()
    body.delete_all_unused_submodules()
    body.recompile()
    return QuantizedModel(body, scheme, control, list(groups.values()), noise, normalization)


def _insert_after(body: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> None:
    body.add_submodule(name, module)
    with body.graph.inserting_after(node):
        call = body.graph.call_module(name, (node,))
    node.replace_all_uses_with(call)
    call.update_arg(0, node)


def _replace_layers(body: fx.GraphModule, placement: Placement, scheme: QuantScheme, control: WidthControl) -> None:
    for node, kind in placement.kinds.items():
        if kind not in ("conv", "linear", "batchnorm"):
            continue
        parent, _, leaf = str(node.target).rpartition(".")
        old = body.get_submodule(str(node.target))
        new: nn.Module
        if isinstance(old, nn.BatchNorm2d):
            if old.running_mean is None:
                raise ExportError(
                    f"layer {node.name!r}: a batch norm without running statistics cannot be folded; track them"
                )
            new = SwitchableBatchNorm2d(old, control)
        elif isinstance(old, nn.Conv2d | nn.Linear):
            if isinstance(old, nn.Conv2d) and old.padding_mode != "zeros":
                raise ExportError(f"layer {node.name!r}: padding mode {old.padding_mode!r} has no integer form; pad with zeros")
            role = "boundary" if node in (placement.first, placement.last) else "inner"
            new = quant_layer(old, WeightQuantizer(control, scheme, role))
        else:
            raise ExportError(f"layer {node.name!r} is used twice; give each use a module of its own")
        setattr(body.get_submodule(parent), leaf, new)
