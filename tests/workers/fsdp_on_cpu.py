"""``run_dense.py`` with FSDP on CPU processes, which accelerate would leave without it.

That choice and all that follows is what runs on GPUs too: transformers' and accelerate's code and ours, over gloo.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from run_dense import main
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.trainer import RetrievalTrainer
from src.utils.cli import run


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


def tell() -> None:
    """Print at the first step of a run in what precision FSDP works, and which modules it divides one by one."""
    make_step = RetrievalTrainer.training_step

    def step_and_tell(self: RetrievalTrainer, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step:
            return make_step(self, model, *args, **kwargs)
        parts = [type(part).__name__.removeprefix("FSDP") for part in model.modules() if isinstance(part, FSDPModule)]

        def tell_outputs(module: nn.Module, inputs: Any, outputs: Any) -> None:
            print(f"FSDP gave {outputs[0][0].dtype} from {', '.join(sorted(parts))}")

        print(self.accelerator.state.fsdp_plugin.mixed_precision_policy)
        # Called after the one by which FSDP rounds outputs.
        hook = model.register_forward_hook(tell_outputs)
        loss = make_step(self, model, *args, **kwargs)
        hook.remove()
        return loss

    RetrievalTrainer.training_step = step_and_tell  # type: ignore[method-assign]


if __name__ == "__main__":
    allow_cpu()
    tell()
    run(main)
