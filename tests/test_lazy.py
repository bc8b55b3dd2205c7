"""Lazy layers and cells: the first input tells `input_size`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from samples import assert_same
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import festina
from festina import checks, lazy

I, H = 3, 5
LAYERS = [
    cls for name, cls in vars(lazy).items() if name.startswith("Lazy") and issubclass(cls, festina.layers.Recurrent)
]
CELLS = [cls for name, cls in vars(lazy).items() if name.startswith("Lazy") and issubclass(cls, festina.cells.Cell)]
each = pytest.mark.parametrize("cls", [*LAYERS, *CELLS], ids=lambda cls: cls.__name__)

# The hook that makes parameters says so, as torch's lazy modules do.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def sample(cls: Any) -> Tensor:
    return torch.randn(2, I) if cls in CELLS else torch.randn(4, 2, I)


def test_there_is_one_for_each_class() -> None:
    assert len(LAYERS) == len(CELLS) == 6
    assert all(getattr(festina, "Lazy" + cls.cls_to_become.__name__) is cls for cls in (*LAYERS, *CELLS))


@each
def test_the_first_call_makes_the_module(cls: Any) -> None:
    """With the numbers that the module would have had with its input_size given, from the same seed."""
    plain, x, options = (
        cls.cls_to_become,
        sample(cls),
        {"bidirectional": True, "num_layers": 2} if cls in LAYERS else {},
    )
    torch.manual_seed(0)
    want = plain(I, H, **options)
    torch.manual_seed(0)
    module = cls(H, **options)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.manual_seed(0)
        output = other(x)
        assert type(other) is plain
        assert repr(other) == repr(want)
        assert_same(other.state_dict(), want.state_dict(), 0, 0)
        assert_same(first(output), first(want(x)), 0, 0)
    first(module(x)).sum().backward()


@each
def test_a_state_dict_makes_the_module(cls: Any) -> None:
    plain, x = cls.cls_to_become(I, H), sample(cls)
    module = cls(H)
    module.load_state_dict(plain.state_dict())
    assert_same(first(module(x)), first(plain(x)), 0, 0)
    assert type(module) is type(plain)
    again = cls(H)
    again.load_state_dict(cls(H).state_dict())  # neither knows its input yet
    assert first(again(x)).shape == first(plain(x)).shape


@pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)
def test_every_form_of_input_tells_the_size(cls: Any) -> None:
    rows = [torch.randn(3, I), torch.randn(1, I)]
    for x in (pack_sequence(rows), torch.nested.nested_tensor(rows, layout=torch.jagged), torch.randn(4, I)):
        module = cls(H)
        module(x)
        assert module.input_size == I
    module = cls(H)
    module(input=torch.randn(4, 2, I), lengths=[4, 1])
    assert module.input_size == I


@each
def test_a_wrong_first_call_leaves_the_module_lazy(cls: Any) -> None:
    module = cls(H)
    with pytest.raises(TypeError, match="input must be a Tensor"):
        module([1.0])
    rows = [torch.zeros(3, 1), torch.zeros(2, 1)]
    nested = [
        torch.nested.nested_tensor(rows),
        torch.nested.nested_tensor([row.T for row in rows], layout=torch.jagged),  # features are ragged
        torch.nested.nested_tensor([row[:, 0] for row in rows], layout=torch.jagged),
    ]
    for wrong in (torch.zeros(()), torch.zeros(2, 2, 2, 2), *nested):
        with pytest.raises(checks.MismatchError, match=r"input must (be|have the layout)"):
            module(wrong)
    if cls in LAYERS:
        with pytest.raises(ValueError, match="input_size must be at least 1, got 0"):
            module(torch.zeros(4, 2, 0))
        with pytest.raises(RuntimeError, match="call the layer once before"):
            module.cell()
    assert type(module) is cls
    module(sample(cls))
    assert module.input_size == I


def test_a_single_feature_warns_as_without_lazy() -> None:
    with pytest.warns(UserWarning, match="single input feature"):
        lazy.LazyLayerNormLSTM(H)(torch.randn(4, 2, 1))
