"""VCL in the Trainer of transformers: :class:`VCLTrainer` in its place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..nn.handle import VCLHandle
from ..nn.parameters import attached_betas
from ..torch_private import map_tensors
from .driver import Driver

__all__ = ["VCLTrainer"]

BETAS = "vcl_betas.safetensors"  # in the folder of a checkpoint


class VCLTrainer(Trainer):
    """``transformers.Trainer`` with the variance constancy loss.

    A subclass of Trainer gets it by ``class MyTrainer(VCLTrainer, Seq2SeqTrainer): pass``.

    Until ``train`` ends, the model is attached with ``inject=True``: the gradient of VCL enters in the backward pass.
    ``compute_loss`` and the logged loss are those of the task alone. VCL is averaged over the batches whose gradients
    are added for a step, also in the last step of an epoch, which may have fewer of them; it makes no difference
    whether the Trainer divides the loss by their number or by ``num_items_in_batch``. Its gradient is scaled by the
    GradScaler and clipped, as that of the loss is. Activation checkpointing works in both kinds. After ``train`` the
    model is plain again.

    Args:
        args, kwargs: of the Trainer.
        vcl: what :func:`vcl_kernels.attach` returned for the model with ``inject=True``, which stays attached; or a
            mapping with any of these names. None: the defaults.

            - ``example_input``: as for :func:`vcl_kernels.attach`. Default: two samples of ``train_dataset``, made a
              batch by ``data_collator``.
            - ``handle``: that of a model that is attached.
            - ``weight``: the largest. Default: that of the handle, or 0.01.
            - ``warmup_steps``, ``decay``: the weight by optimizer steps, as for
              :func:`vcl_kernels.integrations.weight_at`.
            - ``log``: statistics of each layer, any columns of :class:`vcl_kernels.VCLMonitor`, logged with the
              training loss as ``vcl_<statistic>/<layer>``. Default: none. ``vcl_loss``, the sum over layers, is logged
              in any case.
            - ``log_every_n_steps``: steps from one measurement to the next. Default: those from one log to the next.
              Compiled models run uncompiled in these steps.
            - others of :func:`vcl_kernels.attach`: ``unit``, ``layers``, ``beta_mode`` … ``shared_beta`` is True by
              default where beta is fixed.

    ``save_model``, the Trainer's checkpoints and ``save_pretrained`` write the plain model: ``from_pretrained`` needs
    no VCL. Betas that are learned, running or from the example are not decayed. A checkpoint has them in a file of
    their own, ``vcl_betas.safetensors``, from which ``train(resume_from_checkpoint=…)`` goes on.

    Raises:
        TypeError, ValueError: a wrong setting; what ``attach`` raises; no example; a handle without ``inject``;
            ``optimizers`` that do not hold the betas; DeepSpeed in float16, which has a scaler of its own.
    """

    def __init__(self, *args: Any, vcl: VCLHandle | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._vcl_ready = False
        if vcl is not None and not isinstance(vcl, (VCLHandle, Mapping)):
            raise TypeError(f"vcl must be a mapping of settings or a VCLHandle; got a {type(vcl).__name__}")
        settings = {"handle": vcl} if isinstance(vcl, VCLHandle) else dict(vcl or {})
        self._vcl_example = settings.pop("example_input", None)
        self._vcl = Driver(settings.pop("handle", None), **settings)
        self._vcl_metrics: dict[str, float] = {}
        super().__init__(*args, **kwargs)
        self._vcl_ready = True
        if self.train_dataset is not None:
            self._vcl_attach(self.model)

    @property
    def vcl_handle(self) -> VCLHandle | None:
        """The handle of the model, until ``train`` ends, or the one that was given."""
        return self._vcl.handle

    # The way in and out

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Attach VCL to each new model, too."""
        model = super().call_model_init(trial)
        if self._vcl_ready:  # else the Trainer is being made, and has no data yet
            self._vcl_attach(model)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with VCL."""
        if self.model_init is None:
            self._vcl_attach(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._vcl.detach()

    def _vcl_attach(self, model: nn.Module) -> None:
        if self._vcl.model is model:
            return
        self._vcl.detach()  # from the model before
        if self.is_deepspeed_enabled and self.args.fp16:
            raise ValueError("VCLTrainer does not work with DeepSpeed in float16, which has a scaler of its own")
        if self._vcl_example is None and self._vcl.given is None:
            self._vcl_example = self._vcl_samples(model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        handle = self._vcl.attach(model, map_tensors(lambda x: x.to(device), self._vcl_example))
        try:
            self._vcl_check(handle)
        except ValueError:
            self._vcl.detach()
            raise
        if isinstance(model, PreTrainedModel):
            names = set(attached_betas(model))
            model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | names  # noqa: SLF001

    def _vcl_check(self, handle: VCLHandle) -> None:
        if not handle.inject:
            raise ValueError(
                "the Trainer adds nothing to its loss: the model's handle must be made with inject=True. Call "
                "vcl_kernels.handle_of(model).remove() first"
            )
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        held = {id(p) for group in groups for p in group["params"]}
        if groups and not {id(beta) for beta in handle.parameters()} <= held:
            raise ValueError(
                "optimizers must hold the betas, which are learned: attach first, make the optimizer, and give the "
                "handle as vcl="
            )

    def _vcl_samples(self, model: nn.Module) -> Any:
        """Return two samples of the training data as a batch. No random number of the training is used up."""
        data = self.train_dataset
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise ValueError(
                f"train_dataset ({type(data).__name__}) is iterable and has no samples to spare: give "
                'vcl={"example_input": …}, a batch or a part of one'
            )
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        with torch.random.fork_rng():
            batch = collate([data[i] for i in range(min(2, len(data)))])
        taken = inspect.signature(model.forward).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            return dict(batch)
        return {name: value for name, value in batch.items() if name in taken}

    # Training

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch, with VCL in its gradient."""
        handle = self._vcl.handle
        if handle is not None:
            handle.accumulation = self.current_gradient_accumulation_steps
            handle.grad_scaler = self.accelerator.scaler
            step = self.state.global_step
            self._vcl.begin(step, total_steps=self.state.max_steps, measure=self._vcl_is_due(step))
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._vcl_metrics = self._vcl.end() or self._vcl_metrics

    def _vcl_is_due(self, step: int) -> bool:
        strategy, state = self.args.logging_strategy, self.state
        if strategy == "no" or not state.is_world_process_zero:
            return False
        epoch = max(1, state.max_steps // max(1, state.num_train_epochs))
        every = epoch if strategy == "epoch" else int(state.logging_steps)
        return (step == 0 and self.args.logging_first_step) or self._vcl.is_due(step, max(1, every))

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
        """Save the plain model, and betas in a file of their own."""
        super().save_model(output_dir, *args, **kwargs)
        betas = {} if self._vcl.handle is None else attached_betas(self.model)
        if betas and self.args.should_save:
            safetensors.torch.save_file(betas, Path(output_dir or self.args.output_dir, BETAS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint, BETAS)
        if file.exists() and self._vcl.handle is not None:
            unknown = self.model.load_state_dict(safetensors.torch.load_file(file), strict=False).unexpected_keys
            if unknown:
                raise ValueError(
                    f"{BETAS} has betas that the model's layers do not have: {', '.join(unknown[:3])}. Give vcl= the "
                    "settings with which the checkpoint was made (beta_mode, beta_init, layers …)"
                )
