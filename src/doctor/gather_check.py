"""Gather the ranks of all processes: what each does when `python -m src.doctor --processes N` starts them.

torchrun --nproc_per_node 2 -m src.doctor.gather_check
"""

from __future__ import annotations

from src.utils import distributed
from src.utils.cli import run
from src.utils.errors import UserError


def main() -> None:
    """Gather, compare, print."""
    device = distributed.init_process_group(use_cpu=False)
    gathered = distributed.all_gather_object(distributed.rank())
    if gathered != list(range(distributed.launched_processes())):
        raise UserError(f"{distributed.launched_processes()} processes gathered the ranks {gathered}")
    if distributed.is_main():
        print(f"{len(gathered)} processes gathered each other's tensors over {device.type}", flush=True)


if __name__ == "__main__":
    run(main)
