"""VCL in Lightning's Trainer: ``Trainer(callbacks=[VCLCallback()])``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..nn.handle import VCLHandle
from ..nn.parameters import attached_betas, betas_of, is_beta
from .driver import Driver, load_betas
from .schedule import Decay

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ModuleNotFoundError:  # the same library under its other name
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities import rank_zero_info
    from pytorch_lightning.utilities.model_helpers import is_overridden

__all__ = ["VCLCallback"]


class VCLCallback(Callback):
    """Trains a LightningModule with the variance constancy loss. ``training_step`` stays as it is.

    During ``fit`` the module is attached with ``inject=True``: the gradient of VCL enters in the backward pass. It is
    divided by ``accumulate_grad_batches``, scaled by the precision plugin's GradScaler, and clipped, as the gradient of
    the loss is. The loss that ``training_step`` returns, and logs, is that of the task alone. After ``fit`` the module
    is plain again.

    Each forward adds its loss, and each backward through it its gradient: of two losses that are differentiated one
    after the other through one forward, each brings VCL. Run a forward that is to be without VCL, such as that of a
    discriminator in its generator's step, in ``with callback.handle.paused():``. With manual optimization, set
    ``callback.handle.accumulation`` where you divide the loss yourself.

    Args:
        handle: what :func:`vcl_kernels.attach` returned, of the module or of a part of it. It stays attached. If it was
            made without ``inject``, add ``handle.loss()`` to what ``training_step`` returns. None: the handle that the
            module has (made in its ``configure_model``, for example), or else VCL is attached.
        module: the name of the submodule to attach to, for example ``"net"``; there may be a callback for each. None:
            the whole LightningModule.
        example_input: as for :func:`vcl_kernels.attach`. None: ``example_input_array`` of the LightningModule, if it
            has one and is attached as a whole.
        weight: after the warm-up. None: that of a handle that exists, or 0.01.
        warmup_steps, decay: the weight by steps, as for :func:`vcl_kernels.integrations.weight_at`. A step is one of an
            optimizer; with manual optimization, a batch.
        log: statistics of each layer, any columns of :class:`vcl_kernels.VCLMonitor`. The Trainer's loggers get them as
            ``vcl_<statistic>/<layer>``, with ``vcl_loss`` (``vcl_loss/<module>`` where ``module`` is given), the sum of
            losses over layers and their calls, of the first batch of a step.
        log_every_n_steps: None: the Trainer's. Compiled modules run uncompiled in these steps.
        settings: further arguments of :func:`vcl_kernels.attach`, if VCL is attached here. ``shared_beta`` is True by
            default where beta is fixed, so that ``training_step`` may call a layer any number of times.

    If VCL is attached here, a checkpoint's ``state_dict`` is that of the plain module: ``load_from_checkpoint`` needs
    no VCL. Betas that are learned, running or from the example are in the checkpoint's entry of the callback, and come
    back when ``fit`` resumes. A ``fit`` that does not resume starts them anew. (With FSDP they stay in the
    ``state_dict``.) Learned betas are among ``self.parameters()``: in ``configure_optimizers``,
    :func:`vcl_kernels.param_groups` spares them weight decay. Those of a module that ``configure_model`` shards must be
    there before: call :func:`vcl_kernels.attach` in it.

    Raises:
        TypeError, ValueError: a wrong argument, now. When ``fit`` begins: what ``attach`` raises; a handle of another
            model, or that was removed; DeepSpeed, which divides and scales the loss itself; a decay where the number of
            steps is not known; a checkpoint whose betas do not fit; a callback that averages weights and comes before
            this one, where there are betas.
    """

    def __init__(
        self,
        handle: VCLHandle | None = None,
        *,
        module: str | None = None,
        example_input: Any = None,
        weight: float | None = None,
        warmup_steps: int = 0,
        decay: Decay = "constant",
        log: Sequence[str] = ("loss", "beta", "variance"),
        log_every_n_steps: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        schedule: dict[str, Any] = {"weight": weight, "warmup_steps": warmup_steps, "decay": decay}
        self._driver = Driver(handle, log=log, log_every_n_steps=log_every_n_steps, **schedule, **settings)
        if module is not None and (not isinstance(module, str) or not module):
            raise TypeError(f"module must be the name of a submodule, or None for the whole; got {module!r}")
        self._module, self._example = module, example_input
        self._place = ""  # before the names of layers
        self._betas: dict[str, Tensor] | None = None  # of a checkpoint, or of the latest fit
        self._hook: Any = None  # that leaves them out of the module's state_dict
        self._total_steps: float | None = None
        self._step = 0

    @property
    def handle(self) -> VCLHandle | None:
        """The handle: during ``fit``, or the one that was given."""
        return self._driver.handle

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint. There may be one callback for each submodule."""
        return self._generate_state_key(module=self._module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach VCL, before the optimizers are made and the strategy wraps the module."""
        if stage != "fit":
            return
        self._finish()  # what an error left
        self._betas = None
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise ValueError(
                "VCLCallback does not work with DeepSpeed, which divides and scales the loss itself. Use "
                "vcl_kernels.attach without inject, and add handle.loss() to what training_step returns"
            )
        if not is_overridden("configure_model", pl_module):
            self._attach(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach VCL to layers that were made in ``configure_model``, or find the handle that was made there."""
        if self._driver.model is None:
            handle = self._attach(trainer, pl_module)
            if self._driver.made and next(handle.parameters(), None) is not None:
                raise ValueError(
                    "beta_mode='learned' wants betas before the optimizers are made. Where configure_model makes the "
                    "layers, call vcl_kernels.attach(…, inject=True) in it, before it shards them"
                )

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> VCLHandle:
        example = self._example
        if example is None and self._module is None:
            example = pl_module.example_input_array
        target = pl_module if self._module is None else pl_module.get_submodule(self._module)
        handle = self._driver.attach(target, example)
        self._tell(trainer, pl_module)  # now, too: a tuner takes the callbacks away
        name = next(name for name, part in pl_module.named_modules() if part is handle.model)
        self._place = f"{name}." if name else ""
        if self._driver.made:
            rank_zero_info(f"{type(self).__name__}: {str(handle).splitlines()[-1]}")
            if betas_of(handle.model):
                _check_averaging(trainer.callbacks, self)
            if not trainer.strategy.restore_checkpoint_after_setup:  # else the checkpoint may be sharded
                self._hook = pl_module.register_state_dict_post_hook(partial(_leave_out_betas, self._place))
            self._load_betas()
        return handle

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the number of steps, if the weight depends on it."""
        if self._driver.decay != "constant":
            self._total_steps = total = trainer.estimated_stepping_batches
            if not 1 <= total < math.inf:
                raise ValueError(
                    f"decay={self._driver.decay!r} wants a known number of steps: set Trainer(max_steps=…), or "
                    f"max_epochs with a loader that has a length; got max_steps={trainer.max_steps}, "
                    f"max_epochs={trainer.max_epochs}"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the handle what the Trainer does with the loss of this batch."""
        self._tell(trainer, pl_module)
        self._step = trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001  # as Lightning's own callbacks
        every = trainer.log_every_n_steps if trainer.is_global_zero and trainer.loggers else 0
        due = every > 0 and self._driver.is_due(self._step, every)
        self._driver.begin(self._step, total_steps=self._total_steps, measure=due)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured."""
        metrics = self._driver.end(self._place)
        if metrics and self._module is not None:
            metrics[f"vcl_loss/{self._module}"] = metrics.pop("vcl_loss")
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=self._step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a batch that another callback left out."""
        self._driver.cancel()

    def _tell(self, trainer: Trainer, pl_module: LightningModule) -> None:
        handle = self.handle
        assert handle is not None
        if handle.inject:
            handle.grad_scaler = getattr(trainer.precision_plugin, "scaler", None)
            if pl_module.automatic_optimization:
                handle.accumulation = trainer.accumulate_grad_batches

    # The way back

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the module plain again."""
        if stage == "fit":
            self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make the module plain again."""
        self._finish()

    def _finish(self) -> None:
        handle = self.handle
        if handle is not None and self._driver.made:
            self._betas = attached_betas(handle.model)  # for a checkpoint after fit
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._driver.detach()

    # Betas in checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the betas of the VCL that the callback attached."""
        handle = self.handle
        return {"betas": attached_betas(handle.model) if handle and self._driver.made else self._betas or {}}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint without betas, if there are betas here."""
        if self.state_key not in checkpoint["callbacks"]:
            self.load_state_dict({"betas": {}})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the betas of a checkpoint."""
        self._betas = dict(state_dict["betas"])
        self._load_betas()

    def _load_betas(self) -> None:
        if self._betas is not None and self.handle is not None and self._driver.made:
            load_betas(self.handle.model, self._betas, "VCLCallback")


def _check_averaging(callbacks: Sequence[Any], callback: VCLCallback) -> None:
    """Raise ValueError if a callback before ``callback`` has copied the module, without betas, to average weights."""
    before = callbacks[: callbacks.index(callback)]
    kinds = {kind.__name__ for other in before for kind in type(other).__mro__}
    if kinds & {"WeightAveraging", "StochasticWeightAveraging"}:
        raise ValueError(
            "callbacks must have VCLCallback before the one that averages weights: there are betas to average"
        )


def _leave_out_betas(place: str, _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Leave the betas of the part at ``place`` out of a ``state_dict``, as a hook of it."""
    for name in [name for name in state if name.startswith(prefix + place) and is_beta(name)]:
        del state[name]
