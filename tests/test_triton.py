"""How launches of the Triton backend are decided."""

import pytest
import torch
import triton.language as tl
from common import results, set_limit
from conftest import GPU

import vcl_kernels as vk
from benchmarks.structure.launches import activation_jobs, loss_jobs, moments_jobs, recorded, spec_of
from vcl_kernels.backends.interface import Coefficients
from vcl_kernels.backends.triton import moments, multiply, ops
from vcl_kernels.backends.triton.launch import Launch
from vcl_kernels.checks import check_loss
from vcl_kernels.options import SubBatches

pytestmark = pytest.mark.skipif(GPU, reason="its tensors are on the CPU, which takes the interpreter")


def launches_of(shape, dtype=torch.float32, memory_format=torch.contiguous_format, **spec):
    """What a loss, an activation and moments launch, forward and backward, of a tensor of that shape."""
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    given = spec_of(x, "relative_variance", **spec)
    jobs = {**loss_jobs(x, given), **activation_jobs(x, given, "gelu"), **moments_jobs(x, given)}
    return [one for job in jobs.values() for one in recorded(job)]


def kernels_of(shapes):
    """How many kernels that takes: sizes are all given at run time, of 32 or 64 bits."""
    found = set()
    for shape in shapes:
        for launch, tensors, _ in launches_of(shape):
            kinds = (*(t is not None and t.dtype for t in tensors), *(size > 2**31 for size in launch.sizes.values()))
            found.add((launch.kernel.__name__, launch.warps, *launch.constants.items(), kinds))
    return len(found)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(64, 40, 7, 7), (64, 64, 40, 40)])
def test_no_kernel_is_specialised_for_a_size(shape, memory_format):
    for launch, tensors, scalars in launches_of(shape, memory_format=memory_format):
        decorator = getattr(launch.kernel, "kwargs", vars(launch.kernel))  # of the interpreter's stand-in, or its own
        assert set(launch.sizes) <= set(decorator["do_not_specialize"] or ()), launch.kernel.__name__
        assert all(t is None or isinstance(t, torch.Tensor) for t in tensors)
        assert all(type(number) is float for number in scalars)


def test_changing_sizes_share_kernels():
    """Images of any size, and layers of any number of channels."""
    one = kernels_of([(64, 64, 40, 40)])
    assert kernels_of((64, 64, size, size + 4 * more) for size in range(36, 64, 4) for more in range(4)) <= one + 3
    assert kernels_of((64, channels, 40, 40) for channels in range(264, 500, 8)) == kernels_of([(64, 264, 40, 40)])
    assert kernels_of((64, 16, size, size) for size in range(33, 97, 2)) == kernels_of([(64, 16, 33, 33)])


def test_sizes_past_32_bits_reach_kernels_whole():
    """n · P is 2^31: a product of 32 bits would be negative, and nothing would be written."""
    huge = launches_of((64, 4, 8192, 8192), torch.bfloat16, torch.channels_last, n=32)
    sizes = [one.launch.sizes for one in huge if one.launch.name in ("moments_unit", "backward_unit", "finalise")]
    assert len(sizes) > 5
    assert {of.get("n", of.get("M")) for of in sizes} == {2**31}
    for launch in (one.launch for one in huge if one.launch.name == "backward_unit"):
        programs = (
            -(-launch.sizes["n"] // launch.sizes["rows_of_part"])
            * 2
            * -(-launch.sizes["U"] // launch.constants["T"].UB)
        )
        assert launch.grid == (programs,)


@pytest.mark.parametrize("outlier", [0.0, 30.0, 300.0])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((65536, 4), torch.contiguous_format),
        ((1024, 2, 8, 8), torch.contiguous_format),
        ((128, 2, 24, 24), torch.contiguous_format),
        ((128, 2, 24, 24), torch.channels_last),
    ],
)
def test_a_first_value_may_be_an_outlier(shape, memory_format, outlier, monkeypatch):
    """It is taken off all others of an element, of which there are many: no GPU is to be filled with programs."""
    set_limit(monkeypatch, moments, "WARPS", 1)
    x = torch.randn(shape)
    if outlier:
        x[0, :].view(shape[1], -1)[:, 0] = outlier
    _, found = vk.sub_batch_moments(x.to(memory_format=memory_format), shape[0], backend="triton")
    dims = [0, *range(2, x.dim())]
    exact = x.double().var(dims)
    off, eager = (((var.double() - exact) / exact).abs().max() for var in (found[0], x.var(dims)))
    assert off <= 2 * eager + 2**-23


def test_a_gradient_in_one_pass_with_an_outlier_in_the_first_row():
    """Of other rows, whose values are small: a difference from that row has lost their digits."""
    x = torch.randn(10, 3, 14, 14)
    x[0, :, 0, 0] = 100.0
    given = {"form": "relative_variance", "sub_batch_size": 5}
    _, exact = results(vk.reference.vcl_loss, x.double(), **given)
    _, ours = results(vk.vcl_loss, x, backend="triton", **given)
    _, eager = results(vk.reference.vcl_loss, x, **given)
    scale = exact[1:5].square().mean().sqrt()
    off, of_eager = ((dx - exact)[1:5].abs().max() / scale for dx in (ours, eager))
    assert off <= 2 * of_eager + 2**-22


def test_no_product_of_sizes_is_of_32_bits():
    """The first program of launches whose sizes pass 2^31 in a product alone: as arguments they are below it."""
    dx, g = torch.full((4096,), 2.0), torch.tensor(0.5)
    multiply.multiply[(1,)](multiply.Tensors(dx, g), 2**28, ALIGNED=16, ACC=tl.float32, EB=4096)
    assert (dx == 1.0).all()
    x = torch.empty((1, 2**31), dtype=torch.float32, device="meta")
    mean, cut = x.new_empty((1, 2**31)), SubBatches(1, 1, True)
    jobs = {
        "partial": lambda: ops.moments(x, cut),
        "dx": lambda: ops.moments_dx(x, Coefficients(mean, mean), None, cut, 1),
    }
    for written, job in jobs.items():
        launch, tensors, scalars = recorded(job)[0]
        assert launch.sizes["to_row"] < 2**31
        real = {id(t): torch.ones(256, dtype=t.dtype) for t in tensors if t is not None}
        tensors = type(tensors)(*(real.get(id(t)) for t in tensors))
        launch._replace(grid=(1,))(tensors, *scalars)
        found = getattr(tensors, written)
        assert (found == 0).sum() == launch.constants["T"].UB  # m2 of one value, and 1 · (1 - 1)


@pytest.mark.parametrize(
    ("shape", "n"), [((2**31 - 1, 2), 4), ((4, 2, 2**31 - 2**16), 2), ((2**16 + 1, 2, 2**15 - 1), 2**16 + 1)]
)
def test_sizes_whose_last_tile_would_pass_32_bits_are_refused(shape, n):
    x = torch.empty(shape, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=r"x has .* rows, 2 units of .* among the last 65536 numbers below 2\^31"):
        ops.moments(x, SubBatches(n, 1, False))


def test_a_unit_of_many_positions_has_a_run_of_its_own():
    """Distances within a run are 32 bits wide."""
    for launch, *_ in launches_of((3, 5, 1 << 15, 1 << 15), torch.bfloat16, n=1):
        assert "T" not in launch.constants or launch.constants["T"].run_kind == "alone"


@pytest.mark.parametrize(
    ("constant", "name", "kernel"),
    [
        ("FORM", "loss and dx", "one_pass"),
        ("BETA", "elu", "finalise"),
        ("ACTIVATION", "elu", "moments"),
        ("ACTIVATION", "dx of elu and loss", "backward"),
    ],
)
def test_no_kernel_takes_an_unknown_case_for_another(constant, name, kernel):
    x = torch.zeros(16, 3, 4, 4)
    spec = spec_of(x, "relative_variance")
    jobs = {**loss_jobs(x, spec), **activation_jobs(x, spec, "elu")}
    launch, tensors, scalars = next(one for one in recorded(jobs[name]) if one.launch.name.startswith(kernel))
    tensors = type(tensors)(*(None if t is None else torch.ones_like(t) for t in tensors))
    launch(tensors, *scalars)
    with pytest.raises(Exception, match=f"unknown {constant}"):
        launch.of(**{constant: "other"})(tensors, *scalars)


def test_more_programs_than_a_grid_holds_are_refused():
    launch = Launch(None, (2**31,), {}, {}, {}, 1)
    with pytest.raises(ValueError, match=r"x would take 2147483648 programs.*2147483647"):
        launch((torch.zeros(1),))


OVERFLOWS = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # as they must


@OVERFLOWS
@pytest.mark.parametrize("size", [1e19, 1e36])
@pytest.mark.parametrize("shape", [(16, 4, 7, 7), (64, 8), (8, 2, 41, 41), (10, 3, 30, 30)], ids=str)
def test_squares_past_the_range_of_float32(kernel_backend, shape, size):
    """In one pass and in two, by runs and by unit."""
    x = size * torch.randn(shape) * torch.rand(shape[0]).add(0.5).view(-1, *[1] * (len(shape) - 1))
    settings = {"form": "relative_variance", "sub_batch_size": 4}
    exact = vk.reference.vcl_loss(x.double(), **settings)
    loss, dx = results(vk.vcl_loss, x, backend=kernel_backend, **settings)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    assert dx.isfinite().all()  # of the order of 1 / size²: float32 has less and less of it
    y, loss = vk.vcl_activation(x, "relu", backend=kernel_backend, **settings)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    assert torch.equal(y, x.relu())


@OVERFLOWS
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_and_small_units_in_one_tile(channels_last):
    """Only what passed the range is taken again: a small neighbour keeps its digits."""
    x = torch.randn(20, 6, 7, 7)
    x[:, 2] *= 1e25
    x[:, 4] *= 1e-10
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    _, var = vk.sub_batch_moments(x, 4, backend="triton")
    _, exact = vk.reference.sub_batch_moments(x.double(), 4)
    torch.testing.assert_close(var.double()[:, [0, 1, 3, 4, 5]], exact[:, [0, 1, 3, 4, 5]], rtol=1e-6, atol=0)
    for form in ("ratio", "relative_variance"):
        each = {"form": form, "sub_batch_size": 4, "reduction": "none"}
        loss = vk.vcl_loss(x, 0.0, backend="triton", **each)
        torch.testing.assert_close(loss.double(), vk.reference.vcl_loss(x.double(), 0.0, **each), rtol=1e-5, atol=0)


def test_one_pass_of_what_does_not_fit_in_the_layout_that_a_compiler_chose():
    """Whether a unit fits is asked of the layout of tracing: contiguous, where more fits than in channels_last."""
    x = torch.randn(10, 8, 24, 24)
    moved = x.to(memory_format=torch.channels_last)
    _, spec = check_loss(x, 0.5, 5, "ratio", "channel", None, "mean")
    assert ops.takes_one_pass(x, spec)
    assert not ops.takes_one_pass(moved, spec)
    torch.testing.assert_close(ops.loss_dx(moved, None, spec, False), ops.loss_dx(x, None, spec, False))
