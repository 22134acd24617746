"""Several processes that train one model together, as `torchrun` starts them: who is who, and what they tell each other.

Every process holds the whole model and takes its rows of each batch. What comes out is what one process computes of the
whole batch, up to rounding: gradients are means over the processes, batch norms see the whole batch (`CompiledView`), and
whatever is drawn for each image is drawn for all of them and cut.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from edgeguard.errors import InputError
from edgeguard.quant.model import QuantizedModel

TIMEOUT = timedelta(days=1)
"""How long processes wait for one that measures or compiles. A process that died is noticed by torchrun, at once."""

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What torchrun tells every process in its environment."""


@dataclass(frozen=True)
class Processes:
    """This process among those of a run. rank: its number in [0, world). local_rank: its number on its own machine.

    All methods are called by every process at the same place, with arguments of equal shapes where not said otherwise.
    With a world of 1 they ask nobody.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, measures and talks."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """Which images of a batch are this process's."""
        return slice(self.rank, None, self.world)

    def check(self, batch_size: int, accumulate: int) -> None:
        """Raises InputError unless every part of a batch can be dealt out evenly."""
        if self.world > 1 and batch_size % (self.world * accumulate):
            shares = f"{self.world} processes" + (f" x {accumulate} parts" if accumulate > 1 else "")
            raise InputError(
                f"a batch of {batch_size} images cannot be dealt out evenly to {shares}; "
                f"choose a --batch-size that is a multiple of {self.world * accumulate}"
            )

    def any(self, flag: bool) -> bool:
        """Whether it is so for any of the processes."""
        if self.world == 1:
            return flag
        count = torch.tensor([int(flag)])
        dist.all_reduce(count)
        return bool(count.item())

    def wait(self) -> None:
        """Until all processes have come here."""
        self.any(False)

    def mean(self, values: Sequence[float]) -> list[float]:
        """Of each value over the processes that have it: NaN stands for none."""
        if self.world == 1:
            return list(values)
        own = torch.tensor([values], dtype=torch.float64)
        table = torch.cat([torch.nan_to_num(own), (~own.isnan()).double()])
        dist.all_reduce(table)
        return [float(entry) for entry in table[0] / table[1]]

    def averaged(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, a new tensor."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / self.world

    def gathered(self, values: NDArray[Any]) -> NDArray[Any]:
        """The rows of all processes in the order of the batch, whose rows `rows` are `values`.

        values: (n, ...), n of each process as `rows` of a number of images makes it: it may differ by one.
        """
        if self.world == 1:
            return values
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(values)]))
        lengths = [int(count) for count in counts]
        padded = np.zeros((max(lengths), *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        own = torch.from_numpy(padded.reshape(-1).view(np.uint8))  # gloo does not know every type
        parts = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(parts, own)
        out = np.empty((sum(lengths), *values.shape[1:]), values.dtype)
        for rank, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            out[rank :: self.world] = part.numpy().view(values.dtype).reshape(padded.shape)[:length]
        return out

    def copied(self, module: nn.Module, device: torch.device) -> None:
        """Give every process the parameters and buffers of the first."""
        if self.world == 1:
            return
        for tensor in module.state_dict().values():
            sent = tensor.detach().to(device, copy=True).contiguous()
            dist.broadcast(sent, 0)
            tensor.detach().copy_(sent)


ALONE = Processes()
"""One process, which asks nobody."""


class _Passed(nn.Module):
    """Hands a loss on, and holds the parameters it was computed from. Buffers are equal everywhere without being sent."""

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        self.learned = nn.ParameterList(model.parameters())

    def forward(self, loss: Tensor) -> Tensor:
        return loss


def data_parallel(model: QuantizedModel) -> DistributedDataParallel:
    """What a loss goes through before its backward pass, so that gradients arrive as means over all processes.

    The loss itself is what goes through it, not the images: all that it was computed from takes part, be it several passes
    or gradients of gradients. Batch norms of other widths get no gradient at all, as in one process. Batch statistics are
    not its business.
    """
    return DistributedDataParallel(_Passed(model), find_unused_parameters=True)


def forbid_local_statistics(model: QuantizedModel) -> None:
    """Let batch norms refuse to take statistics by themselves: they would be of one process's images alone.

    Raises, when it happens:
        InputError: a defence passes the model itself in training mode instead of `Trainer.forward`.
    """

    def refuse(norm: nn.Module, _: Any) -> None:
        if norm.training:
            raise InputError(
                "this method passes the model with batch statistics that are not shared; train it with one process"
            )

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(refuse)


@contextmanager
def joined() -> Iterator[Processes]:
    """Meet the other processes that torchrun started; without torchrun this one is alone and nothing is set up.

    Messages go through gloo on the CPU and NCCL on CUDA. A process that fails leaves without a word: torchrun ends the rest.

    Raises:
        InputError: the environment holds only a part of what torchrun writes, or no numbers.
    """
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not given:
        yield ALONE
        return
    try:
        rank, world, local_rank = (int(given[name]) for name in VARIABLES)
    except (KeyError, ValueError) as exc:
        raise InputError(
            f"{', '.join(VARIABLES)} must be whole numbers, as torchrun sets them, got {given}; "
            "unset them, or start with torchrun"
        ) from exc
    if world == 1:
        yield ALONE
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
    yield Processes(rank, world, local_rank)
    # A trainer is a cycle of references, which holds the group: the group's threads would live on until the interpreter
    # ends, and a thread that then lets go of a tensor aborts the process.
    gc.collect()
    dist.destroy_process_group()
