"""VCLTrainer of transformers: its steps beside one by hand, checkpointing, decay, logging, saving and resuming."""

from __future__ import annotations

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import WEIGHT, assert_as_exact, assert_same, gradients, step
from libraries import library
from torch import nn

import vcl_kernels as vk
from vcl_kernels.nn.parameters import attached_betas

ROWS = 10
LAYERS = [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in (0, 1)] + ["bert.pooler.activation"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def transformers():
    return library("transformers")


@pytest.fixture
def bert(transformers):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=40, num_labels=3, initializer_range=0.3, **sizes, **dropout)
    model = transformers.BertForSequenceClassification(config)
    model.accepts_loss_kwargs = False  # it takes num_items_in_batch and ignores it: now the Trainer divides the loss
    return model


@pytest.fixture
def vit(transformers):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes, **dropout)
    return transformers.ViTForImageClassification(config)


@pytest.fixture
def trainer(transformers, tmp_path):
    """Makes a VCLTrainer whose optimizer is SGD. It keeps the gradients of each step."""
    from vcl_kernels.integrations.transformers import VCLTrainer

    def make(model, data, vcl=None, kind=VCLTrainer, name="out", options=None, **args):
        rate = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd"}
        quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        defaults = {"use_cpu": True, "max_grad_norm": 0.0, "num_train_epochs": 1, "logging_strategy": "no"}
        settings = {**rate, **quiet, **defaults, "per_device_train_batch_size": ROWS, **args}
        arguments = transformers.TrainingArguments(str(tmp_path / name), **settings)
        vcl = {"weight": WEIGHT} if vcl is None else vcl
        options = {"train_dataset": data, **(options or {})}
        loop = InOrder(kind)(model, arguments, vcl=vcl, **options)
        loop.add_callback(Gradients(transformers, loop))
        return loop

    return make


def InOrder(kind):
    """A Trainer that does not shuffle."""
    return type(kind.__name__, (kind,), {"_get_train_sampler": lambda *_: None})


def Gradients(transformers, loop):
    """A callback that keeps the gradients of each step, in ``loop.gradients``."""
    loop.gradients = []

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_args, **_kwargs):
            parameters = loop.model.named_parameters()
            loop.gradients.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})

    return Keep()


def samples(number):
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, 40, (7,), generator=draw),
            "labels": torch.randint(3, (1,), generator=draw).squeeze(),
        }
        for _ in range(number)
    ]


def batched(data):
    return [
        {key: torch.stack([s[key] for s in data[i : i + ROWS]]) for key in data[0]} for i in range(0, len(data), ROWS)
    ]


def task(net, batch):
    return F.cross_entropy(net(input_ids=batch["input_ids"]).logits, batch["labels"])


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("k", [1, 3])
def test_a_step_is_that_by_hand(k, clip, bert, trainer):
    before, data = copy.deepcopy(bert), samples(k * ROWS)
    loop = trainer(bert, data, gradient_accumulation_steps=k, max_grad_norm=clip or 0.0)
    loop.train()
    wanted = partial(gradients, before, batched(data), task, clip=clip)
    assert_same(loop.gradients[0], wanted())
    with pytest.raises(AssertionError):  # it would show if VCL were counted k times, or not at all
        assert_same(loop.gradients[0], wanted(weight=WEIGHT * k if k > 1 else 0.0), 0.01)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_with_num_items_in_batch_is_that_by_hand(clip, bert, trainer):
    before, data, seen = copy.deepcopy(bert), samples(3 * ROWS), []

    def loss(outputs, labels, num_items_in_batch):
        seen.append(int(num_items_in_batch))
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    loop = trainer(
        bert, data, options={"compute_loss_func": loss}, gradient_accumulation_steps=3, max_grad_norm=clip or 0.0
    )
    loop.train()
    assert seen == [3 * ROWS] * 3
    assert_same(loop.gradients[0], gradients(before, batched(data), task, clip=clip))


def test_a_step_of_a_model_that_takes_num_items_in_batch_is_that_by_hand(vit, trainer):
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(3 * ROWS, 3, 16, 16, generator=draw)
    data = [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images)]
    before, loop = copy.deepcopy(vit), trainer(vit, data, gradient_accumulation_steps=3)
    loop.train()
    assert_same(loop.gradients[0], gradients(before, batched(data), lambda net, batch: net(**batch).loss))


def test_the_last_step_of_an_epoch_may_add_fewer_batches(bert, trainer):
    before, data = copy.deepcopy(bert), samples(5 * ROWS)
    loop = trainer(bert, data, gradient_accumulation_steps=3, learning_rate=0.0)
    loop.train()
    for found, part in zip(loop.gradients, (data[: 3 * ROWS], data[3 * ROWS :]), strict=True):
        assert_same(found, gradients(before, batched(part), task))


@pytest.mark.parametrize("k", [1, 3])
def test_a_step_in_bfloat16_is_that_by_hand(k, bert, trainer):
    before, data = copy.deepcopy(bert), batched(samples(k * ROWS))
    loop = trainer(bert, samples(k * ROWS), gradient_accumulation_steps=k, bf16=True)
    loop.train()
    eager = gradients(before, data, task, context=partial(torch.autocast, "cpu", torch.bfloat16))
    assert_as_exact(loop.gradients[0], eager, gradients(before, data, task))


def test_a_gradient_is_scaled_once(bert, trainer):
    before, data = copy.deepcopy(bert), samples(ROWS)
    loop = trainer(bert, data)
    loop.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop.train()
    assert loop.accelerator.scaler.get_scale() == 1024
    assert_same(step(before, bert), gradients(before, batched(data), task))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_is_that_by_hand(reentrant, bert, trainer, transformers):
    before, data = copy.deepcopy(bert), samples(3 * ROWS)
    fields = transformers.TrainingArguments.__dataclass_fields__
    name = "activation" if "activation_checkpointing" in fields else "gradient"
    checkpoints = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}}
    logs = {"logging_strategy": "steps", "logging_steps": 1}
    loop = trainer(
        bert, data, {"weight": WEIGHT, "log": ("loss",)}, gradient_accumulation_steps=3, **checkpoints, **logs
    )
    loop.train()
    assert_same(loop.gradients[0], gradients(before, batched(data), task))
    (logged,) = [entry for entry in loop.state.log_history if "vcl_loss" in entry]
    assert logged["vcl_loss"] == pytest.approx(sum(logged[f"vcl_loss/{layer}"] for layer in LAYERS))


def test_after_training_the_model_is_plain(bert, trainer, transformers):
    data = samples(ROWS)
    loop, seen = trainer(bert, data), []
    loop.add_callback(OnStep(transformers, lambda: seen.append(list(vk.handle_of(bert).layers))))
    loop.train()
    assert seen == [LAYERS]
    assert loop.vcl_handle is None
    assert not any(isinstance(module, vk.VCLActivation) for module in bert.modules())
    before = copy.deepcopy(bert)
    loop.train()  # again
    assert_same(step(before, bert), gradients(before, batched(data), task))


def test_learned_betas_learn_in_each_training(bert, trainer, transformers):
    loop, moved = trainer(bert, samples(ROWS), {"weight": WEIGHT, "beta_mode": "learned"}), []

    def look():
        moved.append(min(float(beta.detach().sub(1).abs().max()) for beta in vk.handle_of(bert).parameters()))

    loop.add_callback(OnStep(transformers, look))
    loop.train()
    loop.train()
    assert len(moved) == 2
    assert min(moved) > 0


def test_betas_are_not_decayed(bert, trainer, transformers):
    loop, groups = trainer(bert, samples(ROWS), {"beta_mode": "learned"}, weight_decay=0.1), []

    def look():
        betas = {id(beta) for beta in vk.handle_of(bert).parameters()}
        groups.extend((g["weight_decay"], betas & {id(p) for p in g["params"]}) for g in loop.optimizer.param_groups)

    loop.add_callback(OnStep(transformers, look))
    loop.train()
    (decay, decayed), (none, free) = groups
    assert (decay, none) == (0.1, 0.0)
    assert (len(decayed), len(free)) == (0, 3)


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [({"logging_strategy": "steps", "logging_steps": 2}, [2, 4]), ({"logging_strategy": "epoch"}, [2, 4])],
)
def test_measurements_are_logged_with_the_training_loss(strategy, steps, bert, trainer):
    vcl = {"weight": WEIGHT, "log": ("beta", "variance")}
    loop = trainer(bert, samples(4 * ROWS), vcl, gradient_accumulation_steps=2, num_train_epochs=2, **strategy)
    loop.train()
    logs = {entry["step"]: entry for entry in loop.state.log_history if "vcl_loss" in entry}
    assert list(logs) == steps
    for entry in logs.values():
        assert {name for name in entry if name.startswith("vcl_")} == {
            "vcl_loss",
            *(f"vcl_{what}/{layer}" for what in ("beta", "variance") for layer in LAYERS),
        }
        assert "loss" in entry
        assert 0 < entry["vcl_loss"] < 5
        assert entry[f"vcl_beta/{LAYERS[0]}"] == 1


@pytest.mark.parametrize("mode", ["learned", "running", "fixed"])
def test_a_resumed_training_is_a_straight_one(mode, bert, trainer, transformers, tmp_path):
    data = samples(6 * ROWS)

    def train(name, resume=None):
        model = copy.deepcopy(bert)
        vcl = {"weight": WEIGHT, "beta_mode": mode, "warmup_steps": 2, "decay": "cosine"}
        saves = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "optim": "adamw_torch"}
        loop = trainer(model, data, vcl, name=name, gradient_accumulation_steps=2, **{**saves, "learning_rate": 0.01})
        betas = {}
        loop.add_callback(OnStep(transformers, lambda: betas.update(attached_betas(model))))
        loop.train(resume_from_checkpoint=resume)
        return model, betas

    straight, betas = train("straight")
    resumed, same_betas = train("resumed", str(tmp_path / "straight/checkpoint-2"))
    torch.testing.assert_close(dict(resumed.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)
    assert len(betas) == (0 if mode == "fixed" else 3)
    torch.testing.assert_close(same_betas, betas, rtol=0, atol=0)
    kind = transformers.BertForSequenceClassification
    loaded, info = kind.from_pretrained(tmp_path / "resumed/checkpoint-6", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    torch.testing.assert_close(dict(loaded.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)


def OnStep(transformers, function):
    """A callback that calls ``function`` after each step."""

    class Calls(transformers.TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            function()

    return Calls()


def test_what_is_saved_in_training_is_plain(bert, trainer, transformers, tmp_path):
    def save():
        bert.save_pretrained(tmp_path / "saved")
        bert.bert.save_pretrained(tmp_path / "part")
        loop.save_model(str(tmp_path / "with"))

    loop = trainer(bert, samples(ROWS), {"beta_mode": "learned"})
    loop.add_callback(OnStep(transformers, save))
    loop.train()
    for folder, kind in (("saved", type(bert)), ("part", type(bert.bert)), ("with", type(bert))):
        _, info = kind.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert (tmp_path / folder / "vcl_betas.safetensors").exists() == (folder == "with")
    assert not [name for name in bert._keys_to_ignore_on_save or () if "vcl" in name]  # noqa: SLF001


def test_a_checkpoint_of_other_layers_is_an_error(bert, trainer, tmp_path):
    data, saves = samples(2 * ROWS), {"save_strategy": "steps", "save_steps": 1}
    trainer(copy.deepcopy(bert), data, {"beta_mode": "learned"}, **saves).train()
    loop = trainer(bert, data, {"beta_mode": "learned", "layers": LAYERS[:2]})
    with pytest.raises(ValueError, match=r"the checkpoint has 3 betas and the model 2; they differ in bert.pooler"):
        loop.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    (tmp_path / "out/checkpoint-1/vcl_betas.safetensors").unlink()
    with pytest.raises(ValueError, match="has 0 betas and the model 3"):
        trainer(bert, data, {"beta_mode": "running"}).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))


def test_each_new_model_is_attached(bert, trainer):
    made = []

    def model_init():
        made.append(copy.deepcopy(bert))
        return made[-1]

    data = samples(ROWS)
    loop = trainer(None, data, {"weight": WEIGHT, "beta_mode": "learned"}, options={"model_init": model_init})
    for number in (2, 3):
        loop.train()
        assert len(made) == number
        assert_same(step(bert, made[-1]), gradients(bert, batched(data), task))


def test_a_subclass_of_trainer_gets_vcl(bert, trainer, transformers):
    from vcl_kernels.integrations.transformers import VCLTrainer

    class Doubles(transformers.Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return 2 * super().compute_loss(model, inputs, **kwargs)

    before, data = copy.deepcopy(bert), samples(ROWS)
    trainer(bert, data, kind=type("Both", (VCLTrainer, Doubles), {})).train()
    assert_same(step(before, bert), gradients(before, batched(data), lambda *args: 2 * task(*args)))


def test_a_module_of_your_own_is_trained(trainer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 3))

        def forward(self, x, labels):
            return {"loss": F.cross_entropy(self.body(x), labels)}

    net, draw = Net(), torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(4, generator=draw), "labels": torch.tensor(i % 3)} for i in range(3 * ROWS)]
    before = copy.deepcopy(net)
    trainer(net, data, gradient_accumulation_steps=3).train()
    assert_same(step(before, net), gradients(before, batched(data), lambda net, batch: net(**batch)["loss"]))


def test_a_handle_of_your_own_stays(bert, trainer):
    before, data = copy.deepcopy(bert), samples(3 * ROWS)
    handle = vk.attach(bert, batched(data)[0], weight=WEIGHT, inject=True)
    trainer(bert, data, handle, gradient_accumulation_steps=3, learning_rate=0.0).train()
    assert (handle.accumulation, handle.weight) == (1, WEIGHT)  # again
    handle.weight = 0.1
    trainer(bert, data, {"handle": handle, "weight": WEIGHT}, gradient_accumulation_steps=3).train()
    assert vk.handle_of(bert) is handle
    assert (handle.accumulation, handle.weight) == (1, 0.1)  # again
    handle.remove()
    assert_same(step(before, bert), gradients(before, batched(data), task))


def test_what_cannot_work_is_an_error(bert, trainer):
    data = samples(ROWS)
    handle = vk.attach(bert, batched(data)[0])
    for vcl in (handle, {"weight": 0.1}):
        with pytest.raises(ValueError, match="the model's handle must be made with inject=True"):
            trainer(bert, data, vcl).train()
    assert handle.weight == 0.01
    handle.remove()
    with pytest.raises(TypeError, match="vcl must be a mapping of settings or a VCLHandle; got a float"):
        trainer(bert, data, 0.1)
    for vcl in ({"wieght": 0.1}, {1: 2}, {"model": bert}):
        with pytest.raises(TypeError, match=f"unknown settings {next(iter(vcl))}; those of attach are"):
            trainer(bert, data, vcl)
    with pytest.raises(ValueError, match="handle must be of the model .* it was removed"):
        trainer(bert, data, handle).train()
    optimizer = torch.optim.SGD(bert.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers must hold the betas"):
        trainer(bert, data, {"beta_mode": "learned"}, options={"optimizers": (optimizer, None)}).train()
    assert not any(isinstance(module, vk.VCLActivation) for module in bert.modules())


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(samples(2 * ROWS))


@pytest.mark.parametrize(
    ("data", "options", "match"),
    [
        (Stream(), {}, r"train_dataset \(Stream\) gives no samples"),
        ([], {}, r"no example could be made of train_dataset \(list; IndexError"),
        (samples(2), {"data_collator": list}, "no example could be made of train_dataset"),
        ([{"text": torch.ones(3)}] * 20, {}, "no example could be made of train_dataset"),
    ],
)
def test_data_without_an_example_is_an_error(data, options, match, bert, trainer):
    with pytest.raises(ValueError, match=match):
        trainer(bert, data, options=options, max_steps=1).train()


def test_samples_that_the_model_does_not_take_are_an_error(trainer):
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU())  # whose forward takes "input"
    with pytest.raises(ValueError, match=r"the model takes input; samples have .*: give vcl=.\"example_input\""):
        trainer(net, [{"x": torch.ones(4)}] * 20, max_steps=1, remove_unused_columns=False).train()


def test_an_example_can_be_given(bert, trainer):
    before, data = copy.deepcopy(bert), batched(samples(ROWS))
    trainer(bert, Stream(), {"example_input": data[0], "weight": WEIGHT}, max_steps=1).train()
    assert_same(step(before, bert), gradients(before, data, task))


def test_the_example_uses_up_no_random_numbers(bert, trainer):
    class Draws(list):
        def __getitem__(self, i):
            drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
            return super().__getitem__(i)

    drawn, data = [], samples(ROWS)
    trainer(bert, Draws(data), learning_rate=0.0).train()
    with_vcl, drawn[:] = drawn[2:], []
    vk_free = trainer(bert, Draws(data), learning_rate=0.0)
    vk_free._vcl_attach = lambda _model: vk.attach(bert, batched(data)[0], inject=True)  # noqa: SLF001
    vk_free.train()
    assert with_vcl == drawn


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_trained_and_logged(bert, trainer):
    before, data = copy.deepcopy(bert), samples(ROWS)
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    loop = trainer(bert, data * 2, logging_strategy="steps", logging_steps=2, learning_rate=0.0, **compiled)
    loop.train()
    for found in loop.gradients:  # the first step is compiled, the second is measured
        assert_same(found, gradients(before, batched(data), task))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # noqa: SLF001
    assert [entry["step"] for entry in loop.state.log_history if "vcl_loss" in entry] == [2]


def test_memory_that_is_too_small_for_a_batch_is_told_once(bert, trainer):
    before, data, failed = copy.deepcopy(bert), samples(2 * ROWS), []
    loop = trainer(bert, data, per_device_train_batch_size=2 * ROWS, auto_find_batch_size=True, max_steps=1)
    compute = loop.compute_loss

    def compute_loss(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise RuntimeError("CUDA out of memory.")
        return compute(*args, **kwargs)

    loop.compute_loss = compute_loss
    loop.train()
    rows = loop._train_batch_size  # noqa: SLF001
    assert ROWS <= rows < 2 * ROWS
    first = {key: torch.stack([sample[key] for sample in data[:rows]]) for key in data[0]}
    assert_same(loop.gradients[0], gradients(before, [first], task))
    assert not any(isinstance(module, vk.VCLActivation) for module in bert.modules())


def test_the_best_model_has_its_betas(bert, trainer):
    data, values, seen = samples(3 * ROWS), iter([0.0, 1.0, 2.0]), []
    handle = vk.attach(bert, batched(data)[0], weight=WEIGHT, beta_mode="learned", inject=True)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "falls", "greater_is_better": False}
    steps = {f"{what}_strategy": "steps" for what in ("eval", "save")} | {"eval_steps": 1, "save_steps": 1}

    def metrics(_prediction):
        seen.append({name: beta.clone() for name, beta in attached_betas(bert).items()})
        return {"falls": next(values)}

    options = {"eval_dataset": data[:ROWS], "compute_metrics": metrics}
    trainer(bert, data, handle, options=options, **best, **steps).train()
    torch.testing.assert_close(attached_betas(bert), seen[0], rtol=0, atol=0)
    assert not torch.equal(*(next(iter(betas.values())) for betas in (seen[0], seen[2])))


def test_deepspeed_in_float16_is_refused(bert, trainer):
    loop = trainer(bert, samples(ROWS))
    loop.is_deepspeed_enabled, loop.args.fp16 = True, True
    with pytest.raises(ValueError, match="VCLTrainer does not work with DeepSpeed in float16"):
        loop._vcl_attach(bert)  # noqa: SLF001


def test_the_example_learns(transformers, tmp_path):
    from examples import transformers_trainer

    assert transformers.Trainer  # imported first
    quiet = {"use_cpu": True, "disable_tqdm": True}
    assert transformers_trainer.main(epochs=20, images=300, folder=str(tmp_path), **quiet) < 75  # of 90 by chance
