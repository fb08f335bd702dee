"""``run_dense.py`` with FSDP on CPU processes, which accelerate would leave without it.

That choice and all that follows is what runs on GPUs too: transformers' and accelerate's code and ours, over gloo.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from run_dense import main
from src.cli import run
from src.retrieval.args import RetrievalTrainingArgs


def allow_cpu() -> None:
    """Lift the two checks that stand before FSDP on a CPU: ours and accelerate's."""
    check_engine, make_state = RetrievalTrainingArgs._check_engine, AcceleratorState.__init__

    def check_as_on_gpu(self: RetrievalTrainingArgs) -> None:
        self.use_cpu = False
        check_engine(self)
        self.use_cpu = True

    def make_state_as_on_gpu(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        if fsdp_plugin is not None:
            # The settings have made it already, and found processes without GPUs.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    RetrievalTrainingArgs._check_engine = check_as_on_gpu  # type: ignore[method-assign]
    AcceleratorState.__init__ = make_state_as_on_gpu


if __name__ == "__main__":
    allow_cpu()
    run(main)
