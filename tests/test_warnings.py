"""VCL that does nothing, or something else than is meant, says so once; a training loop that is right hears nothing."""

import copy
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from common import LEARNED
from torch import nn
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8  # more than any warning waits for


def batch(rows=20):
    return torch.randn(rows, 4)


class Net(nn.Module):
    """Two parts that may run alone: one with a fused activation, one with a hooked one."""

    def __init__(self, checkpointing=None, times=1):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(4, 8), nn.ELU())
        self.decode = nn.Sequential(nn.Linear(8, 8), nn.Hardswish(), nn.Linear(8, 4))
        self.checkpointing, self.times = checkpointing, times

    def forward(self, x):
        for _ in range(self.times):
            if self.checkpointing:
                x = self.decode(checkpoint(self.encode, x.requires_grad_(), use_reentrant=self.checkpointing == "old"))
            else:
                x = self.decode(self.encode(x))
        return x

    def by_parts(self, x):
        return self.decode(self.encode(x))


class Training:
    """A model with VCL, its optimizer, and pieces of a training loop."""

    def __init__(self, net=None, *, optimizer_first=False, added=True, **options):
        self.net = self.call = net or Net()
        parameters = list(self.net.parameters())
        self.handle = vk.attach(self.net, batch(2), **{**LEARNED, **options})
        self.added = added and not options.get("inject")
        self.optimizer = torch.optim.Adam(parameters if optimizer_first else self.net.parameters(), lr=0.01)

    def objective(self, x):
        objective = self.call(x).square().mean()
        return objective + self.handle.loss() if self.added else objective

    def step(self, *batches):
        for x in batches or [batch()]:
            self.objective(x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, *batches, call=None):
        self.call = call or self.call
        repeated(lambda t: t.step(*batches))(self)

    def validate(self, gradients=False):
        self.net.eval()
        with torch.set_grad_enabled(gradients):
            objective = self.objective(batch(7))
        self.net.train()
        return objective

    def moved(self):
        return [bool((beta != 1).any()) for beta in self.handle.parameters()]


def repeated(body):
    return lambda t: [body(t) for _ in range(STEPS)]


# Loops that are right


def epochs(t, calls=1):
    for rows in [20, 20, 7, 20, 20, 7]:
        t.step(*[batch(rows)] * calls)


def whole_training(t):
    for gradients in (False, True):
        t.validate(gradients)
        epochs(t)


def zeroing(t, zero):
    for _ in range(STEPS):
        zero(t)
        t.objective(batch()).backward()
        t.optimizer.step()


def scaled(t, told=False, every=1):
    scaler = torch.amp.GradScaler("cpu")
    if told:
        t.handle.grad_scaler = scaler
    for step in range(2 * STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            objective = t.objective(batch())
        scaler.scale(objective).backward()
        if step % every == every - 1:
            scaler.step(t.optimizer)
            scaler.update()
            t.optimizer.zero_grad()


def paused_step(t):
    with t.handle.paused():
        t.step()
        t.call(batch()).sum().backward()
    t.step()


def parts_alone(t):
    t.call = t.net.by_parts
    whole_training(t)


def closures(t):
    lbfgs, x = torch.optim.LBFGS(t.net.parameters(), max_iter=3), batch()

    def closure():
        lbfgs.zero_grad()
        objective = t.objective(x)
        objective.backward()
        return objective

    for _ in range(STEPS):
        lbfgs.step(closure)


def paused(t):
    with t.handle.paused():
        t.step()


def fused_optimizer(t):
    held = [p for group in t.optimizer.param_groups for p in group["params"]]
    t.optimizer = torch.optim.AdamW(held, lr=0.01, fused=True)


def several_optimizers(t, every=1):
    betas = list(t.handle.parameters())
    others = [p for p in t.net.parameters() if not any(p is beta for beta in betas)]
    t.optimizer, of_betas = (torch.optim.SGD(held, 0.1) for held in (others, betas))
    for step in range(2 * STEPS):
        t.step()
        if step % every == 0:
            of_betas.step()
            of_betas.zero_grad()


def losses_of_layers(t):
    for _ in range(STEPS):
        y = t.call(batch())
        (y.square().mean() + sum(vcl.loss for vcl in t.handle.layers.values())).backward()
        t.optimizer.step()


def validated_before_backward(t):
    objective = t.objective(batch())
    t.validate()
    objective.backward()
    t.optimizer.step()


RIGHT = {
    "plain": Training.steps,
    "accumulation": lambda t: t.steps(batch(), batch(), batch()),
    "epochs": epochs,
    "last batch in several calls": partial(epochs, calls=3),
    "validation": repeated(lambda t: (t.step(), t.validate())),
    "validation with gradients": repeated(lambda t: (t.validate(gradients=True), t.step())),
    "warm-up": lambda t: (t.call(batch()), t.validate(), t.steps()),
    "acting": repeated(lambda t: (torch.no_grad()(t.call)(batch(1)), t.step())),
    "optimizer's zero_grad": partial(zeroing, zero=lambda t: t.optimizer.zero_grad()),
    "zeros": partial(zeroing, zero=lambda t: t.optimizer.zero_grad(set_to_none=False)),
    "model's zero_grad": partial(zeroing, zero=lambda t: t.net.zero_grad()),
    "scaler": partial(scaled, told=True),
    "paused between": repeated(paused_step),
    "parts alone": parts_alone,
    "closures": closures,
    "losses of layers": losses_of_layers,
    "an optimizer of betas": several_optimizers,
    "an optimizer of betas, now and then": partial(several_optimizers, every=8),
    "paused warm-up": lambda t: (repeated(lambda t: (paused(t), t.validate(gradients=True)))(t), t.steps()),
    "fused optimizer": lambda t: (fused_optimizer(t), t.steps()),
    "siamese": repeated(lambda t: ((t.objective(batch()) + t.objective(batch())).backward(), t.optimizer.step())),
    "a part in training": lambda t: (t.net.encode.eval(), t.steps()),
    "model under checkpoint": lambda t: t.steps(call=lambda x: checkpoint(t.net, x, use_reentrant=False)),
    "validated before backward": repeated(validated_before_backward),
}


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("loop", RIGHT.values(), ids=RIGHT)
def test_a_right_loop_hears_nothing_and_moves_the_betas(loop, inject):
    t = Training(inject=inject)
    loop(t)
    assert t.moved()[-1]


@pytest.mark.parametrize("mode", ["fixed", "running"])
@pytest.mark.parametrize("name", [name for name in RIGHT if "betas" not in name])
def test_a_right_loop_without_learned_betas_hears_nothing(name, mode):
    t = Training(beta_mode=mode, unit="activation")
    before = [p.clone() for p in t.net.parameters()]
    RIGHT[name](t)
    assert list(t.handle.parameters()) == []
    assert any(not torch.equal(a, b) for a, b in zip(before, t.net.parameters(), strict=True))


@pytest.mark.parametrize("loop", [epochs, repeated(validated_before_backward)])
@pytest.mark.parametrize("net", [{"checkpointing": "new"}, {"checkpointing": "old"}, {"times": 2}])
@pytest.mark.parametrize("options", [{"inject": True}, {"shared_beta": True}, {}])
def test_a_right_loop_with_layers_that_run_again_hears_nothing(net, options, loop):
    old = {"layers": ["decode.1"]} if net.get("checkpointing") == "old" and not options.get("inject") else {}
    t = Training(Net(**net), **options, **old)
    loop(t)
    assert all(t.moved())


def test_betas_that_are_not_to_move_are_not_told():
    t = Training()
    t.net.encode[1].requires_grad_(False), t.net.decode[1].requires_grad_(False)
    t.steps()
    t = Training(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)), nn.Linear(4, 4)))
    for i, part in enumerate(t.net):
        part.requires_grad_(i == 2)
    t.steps()
    assert t.moved() == [False, False, True, False, False, False]


@pytest.mark.parametrize("how", ["requires_grad", "no_grad"])
def test_a_frozen_trunk_runs_without_vcl(how):
    t, ran = Training(), []
    t.net.encode.requires_grad_(how == "no_grad")
    if how == "no_grad":
        t.net.encode.forward = torch.no_grad()(t.net.encode.forward)
    for name, vcl in t.handle.layers.items():
        vcl.register_forward_hook(lambda *_, name=name: ran.append(name))
    t.steps()
    assert ran == ["decode.1"] * STEPS
    assert t.moved() == [False, True]


# Loops that are wrong


def twice(t, call):
    t.steps(call=lambda x: call(x) + call(x + 1))


def read_too_late(t):
    y = t.call(batch())
    with torch.no_grad():
        t.net.eval()(batch())
    t.net.train()
    (y.sum() + t.handle.loss()).backward()


def float16(t):
    with torch.autocast("cpu", torch.float16):
        t.call(batch()).float().sum().backward()


ROWS = r"layer 'encode.1' got an input of shape \(8, 8\).* fewer than 2 \* sub_batch_size = 10 rows.* Take larger"
ROWS_COMPILED = ROWS.replace(r" of shape \(8, 8\)", "( of shape.*)?")
UNREAD = r"handle.loss\(\) was never read.* Add handle.loss\(\) to the objective of each forward, or .*inject=True"
SEVERAL = r"ran more than once.* Read it after each forward and add the results. .* `with handle.paused\(\):`"
DROPPED = r"its loss is lost. Read handle.loss\(\) before the model runs in evaluation"
BETAS = r"no beta of VCL could change. It does not hold them: make it after attach, or call optimizer.add_param_group"
NO_GRADIENTS = (
    r"no beta of VCL could change. It has them, and they have no gradient: add handle.loss\(\) to the objective"
)
SCALER = r"With inject=True .* divides the gradient of VCL by the scale. Set handle.grad_scaler = scaler.*, or None"

WRONG = {
    "rows": (lambda t: t.steps(batch(8)), {}, ROWS),
    "rows, injected": (lambda t: t.steps(batch(8)), {"inject": True}, ROWS),
    "rows after enough": (lambda t: (t.steps(), t.steps(batch(8))), {}, ROWS),
    "rows of parts": (lambda t: t.steps(batch(8), call=t.net.by_parts), {}, ROWS),
    "unread": (Training.steps, {"added": False}, UNREAD),
    "unread parts": (lambda t: t.steps(call=t.net.by_parts), {"added": False}, UNREAD),
    "unread, a part in training": (lambda t: (t.net.eval().decode.train(), t.steps()), {"added": False}, UNREAD),
    "twice": (lambda t: twice(t, t.net), {}, SEVERAL),
    "twice by parts": (lambda t: twice(t, t.net.by_parts), {}, SEVERAL),
    "read too late": (repeated(read_too_late), {}, DROPPED),
    "evaluation": (lambda t: (t.net.eval(), t.steps()), {}, r"runs in evaluation mode. Call model.train\(\)"),
    "optimizer first": (Training.steps, {"optimizer_first": True}, BETAS),
    "optimizer first, injected": (Training.steps, {"optimizer_first": True, "inject": True}, BETAS),
    "optimizer first, zero_grad": (RIGHT["model's zero_grad"], {"optimizer_first": True}, BETAS),
    "fused optimizer first": (lambda t: (fused_optimizer(t), t.steps()), {"optimizer_first": True}, BETAS),
    "evaluation, fused optimizer": (
        lambda t: (fused_optimizer(t), t.net.eval(), t.steps()),
        {},
        "runs in evaluation mode",
    ),
    "layers in evaluation": (
        lambda t: (t.net.encode.eval(), t.net.decode[1].eval(), t.steps()),
        {},
        "no layer with VCL got an input .* or the layers are in evaluation mode",
    ),
    "not added": (repeated(lambda t: (t.step(), t.handle.loss())), {"added": False}, NO_GRADIENTS),
    "float16": (float16, {"inject": True}, f"layer 'encode.1' has a float16 input.*{SCALER}"),
    "scaler": (scaled, {"inject": True}, SCALER),
    "scaler, accumulation": (partial(scaled, every=5), {"inject": True}, SCALER),
    "scaler, warm-up": (lambda t: (t.call(batch()), scaled(t)), {"inject": True}, SCALER),
    "reentrant": (
        lambda t: (setattr(t.net, "checkpointing", "old"), t.steps()),
        {},
        "layer 'encode.1'.*reentrant=False",
    ),
    "frozen parts": (
        lambda t: (t.net.requires_grad_(False).decode[2].requires_grad_(), t.steps(call=t.net.by_parts)),
        {},
        "no layer with VCL got an input",
    ),
    "frozen": (
        lambda t: (t.net.requires_grad_(False).decode[2].requires_grad_(), t.steps()),
        {},
        "no layer with VCL got an input",
    ),
}


def warned(run):
    """The warnings of VCL that ``run`` gives; others are errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", vk.VCLWarning)
        run()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("loop", "options", "wanted"), WRONG.values(), ids=WRONG)
def test_a_wrong_loop_is_told_once(loop, options, wanted):
    t = Training(**options)
    found = warned(lambda: (loop(t), loop(t)))
    assert len(found) == 1, found
    assert re.search(wanted, found[0]), found[0]


def test_each_kind_is_told_and_each_copy_tells():
    t = Training()
    assert len(warned(lambda: (t.steps(batch(8)), twice(t, t.net)))) == 2
    for net in (copy.deepcopy(t.net), pickle.loads(pickle.dumps(t.net))):
        assert len(warned(lambda net=net: net(batch(8)))) == 1


def test_a_training_forward_without_gradients_before_the_loss_is_an_error():
    t = Training()
    for _ in range(2):
        t.net(batch())
        with torch.no_grad():
            t.net(batch())
        with pytest.raises(
            RuntimeError,
            match=r"ran without grad mode, under torch.no_grad\(\).* Run a forward under no_grad in evaluation",
        ):
            t.handle.loss()
        t.step()


# Compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled", "ignore:The .grad attribute of a Tensor")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("what", "fullgraph", "loop", "options", "wanted"),
    [
        ("model", True, whole_training, {}, None),
        ("step", False, whole_training, {"inject": True}, None),
        ("step", True, whole_training, {}, None),
        ("parts", True, whole_training, {}, None),
        ("model", True, Training.steps, {"added": False}, UNREAD),
        ("part", True, Training.steps, {"added": False}, UNREAD),
        ("model", True, lambda t: (t.step(), t.steps(batch(8))), {}, ROWS_COMPILED),
        ("step", True, lambda t: t.steps(batch(8)), {"inject": True}, ROWS_COMPILED),
        ("model", True, Training.steps, {"optimizer_first": True}, BETAS),
    ],
)
def test_compiled_loops_are_told_the_same(what, fullgraph, loop, options, wanted):
    t = Training(**options)
    compiled = partial(torch.compile, backend="eager", fullgraph=fullgraph)
    if what == "step":
        t.objective = compiled(t.objective)
    elif what != "parts":
        t.call = compiled(t.net if what == "model" else t.net.encode)
    else:
        encode, decode = compiled(t.net.encode), compiled(t.net.decode)
        t.call = lambda x: decode(encode(x))
    found = warned(lambda: loop(t))
    assert len(found) == (wanted is not None), found
    assert re.search(wanted, found[0]) if wanted else all(t.moved()), found
