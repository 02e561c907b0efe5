"""VCLCallback in Lightning's Trainer: its steps beside one by hand, resuming, logging, the way back."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from by_hand import WEIGHT, assert_as_exact, assert_same, batches, gradients, loader, network, step, task
from libraries import library
from torch import nn

import vcl_kernels as vk

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def lightning():
    return library("lightning")


@pytest.fixture
def callback(lightning):
    """The class."""
    assert lightning is not None  # imported before
    from vcl_kernels.integrations.lightning import VCLCallback

    return VCLCallback


@pytest.fixture
def module(lightning):
    """A LightningModule around a network, which it calls as a part: ``self.net(x)``, or with ``whole``, ``self(x)``."""

    class Module(lightning.LightningModule):
        def __init__(self, net=None, whole=False, rate=1.0):
            super().__init__()
            self.net, self.whole, self.rate = network() if net is None else net, whole, rate

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _index):
            return task(self if self.whole else self.net, batch)

        def validation_step(self, batch, _index):
            self.log("val", task(self, batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.rate)

    return Module


@pytest.fixture
def trainer(lightning, tmp_path):
    def make(*callbacks, **settings):
        defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        return lightning.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**defaults, **quiet, **settings})

    return make


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("k", [1, 3])
def test_a_step_is_that_by_hand(k, clip, whole, module, callback, trainer):
    model = module(whole=whole)
    before, data = copy.deepcopy(model.net), batches(k)
    trainer(callback(weight=WEIGHT), accumulate_grad_batches=k, gradient_clip_val=clip).fit(model, loader(data))
    found = step(before, model.net)
    assert_same(found, gradients(before, data, clip=clip))
    with pytest.raises(AssertionError):  # it would show if VCL were counted k times, or not at all
        assert_same(found, gradients(before, data, clip=clip, weight=WEIGHT * k if k > 1 else 0.0), 0.01)


@pytest.mark.parametrize("k", [1, 3])
def test_a_step_in_bfloat16_is_that_by_hand(k, module, callback, trainer):
    model = module()
    before, data = copy.deepcopy(model.net), batches(k)
    trainer(callback(weight=WEIGHT), accumulate_grad_batches=k, precision="bf16-mixed").fit(model, loader(data))
    assert_as_exact(step(before, model.net), gradients(before, data, context=BF16), gradients(before, data))


def test_a_gradient_is_scaled_once(module, callback, trainer, lightning):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    model = module()
    before, data = copy.deepcopy(model.net), batches(1)
    trainer(callback(weight=WEIGHT), plugins=[plugin]).fit(model, loader(data))
    assert scaler.get_scale() == 256
    half = partial(torch.autocast, "cpu", torch.float16)
    assert_as_exact(step(before, model.net), gradients(before, data, context=half), gradients(before, data))


def test_each_epoch_has_its_accumulation(module, callback, trainer, lightning):
    schedule = lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})
    model = module(rate=0.5)
    before, data = copy.deepcopy(model.net), batches(3)
    trainer(schedule, callback(weight=WEIGHT), max_epochs=2).fit(model, loader(data))
    for together in [data[:1], data[1:2], data[2:], data]:
        found = gradients(before, together)
        for name, p in before.named_parameters():
            p.data -= 0.5 * found[name]
    assert_same(dict(model.net.named_parameters()), dict(before.named_parameters()))


def test_manual_optimization_divides_by_itself(module, callback, trainer):
    class Manual(module):
        automatic_optimization = False

        def training_step(self, batch, index):
            self.vcl.handle.accumulation = 3
            self.manual_backward(task(self.net, batch) / 3)
            if index == 2:
                self.optimizers().step()

    model = Manual()
    model.__dict__["vcl"] = vcl = callback(weight=WEIGHT)
    before, data = copy.deepcopy(model.net), batches(3)
    trainer(vcl).fit(model, loader(data))
    assert_same(step(before, model.net), gradients(before, data))


def test_two_calls_of_a_layer_in_a_step_both_count(module, callback, trainer):
    class Twice(module):
        def training_step(self, batch, _index):
            images, labels = batch
            return task(self.net, (images[:12], labels[:12])) + task(self.net, (images[12:], labels[12:]))

    def twice(net, batch):
        images, labels = batch
        return task(net, (images[:12], labels[:12])) + task(net, (images[12:], labels[12:]))

    model = Twice()
    before, data = copy.deepcopy(model.net), batches(1, rows=24)
    trainer(callback(weight=WEIGHT)).fit(model, loader(data))
    assert_same(step(before, model.net), gradients(before, data, twice))


def test_parts_have_callbacks_of_their_own(module, callback, trainer):
    class Parts(module):
        def __init__(self):
            super().__init__(nn.ModuleDict({"a": network(), "b": network(), "c": network()}))

        def training_step(self, batch, _index):
            return sum(task(part, batch) for part in self.net.values())

    model = Parts()
    before, data = copy.deepcopy(model.net), batches(1)
    trainer(callback(module="net.a", weight=WEIGHT), callback(module="net.b", weight=2 * WEIGHT)).fit(
        model, loader(data)
    )
    for name, weight in {"a": WEIGHT, "b": 2 * WEIGHT, "c": 0.0}.items():
        assert_same(step(before[name], model.net[name]), gradients(before[name], data, weight=weight))


def test_a_handle_of_your_own_stays(module, callback, trainer):
    model = module()
    before, data = copy.deepcopy(model.net), batches(3)
    handle = vk.attach(model.net, data[0][0], weight=WEIGHT, inject=True)
    trainer(callback(handle), accumulate_grad_batches=3).fit(model, loader(data))
    assert vk.handle_of(model) is handle
    assert handle.accumulation == 1  # again
    handle.remove()
    assert_same(step(before, model.net), gradients(before, data))


def test_a_handle_whose_loss_the_step_adds_is_not_counted_twice(module, callback, trainer):
    class Adds(module):
        def training_step(self, batch, index):
            return super().training_step(batch, index) + self.net.vcl_handle.loss()

    model = Adds()
    before, data = copy.deepcopy(model.net), batches(3)
    handle = vk.attach(model.net, data[0][0], weight=WEIGHT)
    trainer(callback(handle), accumulate_grad_batches=3).fit(model, loader(data))
    handle.remove()
    assert_same(step(before, model.net), gradients(before, data))


def test_after_fit_the_module_is_plain(module, callback, trainer):
    model, vcl = module(), callback()
    keys, data = list(model.state_dict()), batches(2)
    loop = trainer(vcl, fast_dev_run=True)
    loop.fit(model, loader(data), loader(data))
    assert list(model.state_dict()) == keys
    assert vcl.handle is None
    with pytest.raises(ValueError, match="no VCL attached"):
        vk.handle_of(model)
    before = copy.deepcopy(model.net)
    trainer().fit(model, loader(data[:1]))
    assert_same(step(before, model.net), gradients(before, data[:1], weight=0.0))


def test_after_an_error_the_module_is_plain_too(module, callback, trainer):
    class Fails(module):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            raise OSError("no more data")

    model = Fails()
    with pytest.raises(OSError, match="no more data"):
        trainer(callback(), logger=True, log_every_n_steps=1).fit(model, loader(batches(1)))
    assert not any(isinstance(part, vk.VCLActivation) for part in model.modules())


@pytest.fixture
def logger(lightning):
    """A logger of Lightning that keeps the metrics it gets, in ``kept``."""

    class Logger(lightning.pytorch.loggers.logger.Logger):
        name, version = "kept", 0

        def __init__(self):
            super().__init__()
            self.kept = []

        def log_metrics(self, metrics, step):
            self.kept.append((step, metrics))

        def log_hyperparams(self, *_args):
            pass

    return Logger()


def test_layers_are_logged(module, callback, trainer, logger):
    model = module()
    net, data = copy.deepcopy(model.net), batches(4)
    vcl = callback(weight=WEIGHT, log=("loss", "beta", "variance", "share"))
    trainer(vcl, logger=logger, log_every_n_steps=2, accumulate_grad_batches=2, max_epochs=2).fit(model, loader(data))
    logged = {step: metrics for step, metrics in logger.kept if "vcl_loss" in metrics}
    assert list(logged) == [1, 3]
    names = {f"vcl_{what}/net.{layer}" for what in ("loss", "beta", "variance", "share") for layer in (1, 4, 6)}
    assert set(logged[1]) == {"vcl_loss", *names}
    # The first of the two batches of step 1, after step 0
    found = gradients(net, data[:2])
    for name, p in net.named_parameters():
        p.data -= found[name]
    x = net[0](data[2][0]).detach()
    loss = WEIGHT * float(vk.vcl_loss(x, 1.0, unit="activation"))
    assert logged[1]["vcl_loss/net.1"] == pytest.approx(loss, rel=1e-5)
    assert logged[1]["vcl_variance/net.1"] == pytest.approx(float(x[:10].unflatten(0, (2, 5)).var(1).mean()), rel=1e-5)
    assert logged[1]["vcl_loss"] == pytest.approx(sum(logged[1][f"vcl_loss/net.{layer}"] for layer in (1, 4, 6)))
    assert logged[1]["vcl_beta/net.1"] == 1
    assert 0 < logged[1]["vcl_share/net.1"] < 1


def test_the_weight_follows_its_schedule(module, callback, trainer, lightning):
    weights = []

    class Seen(lightning.Callback):
        def on_before_zero_grad(self, *_args):
            weights.append(vcl.handle.weight)

    vcl = callback(weight=0.1, warmup_steps=2, decay="cosine")
    trainer(vcl, Seen(), max_epochs=2).fit(module(), loader(batches(3)))
    assert weights == pytest.approx([0.0, 0.05, 0.1, 0.1 * (0.5 + 0.5**1.5), 0.05, 0.1 * (0.5 - 0.5**1.5)])


@pytest.mark.parametrize("settings", [{"beta_mode": "learned"}, {"beta_mode": "running"}, {}], ids=str)
def test_a_resumed_training_is_a_straight_one(settings, module, callback, trainer, lightning, tmp_path):
    def train(name, ckpt=None):
        model = module(rate=0.1)
        saves = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
        vcl = callback(weight=WEIGHT, warmup_steps=3, decay="linear", example_input=data[0][0], **settings)
        loop = trainer(saves, vcl, max_epochs=3, accumulate_grad_batches=2, enable_checkpointing=True)
        loop.fit(model, loader(data), ckpt_path=ckpt)
        return model, vcl.state_dict()["betas"]

    data = batches(4)
    straight, betas = train("straight")
    resumed, same_betas = train("resumed", tmp_path / "straight/epoch=0.ckpt")
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert betas.keys() == same_betas.keys()
    assert len(betas) == (3 if settings else 0)
    torch.testing.assert_close(same_betas, betas, rtol=0, atol=0)
    plain = module.load_from_checkpoint(tmp_path / "resumed/epoch=2.ckpt", net=network())
    torch.testing.assert_close(plain.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_with_other_betas_is_an_error(module, callback, trainer, tmp_path):
    data, loop = batches(1), trainer(callback(beta_mode="running"))
    loop.fit(module(), loader(data))
    loop.save_checkpoint(tmp_path / "running.ckpt")

    def resume(**settings):
        trainer(callback(**settings), max_epochs=2).fit(module(), loader(data), ckpt_path=tmp_path / "running.ckpt")

    with pytest.raises(ValueError, match=r"the checkpoint has 3 betas and the model 0; they differ in net.1.vcl"):
        resume()
    with pytest.raises(ValueError, match="has 3 betas and the model 2; .* Give VCLCallback the settings"):
        resume(beta_mode="running", layers=["net.1", "net.6"])
    with pytest.raises(ValueError, match=r"the checkpoint has 3 betas and the model 3; they differ in net.1.vcl"):
        resume(beta_mode="learned", example_input=data[0][0])
    for callbacks in ([callback()], []):
        plain = trainer(*callbacks)
        plain.fit(module(), loader(data))
        plain.save_checkpoint(tmp_path / "running.ckpt")
        with pytest.raises(ValueError, match="the checkpoint has 0 betas and the model 3"):
            resume(beta_mode="running")


def test_betas_get_their_shape_from_a_checkpoint(module, callback, trainer, tmp_path):
    data, loop = batches(1), trainer(callback(beta_mode="learned"))
    loop.fit(module(), loader(data))
    loop.save_checkpoint(tmp_path / "learned.ckpt")
    vcl = callback(beta_mode="learned")
    trainer(vcl, max_epochs=2).fit(module(), loader(data), ckpt_path=tmp_path / "learned.ckpt")
    assert [tuple(beta.shape) for beta in vcl.state_dict()["betas"].values()] == [(4, 6, 6), (8,), (8,)]


def test_layers_that_are_made_late_are_found(module, callback, trainer):
    class Late(module):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            self.net = network()

    with pytest.raises(ValueError, match="beta_mode='learned' wants betas before the optimizers are made"):
        trainer(callback(beta_mode="learned")).fit(Late(), loader(batches(1)))
    model, data = Late(), batches(1)
    before = network()
    trainer(callback(weight=WEIGHT)).fit(model, loader(data))
    assert_same(step(before, model.net), gradients(before, data))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_module_is_trained_and_logged(module, callback, trainer, logger):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model = module(rate=0.5)
    before, data = copy.deepcopy(model.net), batches(2)
    trainer(callback(weight=WEIGHT), logger=logger, log_every_n_steps=2).fit(
        torch.compile(model, backend=backend), loader(data)
    )
    for batch in data:  # the first step is compiled, the second is measured
        found = gradients(before, [batch])
        for name, p in before.named_parameters():
            p.data -= 0.5 * found[name]
    assert_same(dict(model.net.named_parameters()), dict(before.named_parameters()))
    assert graphs
    assert [step for step, metrics in logger.kept if "vcl_loss/net.1" in metrics] == [1]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"log": "loss"}, TypeError, "log must be a sequence of statistics"),
        ({"log": None}, TypeError, "log must be a sequence of statistics"),
        ({"module": ""}, TypeError, "module must be the name of a submodule, or None for the whole; got ''"),
        ({"weight": -0.1}, ValueError, "weight must be at least 0, and finite; got -0.1"),
        ({"weight": float("nan")}, ValueError, "weight must be at least 0, and finite; got nan"),
        ({"units": 3}, TypeError, "unknown settings units; those of attach are"),
        ({"inject": False}, ValueError, "inject=False is for a loss that your own code adds"),
        ({"log": ("mean",)}, ValueError, "log must be one of 'loss', .* got 'mean'"),
        ({"decay": "cosinus"}, ValueError, "decay must be one of"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0; got -1"),
        ({"log_every_n_steps": 0}, ValueError, "log_every_n_steps must be at least 1; got 0"),
        ({"handle": 3}, TypeError, "handle must be what vcl_kernels.attach returned; got a int"),
    ],
)
def test_a_wrong_setting_is_an_error_at_once(settings, error, match, callback):
    with pytest.raises(error, match=match):
        callback(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"module": "body"}, AttributeError, "no attribute `body`"),
        ({"decay": "linear"}, ValueError, "decay='linear' wants a known number of steps: set Trainer.max_steps"),
    ],
)
def test_a_wrong_setting_is_an_error_when_fit_begins(settings, error, match, module, callback, trainer):
    with pytest.raises(error, match=match):
        trainer(callback(**settings), max_epochs=-1, max_steps=-1).fit(module(), loader(batches(1)))


def test_a_decay_wants_a_known_number_of_steps(module, callback, trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches(2))

    data = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match="max_epochs with a loader that has a length; got max_steps=-1, max_epochs=2"):
        trainer(callback(decay="cosine"), max_epochs=2).fit(module(), data)
    trainer(callback(decay="cosine"), max_steps=2, max_epochs=2).fit(module(), data)


def test_two_optimizers_step_once_a_batch(module, callback, trainer, logger):
    class Two(module):
        automatic_optimization = False

        def training_step(self, batch, _index):
            weights.append(vcl.handle.weight)
            self.manual_backward(task(self.net, batch))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 3)]

    weights, vcl = [], callback(weight=0.4, decay="linear")
    trainer(vcl, logger=logger, log_every_n_steps=2).fit(Two(), loader(batches(4)))
    assert weights == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [step for step, metrics in logger.kept if "vcl_loss" in metrics] == [1, 3]


def test_a_tuner_counts_vcl_once(module, callback, trainer, lightning):
    model, vcl, seen = module(), callback(), []

    class Asks(module):
        def training_step(self, batch, index):
            seen.append(vk.handle_of(self).accumulation)
            return super().training_step(batch, index)

        def configure_optimizers(self):
            self.lr = 0.1
            return super().configure_optimizers()

    model = Asks()
    model.lr = 0.1
    tuner = lightning.pytorch.tuner.Tuner(trainer(vcl, accumulate_grad_batches=3))
    tuner.lr_find(model, loader(batches(6)), num_training=2)
    assert set(seen) == {3}
    assert not any(isinstance(part, vk.VCLActivation) for part in model.modules())


def test_weights_are_averaged_with_betas_or_not_at_all(module, callback, trainer, lightning):
    average = partial(lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs=0.1)
    learned = {"beta_mode": "learned", "example_input": batches(1)[0][0]}
    with pytest.raises(ValueError, match="callbacks must have VCLCallback before the one that averages weights"):
        trainer(average(), callback(**learned), max_epochs=2).fit(module(), loader(batches(2)))
    trainer(callback(**learned), average(), max_epochs=2).fit(module(), loader(batches(2)))
    trainer(average(), callback(), max_epochs=2).fit(module(), loader(batches(2)))


def test_vcl_that_is_attached_already_is_not_silently_another(module, callback, trainer):
    model, data = module(), loader(batches(1))
    handle = vk.attach(model.net, weight=0.3, inject=True)
    with pytest.raises(ValueError, match=r"the model \(Module\) has VCL attached already, without beta_mode"):
        trainer(callback(beta_mode="running")).fit(model, data)
    trainer(callback(weight=0.0)).fit(model, data)  # which can be set
    assert (handle.weight, vk.handle_of(model)) == (0.3, handle)
    handle.remove()
    with pytest.raises(ValueError, match="it was removed, or is of another model"):
        trainer(callback(handle)).fit(model, data)
    with pytest.raises(ValueError, match="by another trainer or callback"):
        trainer(callback(module="net"), callback()).fit(model, data)
    assert not any(isinstance(part, vk.VCLActivation) for part in model.modules())


def test_a_handle_is_as_it_was_after_fit(module, callback, trainer, logger):
    model = module()
    handle = vk.attach(model.net, weight=0.3, inject=True)
    handle.accumulation = 4
    trainer(callback(handle, decay="linear"), logger=logger, log_every_n_steps=1).fit(model, loader(batches(2)))
    assert (handle.weight, handle.accumulation) == (0.3, 4)
    assert any("vcl_loss/net.1" in metrics for _, metrics in logger.kept)


def test_betas_of_another_handle_stay_in_the_checkpoint(module, callback, trainer, tmp_path):
    class Both(module):
        def training_step(self, batch, _index):
            return task(self.net["a"], batch) + task(self.net["b"], batch)

    model, example = Both(nn.ModuleDict({"a": network(), "b": network()})), batches(1)[0][0]
    handle = vk.attach(model.net["b"], example, beta_mode="learned", inject=True)
    of_a = callback(module="net.a", beta_mode="learned", example_input=example)
    loop = trainer(of_a, callback(handle))
    loop.fit(model, loader(batches(1)))
    loop.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=False)
    names = [name for name in saved["state_dict"] if name.endswith(".beta")]
    assert names == [f"net.b.{i}.vcl.0.beta" for i in (1, 4, 6)]
    assert list(of_a.state_dict()["betas"]) == [f"{i}.vcl.0.beta" for i in (1, 4, 6)]


def test_a_paused_forward_after_the_step_leaves_the_log_alone(module, callback, trainer, logger):
    class Adversarial(module):
        automatic_optimization = False

        def training_step(self, batch, _index):
            self.manual_backward(task(self, batch))
            self.optimizers().step()
            with vcl.handle.paused():
                task(self, batch)

    vcl = callback(weight=WEIGHT)
    trainer(vcl, logger=logger, log_every_n_steps=1).fit(Adversarial(), loader(batches(2)))
    assert [metrics["vcl_loss"] > 0 for _, metrics in logger.kept if "vcl_loss" in metrics] == [True, True]


def test_deepspeed_is_refused(module, callback, trainer, lightning):
    class DeepSpeedLike(lightning.pytorch.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(ValueError, match="VCLCallback does not work with DeepSpeed"):
        trainer(callback(), strategy=DeepSpeedLike(torch.device("cpu"))).fit(module(), loader(batches(1)))


def test_several_handles_want_a_callback_each(module, callback, trainer):
    net = nn.ModuleDict({"a": network(), "b": network()})
    handles = [vk.attach(part, inject=True) for part in net.values()]
    with pytest.raises(ValueError, match="2 parts of the model"):
        trainer(callback()).fit(module(net), loader(batches(1)))
    assert [handle.weight for handle in handles] == [0.01, 0.01]


def test_the_weight_of_a_handle_is_the_largest_of_a_schedule(module, callback, trainer, lightning):
    weights, model = [], module()
    handle = vk.attach(model.net, weight=0.4, inject=True)

    class Seen(lightning.Callback):
        def on_before_zero_grad(self, *_args):
            weights.append(handle.weight)

    trainer(callback(handle, decay="linear"), Seen()).fit(model, loader(batches(4)))
    assert weights == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert handle.weight == 0.4  # again


def test_a_handle_of_another_model_is_an_error(module, callback, trainer):
    handle = vk.attach(network(), inject=True)
    with pytest.raises(ValueError, match="handle must be of the model that is trained"):
        trainer(callback(handle)).fit(module(), loader(batches(1)))
    assert handle.weight == 0.01


def test_the_example_learns_and_logs(lightning, tmp_path):
    from examples import lightning_callback

    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    assert lightning.Trainer  # imported first
    assert lightning_callback.main(epochs=3, images=400, folder=str(tmp_path), **quiet) < 45  # half of chance
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "vcl_variance/net.1" in metrics.read_text()
