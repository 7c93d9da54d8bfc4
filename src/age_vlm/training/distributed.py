"""Several processes that are one run, as `accelerate launch` starts them: one of them writes, and they fail as one.

Of a process that was started alone, all of this asks nothing: no process group is made.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from transformers import TrainingArguments, logging

from ..errors import UserError


T = TypeVar("T")

# What a launcher tells a process about the others, and about how the model is shared among them.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


class EndedElsewhere(SystemExit):
    """Ends a process because another one failed, which says why: one error is told once."""

    def __init__(self):
        super().__init__(2)


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return process_count() == 1 or int(os.environ.get("RANK", 0)) == 0


def engine() -> str:
    """What the processes share the work by: `DDP`, `FSDP`, or `DeepSpeed ZeRO-` with its stage."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "FSDP"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return f"DeepSpeed ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '?')}"
    return "DDP"


def keep_to_one_gpu(args: TrainingArguments) -> None:
    """On several GPUs a process without others would cut batches up with `DataParallel`: there is no setting against it."""
    args._n_gpu = min(args.n_gpu, 1)


def join() -> None:
    """Connects this process with the others of its run, if there are any.

    Raises:
        UserError: one sentence, for FSDP or DeepSpeed on processors: accelerate would quietly do something else.
    """
    if process_count() == 1:
        return
    # One process may measure for long while the others wait; if it fails, the launcher ends them.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    if not is_main():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
    if state.distributed_type == DistributedType.MULTI_CPU and engine() != "DDP":
        state.wait_for_everyone()  # one that ended now would break the connection of one that is still to be made
        if not is_main():
            raise EndedElsewhere
        raise UserError(f"accelerate: got {engine()} on processors, expected DDP: it shards on GPUs only.")


def leave() -> None:
    """Parts from the other processes, at the end of a run that went well."""
    if process_count() > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def from_main(function: Callable[..., T], *arguments) -> T:
    """`function(*arguments)`, called in the main process; what it returns, which can be pickled, in all of them.

    Raises:
        EndedElsewhere: in the others, where the main process raised something.
    """
    if process_count() == 1:
        return function(*arguments)
    join()
    told, failure = [None, False], None
    if is_main():
        try:
            told[0] = function(*arguments)
        except Exception as error:
            told[1], failure = True, error
    value, failed = broadcast_object_list(told)
    if failure is not None:
        raise failure
    if failed:
        raise EndedElsewhere
    return value


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes run: where it raises in any of them all end, and the first of these tells why."""
    if process_count() == 1:
        yield
        return
    join()
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = gather_object([failure is not None])
    if any(failed):
        if failed.index(True) != PartialState().process_index:
            raise EndedElsewhere
        raise failure


@contextmanager
def alone() -> Iterator[None]:
    """A block in which this process is no part of a launched run: a trainer in it neither shares nor shards."""
    if process_count() == 1:
        yield
        return
    launched = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    AcceleratorState._reset_state(reset_partial_state=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would wonder about the process group
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        os.environ.update(launched)
        AcceleratorState._reset_state(reset_partial_state=True)
        join()
