"""PyTorch's own module tests (its test/test_modules.py) on Festina's classes. Inputs, reference functions and error
inputs are the `ModuleInfo`s of `torch.testing._internal.common_modules` for nn.LSTM, nn.GRU, nn.LSTMCell and nn.GRUCell.

torch's tests that are not here:
- check_inplace: recurrent modules have no `inplace` argument;
- memory_format: it changes 4-D and 5-D parameters only, and there are none;
- multiple_device_transfer, cpu_gpu_parity and half_dtype_reduction: they need a second device;
- the text of error inputs: Festina's errors have their own (tests/test_checks.py).
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from samples import assert_same
from torch import Tensor, nn

import festina
from festina import norms

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
common = pytest.importorskip("torch.testing._internal.common_modules")

CLASSES: list[tuple[type[nn.Module], Any, dict[str, Any]]] = [
    (nn.LSTM, festina.LSTM, {}),
    (nn.LSTM, festina.LayerNormLSTM, {}),
    (nn.LSTM, festina.LSTM, {"norm": norms.ICEFALL}),
    (nn.GRU, festina.GRU, {}),
    (nn.GRU, festina.LayerNormGRU, {}),
    (nn.GRU, festina.GRU, {"norm": norms.DREAMER}),
    (nn.GRU, festina.IndRNN, {}),
    (nn.GRU, festina.LayerNormIndRNN, {}),
    (nn.LSTMCell, festina.LSTMCell, {}),
    (nn.LSTMCell, festina.LayerNormLSTMCell, {}),
    (nn.GRUCell, festina.GRUCell, {}),
    (nn.GRUCell, festina.LayerNormGRUCell, {}),
    (nn.GRUCell, festina.IndRNNCell, {}),
]
every_class = pytest.mark.parametrize(
    ("theirs", "ours", "options"),
    CLASSES,
    ids=[f"{o.__name__}{'-' * bool(k)}{k.get('norm', '')}" for _, o, k in CLASSES],
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def info(theirs: type[nn.Module]) -> Any:
    return next(row for row in common.module_db if row.module_cls is theirs)


def samples(theirs: type[nn.Module], requires_grad: bool = False, training: bool = True) -> list[Any]:
    row = info(theirs)
    given = row.module_inputs_func(row, "cpu", torch.float64, requires_grad, training)
    return [sample for sample in given if sample.forward_input is not None]


def build(sample: Any, ours: Any, options: dict[str, Any], **factory: Any) -> Any:
    given = sample.constructor_input
    return ours(*given.args, **{"dtype": torch.float64, **given.kwargs, **options, **factory})


def call(module: Any, sample: Any) -> Any:
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    return [tensor for part in nested if part is not None for tensor in tensors(part)]


def mapped(nested: Any, change: Any) -> Any:
    if isinstance(nested, Tensor):
        return change(nested)
    return type(nested)(mapped(part, change) for part in nested) if isinstance(nested, (tuple, list)) else nested


@every_class
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward(theirs: Any, ours: Any, options: dict[str, Any], training: bool) -> None:
    """Against torch's reference function and, without a norm, against torch's module."""
    for sample in samples(theirs, training=training):
        module = build(sample, ours, options).train(training)
        output = call(module, sample)
        if sample.reference_fn is not None:
            args = copy.deepcopy(sample.forward_input.args)
            assert_same(output, sample.reference_fn(module, *args))
        if not (options or ours.default_norm is not norms.NONE or "IndRNN" in ours.__name__):
            twin = build(sample, theirs, {}).train(training)
            twin.load_state_dict(module.state_dict())
            assert_same(output, call(twin, sample))


@every_class
def test_factory_kwargs(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    for sample in samples(theirs):
        module = build(sample, ours, options, device="meta", dtype=torch.float16)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
        with torch.device("meta"):
            assert {p.device.type for p in build(sample, ours, options).parameters()} == {"meta"}


@every_class
def test_repr_pickle_and_copies(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    for sample in samples(theirs)[-4:]:
        module = build(sample, ours, options)
        output = call(module, sample)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        loaded = build(sample, ours, options)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            assert_same(call(other, sample), output, 0, 0)
            assert repr(other) == str(other) == repr(module)


@every_class
def test_non_contiguous_tensors(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    def scattered(tensor: Tensor) -> Tensor:
        """The same numbers as every other element of a tensor twice as wide, with NaN between them."""
        wide = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
        wide[..., 0] = tensor.detach()
        view = wide[..., 0]
        assert not view.is_contiguous() or view.numel() < 2
        return view.requires_grad_(tensor.requires_grad)

    for sample in samples(theirs, requires_grad=True)[-4:]:
        module = build(sample, ours, options)
        args = sample.forward_input.args
        other_args = mapped(args, scattered)
        output, other = call(module, sample), module(*other_args)
        assert_same(other, output)
        d_outputs = [torch.randn_like(t) for t in tensors(output)]
        leaves = [*module.parameters(), *tensors(args)]
        want = torch.autograd.grad(tensors(output), leaves, d_outputs)
        got = torch.autograd.grad(
            tensors(other), [*module.parameters(), *tensors(other_args)], [scattered(d) for d in d_outputs]
        )
        assert_same(got, want)


def smallest(theirs: Any, requires_grad: bool) -> list[Any]:
    """One sample with every option and one without any: numerical gradients of all of them would be slow."""
    given = samples(theirs, requires_grad)
    return [given[1], given[-1]]


@every_class
def test_grad(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    check_gradients(theirs, ours, options, torch.autograd.gradcheck)


@every_class
def test_gradgrad(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    check_gradients(theirs, ours, options, torch.autograd.gradgradcheck)


def check_gradients(theirs: Any, ours: Any, options: dict[str, Any], check: Any) -> None:
    """Check gradients of the inputs, the states and every parameter; `functional_call` sets the parameters."""
    for sample in smallest(theirs, requires_grad=True):
        module = build(sample, ours, options)
        names = [name for name, _ in module.named_parameters()]
        inputs = tensors(sample.forward_input.args)

        def run(*values: Tensor, module: Any = module, names: list[str] = names, sample: Any = sample) -> Any:
            given = iter(values[len(names) :])
            args = mapped(sample.forward_input.args, lambda _: next(given))
            parameters = dict(zip(names, values))
            return tuple(tensors(torch.func.functional_call(module, parameters, args)))

        assert check(run, (*(p for p in module.parameters()), *inputs), fast_mode=True)


@every_class
def test_train_and_eval_modes_differ_only_with_a_rate(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    for sample in samples(theirs)[:2]:
        module = build(sample, ours, options)
        assert_same(call(module.train(), sample), call(module.eval(), sample), 0, 0)
        module = build(sample, ours, options, zoneout=0.5)
        assert not torch.equal(tensors(call(module.train(), sample))[0], tensors(call(module.eval(), sample))[0])


@every_class
def test_to(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    """`.to(dtype)`, `.to(meta)` and `.to_empty` keep the identity and the gradients of parameters as in torch."""
    for sample in samples(theirs, requires_grad=True)[:2]:
        module = build(sample, ours, options)
        output = call(module, sample)
        torch.autograd.backward([t.sum() for t in tensors(output)])
        before = list(module.parameters())
        module.to(torch.float32)
        assert [id(p) for p in module.parameters()] == [id(p) for p in before]
        assert {(p.dtype, p.grad.dtype) for p in module.parameters() if p.grad is not None} == {(torch.float32,) * 2}
        args = mapped(sample.forward_input.args, lambda t: t.float())
        assert_same(mapped(module(*args), lambda t: t.double()), output, 1e-4, 1e-5)
        assert {p.device.type for p in copy.deepcopy(module).to("meta").parameters()} == {"meta"}
        empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
        empty.load_state_dict(module.state_dict())
        assert_same(empty(*args), module(*args), 0, 0)


@every_class
def test_errors(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    """Festina refuses what torch refuses, with an error that `except` of torch's catches."""
    row = info(theirs)
    for error in row.module_error_inputs_func(row, "cpu", torch.float64, False, True):
        sample = error.module_error_input
        if error.error_on == common.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type):
                build(sample, ours, options)
        elif all(isinstance(arg, int) for arg in sample.constructor_input.args):
            module = build(sample, ours, options)
            with pytest.raises(error.error_type, match="must be"):
                call(module, sample)
