"""Panels: when they are used again, and the short way of a step that rests on them."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from on_core import needs_core

import festina
from festina import backends, dispatch, norms
from festina.backends import cpu
from festina.backends.cpu import CPU, abi, weights
from festina.backends.cpu.weights import marks_of
from festina.testing import Case

pytestmark = needs_core


def test_panels_follow_the_parameters():
    call, _ = Case("lstm", norms.HASTE, T=2, B=3, H=9).build()
    weight = call.parameters[0]

    def fresh():
        return CPU.forward(call.with_tensors([t.clone() for t in call.tensors()]))[0]

    before = CPU.forward(call)[0]
    assert torch.equal(CPU.forward(call)[0], before)
    for change in (lambda: weight.mul_(1.5), lambda: weight.data.add_(0.5), lambda: weight.set_(weight + 1)):
        change()
        now = CPU.forward(call)[0]
        assert not torch.equal(now, before)
        assert torch.equal(now, fresh())
        before = now


@pytest.mark.parametrize(("kind", "H", "T"), [(festina.LayerNormLSTM, 100, 8), (festina.LayerNormGRU, 60, 1)])
def test_one_value_written_through_data_is_seen(kind, H, T):
    """By layers of any size over 8 steps, and by small ones over fewer, steps of their cells included."""
    layer = kind(H, H)
    cell, x = layer.cell(), torch.randn(T, 2, H)

    def outputs():
        return layer(x)[0] if T > 1 else torch.cat([layer(x)[0][0], *(cell(x[0], cell(x[0])) for _ in range(2))])

    with torch.no_grad():
        before = outputs()
        for parameter in layer.parameters():
            for at in (0, parameter.numel() // 3, parameter.numel() - 1):
                value = parameter.data.view(-1)[at].clone()
                parameter.data.view(-1)[at] += 0.5
                now = outputs()
                assert not torch.equal(now, before)
                with backends.use("eager"):
                    torch.testing.assert_close(now, outputs(), atol=1e-4, rtol=1e-4)
                parameter.data.view(-1)[at] = value
        assert torch.equal(outputs(), before)


def test_a_step_of_a_large_cell_sees_each_parameter_that_was_rewritten_through_data():
    """Which a few values of each tell."""
    cell, x, state = festina.LayerNormLSTMCell(80, 80), torch.randn(2, 80), (torch.randn(2, 80), torch.randn(2, 80))
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            before = [cell(x, state)[0] for _ in range(2)][1]
            parameter.data.mul_(1.5).add_(0.5)
            assert short(cell, x, state) is None, name
            got = cell(x, state)
            assert not torch.equal(got[0], before)
            with backends.use("eager"):
                torch.testing.assert_close(got, cell(x, state), rtol=1e-4, atol=1e-4)


def test_a_step_sees_data_that_was_replaced():
    cell, x, state = festina.LayerNormLSTMCell(5, 7), torch.randn(2, 5), (torch.randn(2, 7), torch.randn(2, 7))
    with torch.no_grad():
        for _ in range(3):
            cell(x, state)
        held = cell.weight_hh.data  # so that what is at the old address looks as it did
        cell.weight_hh.data = -2 * held
        got = cell(x, state)
        with backends.use("eager"):
            want = cell(x, state)
    torch.testing.assert_close(got, want)


def test_panels_serve_their_own_plan_alone():
    """Two cells on the same parameters, under plans that lay them out differently."""
    cells = [festina.LSTMCell(5, 7, norm=replace(norms.HASTE, kind=kind)) for kind in ("layer", "rms")]
    for name, parameter in cells[0].named_parameters():
        setattr(cells[1], name, parameter)
    x, state = torch.randn(2, 5), (torch.randn(2, 7), torch.randn(2, 7))
    for cell in (*cells, *cells):
        with torch.no_grad():
            got = cell(x, state)
            with backends.use("eager"):
                want = cell(x, state)
        torch.testing.assert_close(got, want)


def test_panels_are_the_same_on_any_number_of_threads(use_threads):
    call, _ = Case("lstm", norms.HASTE, T=2, B=3, I=65, H=129).build()
    outputs = []
    for threads in (1, 2, 3):
        same = call.with_tensors([t.clone() for t in call.tensors()])
        for count in (threads, 1):
            use_threads(count)
            output = CPU.forward(same)[0]
        outputs.append(output)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_turned_weight_fills_panels_again():
    """`p.data = p.data.t()` of a square matrix changes neither object, version nor address."""
    cell, x, h = festina.IndRNNCell(8, 8), torch.randn(2, 8), torch.randn(2, 8)
    with torch.no_grad():
        cell(x, h)
        cell.weight_ih.data = cell.weight_ih.data.t()
        got = cell(x, h)
        with backends.use("eager"):
            want = cell(x, h)
    torch.testing.assert_close(got, want)


def test_weights_without_a_version_fill_panels_again():
    with torch.inference_mode():
        cell, x = festina.LayerNormGRUCell(5, 7), torch.randn(2, 5)
        before = cell(x)
        cell.weight_ih[3, 4] += 1
        assert not torch.equal(before, cell(x))


CELLS = [festina.LayerNormLSTMCell, festina.LayerNormGRUCell, festina.LayerNormIndRNNCell]


def short(cell, x, hx):
    """A step by the shorter way, or None."""
    state = hx if isinstance(hx, tuple) and len(hx) > 1 else (hx,)
    rates = (cell.zoneout, cell.zoneout_cell)
    return dispatch.step(layer=cell.spec, parameters=cell.layer_parameters(), input=x, state=state, rates=rates)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}, {"norm": norms.NONE}, {"bias": False}])
@pytest.mark.parametrize("B", [1, 3])
def test_the_short_way_of_a_step_equals_the_long_one(kind, options, B):
    """The first call fills panels, the next ones are short; sizes, rates, weights, types and threads change in between."""
    cell = kind(5, 7, **options).eval()
    names = cell.spec.cell.states

    def compare(is_short=True, **changed):
        x = torch.randn(changed.get("B", B), 5)
        state = tuple(torch.randn(x.shape[0], 7) for _ in names)
        hx = state if len(names) > 1 else state[0]
        took = short(cell, x, hx)
        assert (took is not None) == is_short
        got, long = cell(x, hx), cell(x, hx, resets=torch.zeros(x.shape[0], dtype=torch.bool))
        torch.testing.assert_close(got, long, rtol=1e-5, atol=1e-6)
        if took is not None:
            torch.testing.assert_close(tuple(took), got if len(names) > 1 else (got,), rtol=0, atol=0)

    with torch.no_grad():
        compare(is_short=False)
        compare()
        compare(B=B + 1)
        for rate in ("zoneout", "zoneout_cell")[: len(names)]:
            setattr(cell, rate, 0.6)
            compare()
        cell.weight_ih.mul_(2)
        compare(is_short=False)
        cell.weight_ih.data.mul_(2)
        compare(is_short=False)
        compare()
        with backends.use("eager"):
            compare(is_short=False)


def test_the_short_way_steps_aside():
    """For autograd, autocast, subclasses, masks, and whatever does not fit: then the long way says what is wrong."""
    cell, x, h = festina.LayerNormGRUCell(5, 7, zoneout=0.5), torch.randn(2, 5), torch.randn(2, 7)

    def step(x=x, h=h):
        return short(cell, x, h)

    with torch.no_grad():
        cell.eval()(x, h)
        assert step() is not None
        assert (
            step(x[:, :4])
            is step(x[:1])
            is step(x.double())
            is step(h=h.double())
            is step(h=h[:, :6])
            is step(h=None)
            is step(h=(h,))
            is step(h=(h, h))
            is step(x=x[0])
            is step(x=torch._neg_view(x))
            is step(h=torch._neg_view(h))
            is step(h=torch._efficientzerotensor(2, 7))
            is None
        )
        for lazy in (torch._neg_view(h), torch._efficientzerotensor(2, 7)):
            torch.testing.assert_close(cell.eval()(x, lazy), cell(x, lazy.clone().resolve_neg()))
        with torch.autocast("cpu"):
            assert step() is None
        with pytest.raises(ValueError, match="input_size = 5, got 4"):
            cell(x[:, :4], h)
        first, second = (cell.train()(x, h) for _ in range(2))
        assert not torch.equal(first, second)  # the masks of Zoneout are drawn
    assert step()[0].requires_grad
    assert cell(x, h).requires_grad


def test_steps_of_several_threads_do_not_meet():
    cell = festina.LayerNormLSTMCell(16, 32).eval()
    inputs = torch.randn(64, 1, 16)

    def walk(_):
        state = (torch.zeros(1, 32), torch.zeros(1, 32))
        with torch.inference_mode():
            for x in inputs:
                state = cell(x, state)
        return state[0]

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(walk, range(16)))
    assert all(torch.equal(outputs[0], h) for h in outputs)


def test_panels_go_with_their_parameters():
    call, _ = Case("lstm", norms.HASTE, T=2, B=3, H=9).build()
    before = set(CPU._panels._found)
    CPU.forward(call)
    (key,) = set(CPU._panels._found) - before
    with torch.no_grad():
        call.parameters[1].mul_(2)
    CPU.forward(call)
    assert set(CPU._panels._found) - before == {key}, "one set of panels for one layer"
    del call
    gc.collect()
    assert key not in CPU._panels._found


def test_a_layer_and_its_cells_keep_what_they_have_prepared(monkeypatch):
    """Both directions' cells, the layer between them, two batch sizes: panels are filled and steps prepared once for each."""
    layer = festina.LayerNormLSTM(5, 7, bidirectional=True)
    cells = [layer.cell(reverse=False), layer.cell(reverse=True)]
    made = []

    def counted(owner, name):
        to = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: made.append(name) or to(*args))

    counted(CPU._panels, "put")
    counted(cpu, "prepare")
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(2, 3, 5))
            for cell, B in itertools.product(cells, (2, 3)):
                cell(torch.randn(B, 5), (torch.zeros(B, 7), torch.zeros(B, 7)))
    assert made.count("put") == 3
    assert made.count("prepare") == 4


def test_steps_that_are_ready_hold_little_memory():
    cell = festina.LayerNormLSTMCell(5, 64)
    parameters = cell.layer_parameters()

    def ready(*batch_sizes):
        with torch.no_grad():
            for B in batch_sizes:
                cell(torch.randn(B, 5), (torch.zeros(B, 64), torch.zeros(B, 64)))
        return CPU._panels.find(cell.spec, parameters, marks_of(parameters)).ready

    assert len(ready(1, *range(1, 4))) == 3
    assert len(ready(4096)) == 3, "a large step is prepared anew"
    assert [key[0][0] for key in ready(*range(4, 3 * weights.MOST_READY))] == [
        *range(2 * weights.MOST_READY, 3 * weights.MOST_READY)
    ]
    CPU.release_memory()
    assert not ready()


# What becomes of a module after it has been called: its panels must not outlive what they were filled from.


def recurrent(module):
    """The name of its recurrent weight."""
    return next(name for name in ("weight_hh", "weight_hh_l0") if hasattr(module, name))


def bias_of(module):
    """Its recurrent bias, which no change below replaces by something computed."""
    return module.bias_hh if isinstance(module, festina.LSTMCell) else module.bias_hh_l0


def altered(weight):
    """The weight with one value changed, which a fingerprint of a few values hardly sees."""
    other = weight.detach().clone()
    other[3, 5] += 5
    return other


def swapping(work, *args):
    """`work` where modules exchange the contents of their parameters instead of their `data`."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        work(*args)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def convert_and_back(module):
    swapping(module.double)
    swapping(module.float)


def load(module, assign=False):
    name = recurrent(module)
    module.load_state_dict({**module.state_dict(), name: altered(getattr(module, name))}, assign=assign)


def load_by_swapping_twice(module):
    """The second time the memory of the first weights is free again, at the same version."""
    swapping(load, module)
    swapping(load, module)


def rewrap_and_write(module):
    """Another parameter on the same memory, with the id of the old one if that is free, and with its version after a write."""
    name = recurrent(module)
    data, version, former = getattr(module, name).data, getattr(module, name)._version, id(getattr(module, name))
    delattr(module, name)
    tried = []
    while not tried or (id(tried[-1]) != former and len(tried) < 100):
        tried.append(torch.nn.Parameter(data))
    setattr(module, name, tried[-1])
    with torch.no_grad():
        while tried[-1]._version < version:
            tried[-1][3, 5].add_(5)


def swap_out_and_in(module):
    """The same parameter at the same address and version, as when memory is used again; the values are others."""
    name = recurrent(module)
    buffer = bytearray(getattr(module, name).detach().numpy().tobytes())

    def of_buffer():
        return torch.nn.Parameter(torch.frombuffer(buffer, dtype=torch.float32).view(-1, module.hidden_size))

    setattr(module, name, of_buffer())
    assert_as_on_eager(module)
    weight = getattr(module, name)
    torch.utils.swap_tensors(weight, torch.nn.Parameter(altered(weight)))
    of_buffer().detach()[3, 5] += 5
    torch.utils.swap_tensors(weight, of_buffer())


def swap_tensors(module):
    weight = getattr(module, recurrent(module))
    torch.utils.swap_tensors(weight, torch.nn.Parameter(altered(weight)))


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrize(module):
    torch.nn.utils.parametrize.register_parametrization(module, recurrent(module), Doubled())


CHANGES = {
    "double": lambda module: module.double(),
    "double, swapping": lambda module: swapping(module.double),
    "double and back, swapping": convert_and_back,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "share_memory": lambda module: module.share_memory(),
    "swap_tensors": swap_tensors,
    "load": load,
    "load by assigning": lambda module: load(module, assign=True),
    "load by swapping twice": load_by_swapping_twice,
    "parametrize": parametrize,
    "another parameter on the same memory": rewrap_and_write,
    "the same parameter on memory used again": swap_out_and_in,
}


def assert_as_on_eager(module, parameters=None):
    """Called twice, so that the second call finds what the first has left."""
    dtype = bias_of(module).dtype
    x = torch.linspace(-1, 1, 2 * module.input_size, dtype=dtype).view(2, -1)
    args = (x, (x[:, : module.hidden_size] / 2,) * 2) if isinstance(module, festina.LSTMCell) else (x.unsqueeze(0),)
    with torch.no_grad():
        first, second = (torch.func.functional_call(module, parameters or {}, args) for _ in range(2))
        with backends.use("eager"):
            want = torch.func.functional_call(module, parameters or {}, args)
    torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [festina.LayerNormLSTM, festina.LayerNormLSTMCell])
@pytest.mark.parametrize("change", CHANGES)
def test_a_module_may_change_after_it_was_called(change, kind):
    """Too large for every value to be read before each step."""
    module = kind(80, 80)
    assert_as_on_eager(module)
    changed = CHANGES[change](module)
    changed = changed if isinstance(changed, kind) else module
    assert_as_on_eager(changed)
    with torch.no_grad():
        bias_of(changed)[3] += 5
    assert_as_on_eager(changed)
    assert_as_on_eager(module)


@pytest.mark.parametrize("as_type", [torch.Tensor.clone, torch.nn.Parameter], ids=["tensor", "parameter"])
@pytest.mark.parametrize("kind", [festina.LayerNormLSTM, festina.LayerNormLSTMCell])
def test_weights_may_be_lent_to_a_module_after_it_was_called(kind, as_type):
    module = kind(80, 80)
    name = recurrent(module)
    for _ in range(2):
        assert_as_on_eager(module)
        assert_as_on_eager(module, {name: as_type(altered(getattr(module, name)))})
    assert_as_on_eager(module)


@pytest.mark.parametrize("give_up", ["module", "weights"])
def test_the_memory_of_weights_comes_back(give_up):
    """With the module; or, if it was given others, at its next call."""
    before = set(CPU._panels._found)
    layer, x = festina.LayerNormLSTM(80, 80, num_layers=2, bidirectional=True), torch.randn(2, 2, 80)
    with torch.no_grad():
        layer(x)
        memory = [weakref.ref(p.untyped_storage()) for p in layer.parameters()]
        assert len(set(CPU._panels._found) - before) == 2
        if give_up == "module":
            del layer
        else:
            layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
            layer(x)
            assert len(set(CPU._panels._found) - before) == 2
    gc.collect()
    assert not any(held() for held in memory)
    assert give_up == "weights" or not set(CPU._panels._found) - before


def test_a_step_is_short_again_after_calls_that_nobody_owned():
    """An operator knows no module, so what it leaves is not relied on by steps; the module's own next call mends that."""
    cell, x, h = festina.LayerNormGRUCell(80, 80).eval(), torch.randn(2, 80), torch.randn(2, 80)
    with torch.no_grad():
        want = dispatch.run(replace(cell._call(cell.layer_parameters(), x, [h.unsqueeze(0)]), owner=None)).output
        assert short(cell, x, h) is None
        assert torch.equal(cell(x, h), want)
        took = short(cell, x, h)
    assert took is not None
    assert torch.equal(took[0], want)


def test_weights_written_while_they_are_packed_are_seen(monkeypatch):
    """By another process or through `.data`: at once, and at every later call, before the kernel reads or after it."""
    core, run = abi.core(), abi.core().run
    for is_after in (False, True):
        for change in (lambda w: w.add_(0.25), lambda w: w.view(-1)[7].add_(4)):
            layer = festina.LayerNormLSTM(24, 100)
            x = torch.randn(9, 2, 24)
            other = torch.from_numpy(layer.weight_hh_l0.detach().numpy())  # the same memory under another version

            def written(*arguments, other=other, change=change, is_after=is_after):
                if not is_after:
                    change(other)
                status = run(*arguments)
                if is_after:
                    change(other)
                return status

            with torch.no_grad():
                with monkeypatch.context() as patch:
                    patch.setattr(core, "run", written)
                    layer(x)
                for _ in range(2):
                    got = layer(x)[0]
                    with backends.use("eager"):
                        torch.testing.assert_close(got, layer(x)[0], atol=1e-4, rtol=1e-4)


def _learn(weight, turn, done, rounds):
    """Writes to shared memory once in each round, at some moment of it."""
    view = weight.numpy()
    for number in range(rounds):
        turn.acquire()
        time.sleep(0.0004 * (number % 7))
        view += 0.03 * (1 if number % 2 else -1)
        done.release()


def test_an_actor_sees_what_a_learner_in_another_process_has_written():
    rounds = 40
    layer, x = festina.LayerNormLSTM(32, 64), torch.randn(10, 2, 32)
    layer.share_memory()
    context = torch.multiprocessing.get_context("fork")
    turn, done = context.Semaphore(0), context.Semaphore(0)
    learner = context.Process(target=_learn, args=(layer.weight_hh_l0.detach(), turn, done, rounds))
    learner.start()
    with torch.no_grad():
        for _ in range(rounds):
            turn.release()
            while not done.acquire(block=False):
                layer(x)  # may fill panels while the learner writes
            got = layer(x)[0]
            with backends.use("eager"):
                torch.testing.assert_close(got, layer(x)[0], atol=1e-4, rtol=1e-4)
    learner.join(timeout=60)
    assert learner.exitcode == 0


def learn(module, x, state, between=lambda: None):
    """Outputs and gradients of three steps of a cell, or of a layer over x; `between` runs before the last step."""
    module.zero_grad()
    if isinstance(module, festina.cells.Cell):
        outputs = []
        for step in range(3):
            if step == 2:
                between()
            state = module(x, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
    else:
        between()
        outputs = [module(x)[0]]
    gradients = torch.autograd.grad(sum(output.pow(2).sum() for output in outputs), [x, *module.parameters()])
    return [*outputs, *gradients]


TRAINED = {
    "LSTM cell": lambda: festina.LayerNormLSTMCell(20, 100),
    "GRU cell": lambda: festina.LayerNormGRUCell(20, 100),
    "IndRNN cell": lambda: festina.LayerNormIndRNNCell(20, 100),
    "projected cell": lambda: festina.LSTMCell(20, 100, proj_size=7),
    "layer": lambda: festina.LayerNormLSTM(20, 100, bidirectional=True),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_training_of_few_steps_keeps_panels_and_sees_every_change(kind, monkeypatch):
    """One value written through `.data`, or in place, between steps: outputs and gradients are the reference's all the same."""
    module = TRAINED[kind]()
    x = torch.randn((2, 3, 20) if kind == "layer" else (3, 20), requires_grad=True)
    widths = [7 if module.proj_size else 100, 100][: len(module.spec.cell.states)]
    state = tuple(torch.randn(3, width) for width in widths) if len(widths) > 1 else torch.randn(3, 100)
    filled = []
    run, run_panels = abi.core().run, abi.core().run_panels
    at = abi.core().at["has_panels"]

    def counted(function):
        def call(words, *rest):
            filled.extend([function] if not isinstance(words, int) and not words[at] else [])
            return function(words, *rest)

        return call

    monkeypatch.setattr(abi.core(), "run", counted(run))
    monkeypatch.setattr(abi.core(), "run_panels", counted(run_panels))
    learn(module, x, state)
    assert len(filled) == 2  # forward and backward
    learn(module, x, state)
    assert len(filled) == 2
    *_, last = weights_of = [*module.parameters()]
    for parameter in (*weights_of[:2], last):
        for write in (lambda p: p.data.view(-1)[3].add_(0.5), lambda p: torch.no_grad()(p.mul_)(1.5)):
            write(parameter)
            got = learn(module, x, state)
            with backends.use("eager"):
                want = learn(module, x, state)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_the_weights_that_the_forward_pass_had():
    cell, x = festina.GRUCell(20, 100), torch.randn(3, 20, requires_grad=True)
    want = learn(cell, x, torch.zeros(3, 100))
    h = cell(x, torch.zeros(3, 100))
    (gradient,) = torch.autograd.grad(h.sum(), x, retain_graph=True)
    cell.weight_ih.data.mul_(2)
    assert torch.equal(torch.autograd.grad(h.sum(), x)[0], gradient)
    cell.weight_ih.data.div_(2)
    assert all(map(torch.equal, learn(cell, x, torch.zeros(3, 100)), want))


def test_weights_written_before_the_first_backward_pass_are_those_of_its_products():
    """As in torch.nn, which keeps no panels."""
    theirs, x, h = torch.nn.GRUCell(20, 100), torch.randn(3, 20, requires_grad=True), torch.randn(3, 100)
    ours = festina.GRUCell(20, 100)
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    for cell in (theirs, ours):
        outputs = [cell(x, h) for _ in range(2)]
        cell.weight_ih.data.mul_(2)
        gradients.append([torch.autograd.grad(output.sum(), x)[0] for output in outputs])
    torch.testing.assert_close(*gradients)


def test_views_of_a_stack_of_weights_do_not_fill_memory():
    """As `functional_call` on each of an ensemble's weights makes them, anew at every call."""
    layer, x = festina.GRU(4, 8), torch.randn(3, 2, 4)
    stacked = {name: torch.stack([p.detach()] * 50) for name, p in layer.named_parameters()}
    before = set(CPU._panels._found)
    with torch.no_grad():
        held = [{name: stack[n] for name, stack in stacked.items()} for n in range(50)]
        for parameters in held:
            torch.func.functional_call(layer, parameters, x)
    assert 0 < len(set(CPU._panels._found) - before) <= weights.MOST_UNOWNED


def test_a_step_of_another_dtype_takes_no_prepared_one():
    cell, x, state = festina.LayerNormLSTMCell(5, 7), torch.randn(2, 5), (torch.randn(2, 7), torch.randn(2, 7))
    with torch.no_grad():
        for _ in range(3):
            cell(x, state)
        with pytest.raises(ValueError, match=r"torch\.float64"):
            cell(x.double(), tuple(part.double() for part in state))
