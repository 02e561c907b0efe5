"""Every error a caller can make names the argument, what came and what is wanted."""

import pytest
import torch

import vcl_kernels as vk
from vcl_kernels.backends import cpu

X = torch.randn(20, 6, 4)


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((X.long(),), {}, TypeError, "x must be float.*int64"),
        (([1.0],), {}, TypeError, "x must be a Tensor; got list"),
        ((X[:, 0, 0],), {}, ValueError, r"x must have 2 to 8 dimensions.*\(20,\)"),
        ((X[:9],), {}, ValueError, "x has 9 samples.*at least 10"),
        ((X,), {"num_sub_batches": 5}, ValueError, "x has 20 samples.*num_sub_batches=5.*25"),
        ((X,), {"num_sub_batches": 1}, ValueError, "num_sub_batches must be at least 2; got 1"),
        ((X,), {"sub_batch_size": 0}, ValueError, "sub_batch_size must be at least 1; got 0"),
        ((X,), {"sub_batch_size": 2.0}, TypeError, "sub_batch_size must be an int"),
        ((X,), {"sub_batch_size": 1, "unit": "activation"}, ValueError, "sub_batch_size=1 gives 1 value"),
        ((X[..., 0],), {"sub_batch_size": 1}, ValueError, "sub_batch_size=1 gives 1 value"),
        ((X, torch.ones(5)), {}, ValueError, r"beta must have shape \(\) or \(6,\).*\(5,\)"),
        ((X, torch.ones(6)), {"unit": "activation"}, ValueError, r"\(6, 4\)"),
        ((X, torch.ones(6, device="meta")), {}, ValueError, "beta must be on x's device, cpu; got meta"),
        ((X, torch.ones(6, dtype=torch.float64)), {}, TypeError, "beta must be torch.float32.*float64"),
        ((X, "1"), {}, TypeError, "beta must be a float or a Tensor; got str"),
        ((X, 1.0), {"form": "variance"}, ValueError, "takes no beta; got 1.0"),
        ((X,), {"form": "var"}, ValueError, "form must be one of 'ratio'.*got 'var'"),
        ((X,), {"unit": ["channel"]}, ValueError, r"unit must be one of.*\['channel'\]"),
        ((X, [1.0]), {}, TypeError, "beta must be a float or a Tensor; got list"),
        ((X,), {"unit": "neuron"}, ValueError, "unit must be one of.*'neuron'"),
        ((X,), {"reduction": "max"}, ValueError, "reduction must be one of.*'max'"),
        ((X,), {"backend": "cuda"}, ValueError, "backend must be None or one of.*'cuda'"),
    ],
)
def test_errors(args, options, error, match):
    with pytest.raises(error, match=match):
        vk.vcl_loss(*args, **options)


def test_what_was_checked_before_is_not_taken_for_what_equals_it():
    vk.vcl_loss(X, sub_batch_size=1)
    with pytest.raises(TypeError, match="sub_batch_size must be an int; got True"):
        vk.vcl_loss(X, sub_batch_size=True)
    vk.vcl_loss(X, torch.ones(6))
    with pytest.raises(ValueError, match=r"beta must have shape"):
        vk.vcl_loss(X, torch.ones(6), unit="activation")


def test_a_weight_that_may_change_by_itself_is_an_error():
    vcl = vk.VCL(6, weight=0.5)
    vcl(X)
    before = vcl.loss
    vcl.weight = 1.0
    vcl(X)
    torch.testing.assert_close(vcl.loss, 2 * before)
    vcl.weight = torch.tensor(1.0)
    with pytest.raises(TypeError, match=r"weight must be a float; got tensor\(1\.\)"):
        vcl(X)
    for name in ("weight", "beta_init", "beta_min"):
        with pytest.raises(TypeError, match=f"{name} must be a float"):
            vk.VCL(6, **{name: torch.tensor(0.1)})


def test_backends_say_what_is_missing(monkeypatch):
    assert vk.backends() == {"cpu": "available", "triton": "available", "reference": "available"}
    monkeypatch.setattr(cpu, "_reason", cpu._not_built())
    assert "was not built; install a C++20 compiler" in vk.backends()["cpu"]
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: .*not built"):
        vk.vcl_loss(X, backend="cpu")
    assert torch.equal(vk.vcl_loss(X), vk.reference.vcl_loss(X))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA or ROCm device"):
            vk.vcl_loss(X, backend="triton")


def test_an_extension_that_does_not_load_leaves_the_reference(monkeypatch, tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_text("x")
    monkeypatch.setattr(cpu, "_library_path", lambda: broken)
    monkeypatch.setattr(cpu, "_reason", None)
    cpu.load()
    assert "_C.abi3.so cannot be loaded" in vk.backends()["cpu"]
    assert torch.equal(vk.vcl_loss(X), vk.reference.vcl_loss(X))
    compiled = torch.compile(vk.vcl_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), vk.reference.vcl_loss(X))


def test_command_line(capsys):
    from vcl_kernels.__main__ import main

    main()
    assert "cpu:       available" in capsys.readouterr().out


@pytest.mark.parametrize("n", [1, 7])
def test_the_number_of_samples_that_moments_need(n):
    vk.sub_batch_moments(X[:n], n)
    with pytest.raises(ValueError, match=f"x has {n} samples; sub_batch_size={n + 1} with num_sub_batches=1 needs"):
        vk.sub_batch_moments(X[:n], n + 1)
    with pytest.raises(ValueError, match=f"x has {n} samples; sub_batch_size={n} with num_sub_batches=2 needs"):
        vk.sub_batch_moments(X[:n], n, num_sub_batches=2)
