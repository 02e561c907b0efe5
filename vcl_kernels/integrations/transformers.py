"""A Trainer of transformers with VCL: :class:`VCLTrainer`."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..nn.handle import VCLHandle
from ..nn.parameters import attached_betas, betas_of, plain_state_dict
from .driver import Driver, load_betas

__all__ = ["VCLTrainer"]

BETAS = "vcl_betas.safetensors"  # in the folder of a checkpoint
logger = logging.get_logger(__name__)


class VCLTrainer(Trainer):
    """``transformers.Trainer`` with the variance constancy loss.

    A subclass of Trainer gets it by ``class MyTrainer(VCLTrainer, Seq2SeqTrainer): pass``.

    While ``train`` runs, the model is attached with ``inject=True``: the gradient of VCL enters in the backward pass.
    ``compute_loss`` and the logged loss are those of the task alone. VCL is averaged over the batches whose gradients
    are added for a step, also in the last step of an epoch, which may have fewer of them. Its gradient is scaled by the
    GradScaler and clipped, as that of the loss is. Activation checkpointing works in both kinds. After ``train`` the
    model is plain again.

    Args:
        args, kwargs: of the Trainer.
        vcl: what :func:`vcl_kernels.attach` returned for the model with ``inject=True``, which stays attached; or a
            mapping with any of these names. None: the defaults.

            - ``example_input``: as for :func:`vcl_kernels.attach`. Default: two samples of ``train_dataset``, made a
              batch by ``data_collator``.
            - ``handle``: that of a model that is attached.
            - ``weight``: after the warm-up. Default: that of the handle, or 0.01.
            - ``warmup_steps``, ``decay``: the weight by optimizer steps, as for
              :func:`vcl_kernels.integrations.weight_at`.
            - ``log``: statistics of each layer, any columns of :class:`vcl_kernels.VCLMonitor`, logged with the
              training loss as ``vcl_<statistic>/<layer>``. Default: none. ``vcl_loss``, the sum over layers, is logged
              in any case.
            - ``log_every_n_steps``: optimizer steps from one measurement to the next. Default: one for each log, of the
              step before it, or with ``logging_strategy="epoch"`` of the first step of the epoch. Compiled models run
              uncompiled in these steps.
            - others of :func:`vcl_kernels.attach`: ``unit``, ``layers``, ``beta_mode`` … ``shared_beta`` is True by
              default where beta is fixed. A model that has VCL attached already takes none of them.

    ``save_model``, the Trainer's checkpoints and ``save_pretrained`` write the plain model: ``from_pretrained`` needs
    no VCL. Learned betas are not decayed. Checkpoints made during training also have betas that are learned, running or
    from the example, in a file of their own, ``vcl_betas.safetensors``, from which
    ``train(resume_from_checkpoint=…)`` goes on. A ``train`` that does not resume starts them anew. (A handle of your
    own stays attached, so that ``save_pretrained`` before and after ``train`` writes its betas with the model.)

    Raises:
        TypeError, ValueError: a wrong setting, now. When ``train`` begins: what ``attach`` raises; no example; a handle
            without ``inject``, or that was removed; ``optimizers`` that do not hold the betas; a checkpoint whose betas
            do not fit; DeepSpeed in float16, which has a scaler of its own.
    """

    def __init__(self, *args: Any, vcl: VCLHandle | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if vcl is not None and not isinstance(vcl, (VCLHandle, Mapping)):
            raise TypeError(f"vcl must be a mapping of settings or a VCLHandle; got a {type(vcl).__name__}")
        settings: dict[str, Any] = {"handle": vcl} if isinstance(vcl, VCLHandle) else dict(vcl or {})
        self._vcl_example = settings.pop("example_input", None)
        self._vcl = Driver(settings.pop("handle", None), **{str(name): value for name, value in settings.items()})
        self._vcl_metrics: dict[str, float] = {}
        self._vcl_epoch = -1
        super().__init__(*args, **kwargs)
        self._vcl_given_optimizer: bool = self.optimizer is not None

    @property
    def vcl_handle(self) -> VCLHandle | None:
        """The handle of the model, while ``train`` runs, or the one that was given."""
        return self._vcl.handle

    # The way in and out

    def _inner_training_loop(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train with VCL. The model is there, with the weights of the checkpoint; the optimizer is not yet."""
        learned = False
        model = self.model
        try:
            handle = self._vcl_attach(model)
            learned = next(handle.parameters(), None) is not None
            with _saved_without_betas(model):
                if resume_from_checkpoint is not None:
                    self._vcl_load(resume_from_checkpoint)
                return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self._vcl.made and learned and not self._vcl_given_optimizer:
                self.optimizer = self.lr_scheduler = None  # they hold these betas; the next train makes others
            self._vcl.detach()

    def _vcl_attach(self, model: nn.Module) -> VCLHandle:
        if self.is_deepspeed_enabled and self.args.fp16:
            raise ValueError("VCLTrainer does not work with DeepSpeed in float16, which has a scaler of its own")
        if not self._vcl.finds(model) and self._vcl_example is None:
            self._vcl_example = self._vcl_samples(model)
        with self.accelerator.autocast():
            handle = self._vcl.attach(model, self._vcl_example)
        if not handle.inject:
            raise ValueError(
                "the Trainer adds nothing to its loss: the model's handle must be made with inject=True. Call "
                "vcl_kernels.handle_of(model).remove() first"
            )
        groups: list[Any] = [] if self.optimizer is None else self.optimizer.param_groups
        held = {id(p) for group in groups for p in group["params"]}
        if groups and not {id(beta) for beta in handle.parameters()} <= held:
            raise ValueError(
                "optimizers must hold the betas, which are learned: attach first, make the optimizer, and give the "
                "handle as vcl="
            )
        logger.info(f"VCL is attached to {type(model).__name__}:\n{handle}")
        self._vcl_epoch = -1
        return handle

    def _vcl_samples(self, model: nn.Module) -> Any:
        """Return two samples of the training data as a batch, with the names that the model takes."""
        data = self.train_dataset
        remedy = 'give vcl={"example_input": …}, a batch or a part of one'
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise ValueError(f"train_dataset ({type(data).__name__}) gives no samples for an example: {remedy}")
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        with _random_numbers_kept():
            try:
                batch = collate([data[i] for i in range(min(2, len(data)))])
                if not isinstance(batch, Mapping) or not batch:
                    raise TypeError(f"data_collator made {batch!r:.100} of two samples")
            except Exception as error:
                kind = type(data).__name__
                raise ValueError(f"no example could be made of train_dataset ({kind}; {error!r}): {remedy}") from error
        taken = inspect.signature(model.forward).parameters
        batch = dict(batch)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            batch = {name: value for name, value in batch.items() if name in taken}
        wanted = [name for name, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if not set(wanted) <= set(batch):
            raise ValueError(f"the model takes {', '.join(wanted)}; samples have {', '.join(batch)}: {remedy}")
        return batch

    # Training

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch, with VCL in its gradient."""
        handle = self._vcl.handle
        if handle is not None:
            handle.accumulation = self.current_gradient_accumulation_steps
            handle.grad_scaler = self.accelerator.scaler
            step = self.state.global_step
            self._vcl.begin(step, total_steps=self.state.max_steps, measure=self._vcl_is_due(step))
        try:
            loss = super().training_step(model, *args, **kwargs)
        except BaseException:
            self._vcl.cancel()
            raise
        self._vcl_metrics = self._vcl.end() or self._vcl_metrics
        return loss

    def _vcl_is_due(self, step: int) -> bool:
        strategy, epoch = self.args.logging_strategy, int((self.state.epoch or 0) + 1e-6)
        if strategy == "no" or not self.state.is_world_process_zero:
            return False
        begins, self._vcl_epoch = epoch != self._vcl_epoch, epoch
        if strategy == "epoch" and self._vcl.log_every_n_steps is None:
            return begins
        return (step == 0 and self.args.logging_first_step) or self._vcl.is_due(step, max(1, self.state.logging_steps))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the measurements of VCL with the training loss."""
        if "loss" in logs:
            logs, self._vcl_metrics = {**logs, **self._vcl_metrics}, {}
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leave the betas out: decay would pull them to 0."""
        handle = self._vcl.handle
        betas = {id(beta) for beta in handle.parameters()} if handle is not None else set()
        undecayed = {name for name, p in model.named_parameters() if id(p) in betas}
        return [name for name in super().get_decay_parameter_names(model) if name not in undecayed]

    # Checkpoints

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the plain model, and the betas that it has in a file of their own."""
        super().save_model(output_dir, *args, **kwargs)
        betas = attached_betas(self.model)
        if betas and self.args.should_save:
            safetensors.torch.save_file(betas, Path(output_dir or self.args.output_dir, BETAS))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if betas_of(self.model):
            state_dict = plain_state_dict(self.model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._vcl_load(self.state.best_model_checkpoint)

    def _vcl_load(self, checkpoint: str) -> None:
        file = Path(checkpoint, BETAS)
        betas = safetensors.torch.load_file(file) if file.exists() else {}
        load_betas(self.model, betas, "vcl=")


@contextmanager
def _saved_without_betas(model: nn.Module) -> Any:
    """Let ``save_pretrained`` of the model and its parts leave the betas out."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [part._keys_to_ignore_on_save for part in parts]  # noqa: SLF001
    for part in parts:
        part._keys_to_ignore_on_save = {*(part._keys_to_ignore_on_save or ()), *attached_betas(part)}  # noqa: SLF001
    try:
        yield
    finally:
        for part, ignored in zip(parts, before, strict=True):
            part._keys_to_ignore_on_save = ignored  # noqa: SLF001


@contextmanager
def _random_numbers_kept() -> Any:
    """Draw from the generators of Python, numpy and torch on the CPU, and set them back."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
