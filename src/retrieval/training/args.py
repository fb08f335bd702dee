"""The flags of training (flags.py) with their checks, as transformers' Trainer takes them."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, cast

import torch
from accelerate.utils import GradientAccumulationPlugin
from torch._dynamo import list_backends
from torch._inductor import list_mode_options
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.optimization import GreedyLR
from transformers.trainer_pt_utils import AcceleratorConfig

from src.retrieval.data.tasks import SELECT_NEGATIVE, SELECT_POSITIVE
from src.retrieval.models.choices import ALL_LINEAR
from src.retrieval.models.trainable import Compilation
from src.retrieval.training import sharding
from src.retrieval.training.flags import MOST_KEYS, REPORTERS, WITHOUT_EFFECT, TrainingFlags
from src.utils import distributed
from src.utils.errors import UserError, first_line
from src.utils.flags import check_choice, refuse

#: Flags whose fields are filled in or replaced when settings are made, by other flags or by what the machine has.
INFERRED = (
    *("use_cpu", "fp16", "warmup_steps", "eval_strategy", "eval_steps", "eval_on_start", "gradient_checkpointing"),
    *("activation_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    *("length_split_tokens", "disable_tqdm", "metric_for_best_model", "greater_is_better"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
)
#: Backends of torch.compile that take a mode; the second, without effect.
BACKENDS_WITH_MODES = ("inductor", "eager")
#: What flags must be: in words, as a test, and the names. None passes; a NaN is in no range.
RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "above 0": (
        lambda value: value > 0,
        "train_group_size positives_per_query cos_temperature teacher_temperature student_temperature max_sample_num "
        "early_exit_steps per_device_train_batch_size gradient_accumulation_steps lora_r lora_alpha save_steps "
        "logging_steps eval_steps early_stopping_patience",
    ),
    "0 or more": (
        lambda value: value >= 0,
        "contrastive_weight distill_weight save_total_limit eval_delay early_stopping_threshold",
    ),
    "0 (off) or more": (lambda value: value >= 0, "grad_cache_chunk_size length_split_tokens"),
    "1 or more": (lambda value: value >= 1, "ddp_bucket_cap_mb dataloader_prefetch_factor"),
    "above 0, or -1 to train --num_train_epochs": (lambda value: value > 0 or value == -1, "max_steps"),
    "a number of 0 or more": (
        lambda value: 0 <= value < math.inf,
        "learning_rate weight_decay adam_epsilon max_grad_norm",
    ),
    "from 0 to below 1": (lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 dropout lora_dropout"),
    "a share of the steps, from 0 to 1": (lambda value: 0 <= value <= 1, "warmup_ratio"),
    "a number": (math.isfinite, "mask_margin"),
    f"{MOST_KEYS} at most": (lambda value: value <= MOST_KEYS, "train_group_size"),
}
#: Flags that take one of a few words.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "eval_method": ("retrieval", "rerank"),
    "inbatch_same_dataset": ("epoch", "epoch-static", "epoch-random", "random"),
    "select_positive": SELECT_POSITIVE,
    "select_negative": SELECT_NEGATIVE,
    "evaluation_strategy": ("no", "steps", "epoch"),
    "eval_strategy": ("no", "steps", "epoch"),
}
#: What --gradient_checkpointing_kwargs may set.
RECOMPUTING = ("use_reentrant", "preserve_rng_state", "early_stop", "debug")
#: Schedules whose steps need a metric.
BY_METRIC = (torch.optim.lr_scheduler.ReduceLROnPlateau, GreedyLR)


@dataclass
class RetrievalTrainingArgs(TrainingFlags, TrainingArguments):  # type: ignore[misc]
    """transformers' TrainingArguments, with this toolkit's flags over them."""

    def __post_init__(self) -> None:
        self._given = {name: getattr(self, name) for name in INFERRED}
        #: How the layers are compiled, if they are. The Trainer would compile all around them, too.
        self.compilation = Compilation.from_flags(
            self.torch_compile, self.torch_compile_backend, self.torch_compile_mode
        )
        self._check_values()
        # Without this a torchrun on a machine without accelerator trains unconnected copies of the model.
        self.use_cpu = self.use_cpu or self.no_cuda or not torch.cuda.is_available()
        if self.fp16 and (self.bf16 or self.use_cpu):
            self.fp16 = False
        self._check_json()
        self._check_engine()
        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to:
            check_choice("report_to", name, ("none", "all", *REPORTERS))
            if name in REPORTERS and name not in get_available_reporting_integrations():
                raise UserError(f"--report_to {name} needs a package that is not installed: pip install {name}")
        if self.gradient_checkpointing:
            self.activation_checkpointing, self.gradient_checkpointing = True, None
        if self.disable_tqdm is None:
            # In a file a bar is one endless line.
            self.disable_tqdm = not sys.stderr.isatty()
        if self.warmup_steps is None:
            # transformers takes 1 for a step, not for all.
            self.warmup_steps = min(self.warmup_ratio, math.nextafter(1, 0))
        if self.eval_strategy is None:
            self.eval_strategy = self.evaluation_strategy
        if self.eval_steps is None:
            self.eval_steps = self.save_steps
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        with self._naming(*self._VALID_DICT_FIELDS):
            super().__post_init__()
            configured = cast("AcceleratorConfig", self.accelerator_config)
            GradientAccumulationPlugin(num_steps=1, **(configured.gradient_accumulation_kwargs or {}))
        self._try_out()
        sharding.load_unsharded()
        if self.fsdp_plugin_args is not None and (self.fp16 or self.bf16):
            self.fsdp_plugin_args["mixed_precision_policy"] = sharding.half_precision(
                torch.float16 if self.fp16 else torch.bfloat16
            )
        # `python run_dense.py` on a machine with several GPUs uses the first; torchrun uses all.
        self._n_gpu = min(self._n_gpu, 1)

    def _check_values(self) -> None:
        """Refuse values that nobody could mean, and flags that do not go together."""
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for words, (is_valid, names) in RANGES.items():
            for name in names.split():
                if (value := getattr(self, name)) is not None and not is_valid(value):
                    raise UserError(f"--{name} must be {words}, found {value}")
        for name, value in WITHOUT_EFFECT.items():
            if getattr(self, name) != value:
                raise UserError(f"--{name} {getattr(self, name)} would have no effect on this training: leave it out")
        dims = self.matryoshka_dims or []
        adapters = self.lora_alpha is not None or self.lora_dropout or self.lora_target_modules != [ALL_LINEAR]
        refuse(
            {
                f"--matryoshka_dims {' '.join(map(str, dims))}: each only once, and above 0": (
                    len(set(dims)) < len(dims) or min(dims, default=1) < 1
                ),
                f"--mask_margin {self.mask_margin} is for keys of other queries, which --in_batch False leaves out: "
                "give one of them": self.mask_margin is not None and not self.in_batch,
                f"--positives_per_query {self.positives_per_query} must be below --train_group_size "
                f"{self.train_group_size}: a query is compared with a negative at least": (
                    1 < self.positives_per_query >= self.train_group_size
                ),
                "--lora_alpha, --lora_dropout and --lora_target_modules need --lora_r, the adapters' rank": (
                    adapters and self.lora_r is None
                ),
                "--load_in_4bit holds weights that do not train: it needs --lora_r, the rank of adapters that do": (
                    self.load_in_4bit and self.lora_r is None
                ),
                "--load_in_4bit needs a GPU: leave it out": (
                    self.load_in_4bit and (self.use_cpu or self.no_cuda or not torch.cuda.is_available())
                ),
                "--load_in_4bit needs bitsandbytes: pip install -e '.[qlora]'": (
                    self.load_in_4bit and find_spec("bitsandbytes") is None
                ),
                f"--num_train_epochs {self.num_train_epochs}: nothing would be trained, give more than 0": (
                    self.max_steps <= 0 and not self.num_train_epochs > 0
                ),
                f"--early_stopping_threshold {self.early_stopping_threshold} needs --early_stopping_patience": (
                    self.early_stopping_threshold and self.early_stopping_patience is None
                ),
                "--remove_unused_columns must stay False: the collator needs every column": self.remove_unused_columns,
                "--accelerator_config: use_configured_state needs a state that nobody made: leave it out": (
                    "use_configured_state" in str(self.accelerator_config)
                ),
                f"--grad_cache_chunk_size {self.grad_cache_chunk_size} does not work with --torch_compile, whose "
                "dropout is not the same in both passes: leave one of them out": (
                    self.grad_cache_chunk_size and self.compilation
                ),
                f"--torch_compile_{'mode' if self.torch_compile_mode else 'backend'} "
                f"{self.torch_compile_mode or self.torch_compile_backend} does not work with "
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}, since a "
                "CUDA graph writes over the gradients of the one before: leave one of them out": (
                    self.compilation and self.compilation.uses_graphs and self.gradient_accumulation_steps > 1
                ),
            }
        )
        if self.compilation is not None:
            check_choice("torch_compile_backend", self.compilation.backend, (*list_backends(), *BACKENDS_WITH_MODES))
            check_choice("torch_compile_mode", self.torch_compile_mode, tuple(list_mode_options()))
            if self.torch_compile_mode and self.compilation.backend not in BACKENDS_WITH_MODES:
                raise UserError(
                    f"--torch_compile_mode {self.torch_compile_mode} is for the backend inductor, not for "
                    f"--torch_compile_backend {self.torch_compile_backend}: leave one of them out"
                )

    def to_dict(self) -> dict[str, Any]:
        """All settings, but for secret tokens, such that a file of them can be given as --config.

        What was inferred is left as it was given, so that further flags mean what they meant in the first run, also on
        another machine.
        """
        settings = {**super().to_dict(), **self._given}
        return {name: value for name, value in settings.items() if not name.endswith("_token")}

    @property
    def engine(self) -> str | None:
        """What trains in place of DistributedDataParallel: ``deepspeed``, ``fsdp`` or None."""
        return "deepspeed" if self.deepspeed else "fsdp" if self.fsdp else None

    @property
    def sharded(self) -> int:
        """What is sharded over processes: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too."""
        if self.fsdp:
            return 3
        return sharding.zero_stage(self.deepspeed) if self.deepspeed else 0

    @property
    def optimizer_layout(self) -> str:
        """See `sharding.optimizer_layout`."""
        stage = sharding.zero_stage(self.deepspeed) if self.deepspeed else None
        return sharding.optimizer_layout(stage, bool(self.fsdp), self.world_size)

    @cached_property
    def _setup_devices(self) -> torch.device:
        # On a CPU accelerate would leave --ddp_timeout out.
        if self.use_cpu and self.ddp_backend in (None, "gloo"):
            distributed.init_process_group(True, self.ddp_timeout)
        return super()._setup_devices

    def _check_json(self) -> None:
        """Refuse settings given as JSON that are none, or hold what nobody reads."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and (value.startswith("{") or name.endswith("_kwargs") or not value.strip()):
                value = sharding.parse_json(value, name)
            for key, setting in (value or {}).items() if name.endswith("checkpointing_kwargs") else ():
                if key not in RECOMPUTING or setting not in (True, False):
                    raise UserError(
                        f"--{name}: {key!r} is {setting!r}: give true or false for one of {', '.join(RECOMPUTING)}"
                    )

    @contextlib.contextmanager
    def _naming(self, *names: str) -> Iterator[None]:
        """Say in one line what a library has against the values of flags: which it takes is known to it alone."""
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, ImportError) as error:
            if isinstance(error, UserError):
                raise
            values = {name: getattr(self, name) for name in names}
            flags = [f"--{name} {getattr(value, 'value', value)}" for name, value in values.items() if value]
            raise UserError(": ".join([*filter(None, [" with ".join(flags)]), first_line(error)])) from error

    def _try_out(self) -> None:
        """Make the schedule, the optimizer and a loader of batches, as the Trainer does once the model is loaded."""
        weight = torch.zeros(1, requires_grad=True)
        with self._naming("lr_scheduler_type", "lr_scheduler_kwargs"):
            optimizer = torch.optim.SGD([weight], 1.0)
            settings = cast("dict[str, Any] | None", self.lr_scheduler_kwargs)
            schedule = get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, settings or None)
            for _ in range(0 if isinstance(schedule, BY_METRIC) else 10):
                optimizer.step()
                schedule.step()
        with self._naming("optim", "optim_args"):
            self._try_optimizer(weight)
        with self._naming("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"):
            DataLoader(
                TensorDataset(weight),
                num_workers=self.dataloader_num_workers,
                prefetch_factor=self.dataloader_prefetch_factor,
                persistent_workers=self.dataloader_persistent_workers,
            )

    def _try_optimizer(self, weight: torch.Tensor) -> None:
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self)
        except ValueError as error:
            # Some look into the model, which is not there yet.
            if "model" in str(error):
                return
            raise
        if kind.__module__.startswith("torch."):
            kind([weight], **options)
        plain = copy.copy(self)
        plain.optim_args = None
        if self.optim_args and options == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
            raise ValueError("it has no settings of these names, leave them out")

    def _check_engine(self) -> None:
        """Refuse engines that could not do their work, and what does not work with them."""
        refuse(
            {
                "--fsdp_config has settings of --fsdp: give that flag too": self.fsdp_config and not self.fsdp,
                "--deepspeed and --fsdp do the same work: leave one of them out": self.deepspeed and self.fsdp,
            }
        )
        if self.engine is None:
            return
        if self.fsdp:
            self.fsdp_config = sharding.fsdp_settings(self.fsdp_config or {}, self.fsdp)
        least = 2 if self.fsdp else 1
        refuse(
            {
                "--fsdp shards weights over GPUs only, on a CPU it would be ignored: leave it out (--deepspeed "
                "data/deepspeed/stage3.json shards them on a CPU too)": self.fsdp and self.use_cpu,
                f"--deepspeed: ZeRO stage 0 with {'--bf16' if self.bf16 else '--fp16 (the default on a GPU)'} keeps no "
                "fp32 weights that could be saved: use stage 1 (data/deepspeed/stage1.json), leave out --deepspeed "
                "(plain torchrun), or train in fp32 (--fp16 False and no --bf16)": (
                    self.sharded == 0 and (self.fp16 or self.bf16)
                ),
                f"--grad_cache_chunk_size {self.grad_cache_chunk_size} works with one process or plain torchrun, where "
                "each process has all weights: leave out --deepspeed and --fsdp, or set it to 0": (
                    self.grad_cache_chunk_size
                ),
                "--save_only_model does not work with --fsdp, which saves the parts of all processes: leave it out": (
                    self.save_only_model and self.fsdp
                ),
                "--load_in_4bit does not work where weights are divided over processes (ZeRO-3, FSDP): leave it out, "
                "or take data/deepspeed/stage2.json": self.load_in_4bit and self.sharded == 3,
                f"--save_only_model leaves nothing that --load_best_model_at_end could load with --{self.engine}": (
                    self.save_only_model and self.load_best_model_at_end
                ),
                f"--{self.engine} needs a launcher that starts {least} or more processes: torchrun --nproc_per_node N "
                "…": not distributed.is_launched() or distributed.launched_processes() < least,
                f"--length_split_tokens {self.length_split_tokens}: where weights are sharded over processes, all must "
                "call the model equally often: set it to 0, or leave it out": (
                    self.sharded == 3 and self.length_split_tokens
                ),
            }
        )
        if self.sharded == 3:
            self.length_split_tokens = 0
