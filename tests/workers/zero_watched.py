"""``run_dense.py`` that tells how many weights lie divided between steps, with ZeRO-3."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from run_dense import main
from src.retrieval.training.trainer import RetrievalTrainer
from src.utils.cli import run


def tell() -> None:
    """Print it after each batch of the first step."""
    make_step = RetrievalTrainer.training_step

    def step_and_tell(self: RetrievalTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = make_step(self, *args, **kwargs)
        if self.state.global_step == 0:
            weights = list(self.model.parameters())
            divided = sum(weight.ds_status == ZeroParamStatus.NOT_AVAILABLE for weight in weights)
            print(f"ZeRO-3 has divided {divided} of {len(weights)} weights")
        return loss

    RetrievalTrainer.training_step = step_and_tell  # type: ignore[method-assign]


if __name__ == "__main__":
    tell()
    run(main)
