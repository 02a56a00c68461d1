"""A model's own formulas, compiled: the same values, for tensors of any size, and only where there is a compiler."""

import shutil

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.fast_paths import CompiledFunction, compiled_patch
from tests.models.architectures import base_of

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler"
)


def _rows(seed):
    draw = torch.Generator().manual_seed(seed)

    def ids(least):
        length = int(torch.randint(least, 9, (1,), generator=draw))
        return tuple(torch.randint(2, 200, (length,), generator=draw).tolist())

    prompts = [ids(2) for _ in range(4)]
    return [Row(prompt, ids(1)) for prompt in prompts for _ in range(2)]


def _step(adapted, seed):
    draw = torch.Generator().manual_seed(0)
    flat = (0.05 * torch.randn(2, adapted.params_per_user, generator=draw)).requires_grad_()
    with adapted.using(flat):
        logps = adapted.row_logps(adapted.batch(_rows(seed), 2))
        [gradient] = torch.autograd.grad((logps * torch.arange(1.0, logps.numel() + 1).view_as(logps)).sum(), [flat])
    return logps.detach(), gradient


@pytest.fixture(params=["llama3", "qwen3", "gemma2", "olmo2"])
def adapted(request):
    made = AdaptedModel(base_of(request.param), LoraSettings(rank=4, alpha=8))
    made.patch = None
    yield made
    made.close()


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch looks, and hides it elsewhere
def test_compiled_formulas_are_the_models_own(adapted):
    """Both ways, in batches of many shapes, and with no more kernels after the first of them."""
    plain = [_step(adapted, seed) for seed in range(6)]
    torch._dynamo.reset()
    counters.clear()
    adapted.patch = compiled_patch(adapted.base.model, large=0)
    compiled_steps = [_step(adapted, 0)]
    kernels = counters["stats"]["unique_graphs"]
    compiled_steps += [_step(adapted, seed) for seed in range(1, 6)]
    assert counters["stats"]["unique_graphs"] == kernels >= 2  # rotation and gate; norms where torch has no kernel
    for (logps, gradient), (compiled_logps, compiled_gradient) in zip(plain, compiled_steps, strict=True):
        assert torch.allclose(compiled_logps, logps, rtol=0, atol=1e-4)
        assert (compiled_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    torch._dynamo.reset()
    adapted.patch = compiled_patch(adapted.base.model, large=0)
    for (logps, gradient), (compiled_logps, compiled_gradient) in zip(
        compiled_steps, [_step(adapted, seed) for seed in range(6)], strict=True
    ):
        assert torch.equal(logps, compiled_logps), "compiled anew, it gives other bits"
        assert torch.equal(gradient, compiled_gradient)


def test_nothing_is_compiled_for_what_is_small(adapted, monkeypatch):
    def compiles(*_, **__):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(torch, "compile", compiles)
    plain = _step(adapted, 0)
    adapted.patch = compiled_patch(adapted.base.model)
    for one, other in zip(plain, _step(adapted, 0), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def _double(x):
    return 2 * x


@pytest.mark.parametrize("fault", ["missing", "wrong", "wrong gradient"])
def test_a_compiler_that_fails_leaves_the_function_as_it_is(monkeypatch, fault):
    compiled = []

    def compiles(function, **_):
        compiled.append(function)
        if fault == "missing":
            raise RuntimeError("no compiler")
        return (lambda x: 3 * x) if fault == "wrong" else (lambda x: (2 * x).detach() + 0 * x)

    monkeypatch.setattr(torch, "compile", compiles)
    function = CompiledFunction(_double, [0], large=4)
    assert function(torch.ones(3)).tolist() == [2, 2, 2]
    assert compiled == []
    for _ in range(2):
        assert function(torch.ones(4)).tolist() == [2, 2, 2, 2]
    assert compiled == [_double]
    assert function.chosen is _double


def test_a_compiler_that_fails_later_leaves_the_function_as_it_is(monkeypatch):
    def compiles(function, **_):
        def made(x):
            if not x.requires_grad:
                raise TorchDynamoException("another way to be called, which does not compile")
            return function(x)

        return made

    monkeypatch.setattr(torch, "compile", compiles)
    function = CompiledFunction(_double, [0], large=4)
    assert function(torch.ones(4, requires_grad=True)).tolist() == [2, 2, 2, 2]
    assert function.chosen is not _double
    assert function(torch.ones(4)).tolist() == [2, 2, 2, 2]
    assert function.chosen is _double


def test_memory_that_is_short_is_said_and_the_compiler_asked_again(monkeypatch):
    compiled = []

    def compiles(function, **_):
        compiled.append(function)
        if len(compiled) == 1:
            raise torch.OutOfMemoryError("too much")
        return lambda x: function(x)

    monkeypatch.setattr(torch, "compile", compiles)
    function = CompiledFunction(_double, [0], large=4)
    with pytest.raises(torch.OutOfMemoryError):
        function(torch.ones(8))
    assert function(torch.ones(4)).tolist() == [2, 2, 2, 2]
    assert function.chosen is not _double


def test_a_compiler_that_works_is_used_from_its_first_value_on(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: function(x) * (1 + 1e-7))
    function = CompiledFunction(_double, [0], large=4)
    assert function(torch.ones(5, dtype=torch.float64)).tolist() == [2 * (1 + 1e-7)] * 5
    assert function(torch.ones(3)).tolist() == [2, 2, 2]
