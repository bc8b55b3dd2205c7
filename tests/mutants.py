"""Wrong versions of Festina's own files, each of which the suite must notice.

    make mutants                                  # all of them, in half an hour or two
    make mutants ARGS="--only gemm"               # those with `gemm` in their name
    make mutants ARGS="--list"

A mutant replaces one piece of text in a copy of the tree, and runs the tests that should fail there; of a change in csrc/
the core is compiled, for one instruction set (`wide`, with all that AVX-512 does otherwise). A mutant survives if they
pass: then a test is missing. Wrong equations, which judge the comparison itself, are in test_mutants.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("csrc", "festina", "tests", "examples", "bench", "pyproject.toml", "README.md", "CHANGELOG.md", "docs")
COMPILED = (
    "g++ -std=gnu++17 -O1 -march=x86-64-v3 -Wno-psabi -fno-math-errno -fno-trapping-math -fPIC -shared -fvisibility=hidden "
    "-DFESTINA_TESTING csrc/api.cc csrc/dispatch.cc csrc/isa/wide.cc -lgomp -o core/libfestina_core.so"
)
TIMEOUT_S = 900

# An editable install finds `festina` before any path does; the copy has to come first, in every process.
OWN_COPY = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
"""


class Mutant(NamedTuple):
    """A wrong version.

    Args:
        name: what is wrong.
        file: of the repository.
        old, new: `old` stands in it once, and becomes `new`.
        tests: arguments of pytest; one of these tests must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


CORE = '-k "cpu and matches_reference" tests/test_backends.py'
KERNELS = (
    '-k "not instruction_set and not avx512 and not in_cpp" tests/cpu/test_kernels.py'  # those compile by themselves
)
WEIGHTS = "tests/cpu/test_weights.py"
FROZEN, FREEZE = "tests/cpu/test_frozen_panels.py", "tests/test_frozen.py"


def core(name: str, file: str, old: str, new: str, tests: str = CORE) -> Mutant:
    return Mutant(name, f"csrc/{file}", old, new, tests)


def python(name: str, file: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, f"festina/{file}", old, new, tests)


def triton(name: str, file: str, old: str, new: str, cases: str) -> Mutant:
    """`cases` selects among those of tests/test_backends.py, which run in Triton's interpreter."""
    tests = f'-k "triton and matches_reference and ({cases})" tests/test_backends.py'
    return Mutant(name, f"festina/backends/triton/{file}", old, new, tests)


MUTANTS: list[Mutant] = [
    # Products.
    core(
        "gemm: the second outer block of depth overwrites",
        "core/gemm.h",
        "is_added || k > 0,",
        "is_added || k > far,",
        KERNELS,
    ),
    core(
        "gemm: squares are summed after every block of depth",
        "core/gemm.h",
        "{is_last ? squares.data : nullptr,",
        "{squares.data,",
    ),
    core(
        "gemm: the last chunk of columns is left out",
        "core/gemm.h",
        "min(wide, chunks - n), left",
        "min(wide, max(1, chunks - n - 1)), left",
    ),
    core("gemm: results are not added", "core/gemm.h", "if (is_added) x += load(to + n * lanes<E>);", ""),
    core(
        "gemm: the last of many rows is left out",
        "core/gemm.h",
        "tile_rows<F, W, k_stride>(next - row, min",
        "tile_rows<F, W, k_stride>(next - row - (next == rows && rows > 64), min",
        KERNELS,
    ),
    core(
        "gemm: sums of 1024 terms in one accumulator",
        "core/gemm.h",
        "constexpr long depth_block = 256;",
        "constexpr long depth_block = 1024;",
        KERNELS,
    ),
    # Rounded weights.
    core(
        "words: the factors of int8 are those of the first chunk",
        "core/gemm.h",
        "load(b.scales + i * b.stride + n * lanes<E>)",
        "load(b.scales + n * lanes<E>)",
        FROZEN,
    ),
    core(
        "words: terms past the last are multiplied",
        "core/gemm.h",
        "multiply(word, depth - word * terms);",
        "multiply(word, terms);",
        FROZEN,
    ),
    core(
        "words: the first of two bfloat16 adds to the second", "simd/vec.h", "words.v & -0x10000)", "words.v)", FROZEN
    ),
    core("words: integers keep those below them", "simd/vec.h", "(24 - 8 * j) & -0x1000000", "(24 - 8 * j)", FROZEN),
    core("panels: the factor of another row", "core/panels.h", "scales[l] = unit", "scales[C - 1 - l] = unit", FROZEN),
    core("panels: int8 is cut off, not rounded", "core/panels.h", "__builtin_rintf(", "__builtin_truncf(", FROZEN),
    core(
        "panels: rounded weights are centred as well",
        "core/panels.h",
        "if (s.is_rounded()) w.means = nullptr;",
        "",
        FROZEN,
    ),
    core(
        "forward: rounded weights keep their mean",
        "core/forward.h",
        "- mean * is_unit[l];",
        "- 0 * mean * is_unit[l];",
        FROZEN,
    ),
    core("forward: the mean is subtracted past H", "core/forward.h", "- mean * is_unit[l];", "- mean;", FROZEN),
    core(
        "forward: the candidate of an early reset is centred",
        "core/forward.h",
        "(which == 0 || g < s.traits.centred_gates())",
        "true",
        FROZEN,
    ),
    python(
        "frozen: panels outlive the weights that they were made of",
        "frozen.py",
        "        self._panels = None\n",
        "",
        FREEZE,
    ),
    python(
        "frozen: a ready step forgets the rate of c",
        "backends/cpu/frozen.py",
        "(input.shape, rates, torch",
        "(input.shape, torch",
        FREEZE,
    ),
    python(
        "frozen: a state's gradient is not asked for",
        "frozen.py",
        "given = [call.input, *call.state]\n        self._check",
        "given = [call.input]\n        self._check",
        FREEZE,
    ),
    python("frozen: int8 rows of any size", "frozen.py", "(most == MOST) | (most == 0)", "most >= 0", FREEZE),
    # Weights as kernels read them.
    core(
        "panels: means of all gates where each has its own",
        "core/panels.h",
        "? w.means + s.group_of[gate] * w.columns : nullptr;",
        "? w.means : nullptr;",
    ),
    core("panels: weights are not centred", "core/panels.h", "total / (E)s.group_size[group];", "0 * total;"),
    core(
        "panels: the last columns are left out",
        "core/panels.h",
        "long count = min(C, w.columns - k);",
        "long count = w.columns - k < C ? 0 : C;",
    ),
    core(
        "panels: the shift of the recurrent norm is forgotten",
        "core/panels.h",
        "put(FESTINA_BIAS_HH, g, shift_of(s.traits.sides - 1, g));",
        "",
    ),
    core("panels: bias_inner is not centred", "core/panels.h", "from.get(i) - mean[s.group_of[g]];", "from.get(i);"),
    # The norm.
    core(
        "norm: eps is left out",
        "core/norm.h",
        "s.group_size[s.group_of[g]] + eps)",
        "s.group_size[s.group_of[g]] + 0 * eps)",
    ),
    core(
        "norm: the correction is of the first order in sigma",
        "core/norm.h",
        "scale[g] * scale[g] * (E)(dots",
        "scale[g] * (E)(dots",
    ),
    core(
        "norm of c: the share of a thread counts for less",
        "core/norm.h",
        "squares += count(m) * (own(m) - mean[row])",
        "squares += (own(m) - mean[row])",
        KERNELS,
    ),
    core(
        "norm of c: padding counts",
        "core/norm.h",
        " - mean) * load(vectors + (n * vectors_a_chunk + valid) * chunk<E> + l);",
        " - mean);",
    ),
    core("norm of c: rms subtracts the mean", "core/norm.h", "E own = call.rms ? E(0) : ", "E own = "),
    # Steps.
    core(
        "pointwise: the gain of c is left out of its gradient",
        "core/pointwise.h",
        "V d_hat = d_inner * gain;",
        "V d_hat = d_inner;",
    ),
    core(
        "pointwise: a carried norm keeps the raw c",
        "core/pointwise.h",
        "inner = clipped(s, inner);\n          store(at.in(at.c), inner);",
        "inner = clipped(s, inner);",
    ),
    core(
        "pointwise: a carried norm forgets the gradient of c",
        "core/pointwise.h",
        "d_inner = clipped_backward(s, c, d_inner + load_as<V>(at.in(at.d_c_new)));",
        "d_inner = clipped_backward(s, c, d_inner);",
    ),
    core(
        "pointwise: the second direction's candidate has no shift",
        "core/pointwise.h",
        "if (is_split) add_to(at.d_vector(shift_of(1, g)), d);",
        "",
    ),
    core(
        "pointwise: a clipped c has the gradient of one that is not",
        "core/pointwise.h",
        "if (!(s.clip < infinity)) return d;",
        "return d;",
    ),
    core(
        "pointwise: the norm of c in the output takes in the c before its clip",
        "core/pointwise.h",
        "return ((cell_norm == FESTINA_READOUT ? clipped(at.s, c) : c) - at",
        "return (c - at",
    ),
    core(
        "backward: the c of the step before is taken as it was before its clip",
        "core/backward.h",
        "(call.cell_norm == FESTINA_CARRIED || call.clip != 0);",
        "call.cell_norm == FESTINA_CARRIED;",
    ),
    core(
        "early reset: the candidate's recurrent weights are centred before the gate",
        "core/shape.h",
        "int centred_gates() const { return has_early_reset ? gates - 1 : gates; }",
        "int centred_gates() const { return gates; }",
    ),
    core(
        "early reset: the gradient of a sum reaches x alone",
        "core/backward.h",
        "copy_row(p.d_v[0], r, p.d_v[1], r, n, n + 1);",
        "clear_row(p.d_v[1], n, n + 1, r);",
    ),
    core(
        "early reset: r has no gradient",
        "core/early.h",
        "spread_gate(at, 0, d_r);",
        "spread_gate(at, 0, d_r - d_r);",
    ),
    core(
        "gated h: the candidate's product takes in h itself",
        "core/forward.h",
        "recurrent_product(t, index, p.gated_h, plain, gates);",
        "recurrent_product(t, index, p.h_old, plain, gates);",
    ),
    core(
        "gated h: no thread waits for the others' parts",
        "core/forward.h",
        "kernels.update(p);\n      part.wait();\n",
        "kernels.update(p);\n",
        KERNELS,
    ),
    core(
        "gated h: its gradient does not reach h",
        "core/pointwise.h",
        "put(true, at.in(at.d_h), d_h);",
        "put(true, at.in(at.d_h), d_h - d_h);",
    ),
    core(
        "gated h: the reset gate has no gradient",
        "core/cells.h",
        "GruEarly::update_backward(a[0], h, d_gated_h, d_a[0], d_h);",
        "GruEarly::update_backward(a[0], h, d_gated_h, d_a[0], d_h), d_a[0] = d_h - d_h;",
    ),
    core(
        "gated h: the gradient of the candidate's weights is that of a product with h",
        "core/gradients.h",
        "sum(plain, count - plain, b[d].gated_h);",
        "sum(plain, count - plain, right);",
    ),
    core(
        "gated h: rows of two gates in one task have one factor",
        "core/gradients.h",
        "min(count, max(0, s.traits.plain_gates() * H - row))",
        "(row < s.traits.plain_gates() * H ? count : 0)",
        KERNELS,
    ),
    core(
        "gated h: the candidate's norm is not taken backward",
        "core/backward.h",
        "norms_backward(p, plain, gates);",
        "",
    ),
    core(
        "gated h: only the last of its gates counts in the gradient of h",
        "core/backward.h",
        "is_added || g > from, ahead",
        "is_added && g == from, ahead",
    ),
    core(
        "gated h: its factors are not paired",
        "core/gradients.h",
        "for (int i = 0; i < 5; ++i) {",
        "for (int i = 0; i < 4; ++i) {",
        '-k "every_instruction_set" tests/cpu/test_kernels.py',
    ),
    core(
        "gated h: the second norms of a step count the first gates again",
        "core/forward.h",
        "first_gate[2] = {0, from}",
        "first_gate[2] = {0, 0}",
    ),
    core(
        "panels: the bias inside h's norm is left out",
        "core/panels.h",
        "put_inner(FESTINA_BIAS_INNER_HH, s.traits.centred_gates());",
        "",
    ),
    core(
        "gradients: bias_inner_hh has that of bias_inner",
        "core/gradients.h",
        "return inner ? s.traits.sides - 1 : 0;",
        "return 0;",
    ),
    core(
        "forward: a row that starts late is not reset",
        "core/forward.h",
        "load_state(r, t, order.is_reset(call, t, r));",
        "load_state(r, t, false);",
    ),
    core(
        "forward: a row that ends keeps its state to the last step",
        "core/forward.h",
        "if (r >= order.rows(t + 1))\n        store_state(r, t + 1);",
        "if (t + 1 == s.T)\n        store_state(r, t + 1);",
    ),
    core(
        "forward: the sums of squares are not cleared",
        "core/forward.h",
        "my.sums.clear(side * max_gates + g, rows);\n    return {my",
        "my.sums.clear(side * max_gates + g, 0);\n    return {my",
    ),
    core(
        "forward: nobody waits before the projection",
        "core/forward.h",
        "if (s.is_projected) {\n      part.wait();\n      Blocked<E> to",
        "if (s.is_projected) {\n      Blocked<E> to",
        KERNELS,
    ),
    core(
        "forward: a narrow type goes on from what was not rounded",
        "core/forward.h",
        "if (output.is_narrow) output.read(to, s.P, first_P, end_P, h, row);",
        "",
        f"{KERNELS} tests/test_layers.py",
    ),
    core(
        "narrow: float16 truncates",
        "simd/narrow.h",
        "_mm256_cvtps_ph(_mm256_loadu_ps(from + l), _MM_FROUND_TO_NEAREST_INT)",
        "_mm256_cvtps_ph(_mm256_loadu_ps(from + l), _MM_FROUND_TO_ZERO)",
        "-k in_cpp tests/cpu/test_kernels.py",
    ),
    core(
        "backward: a reset lets the gradient through",
        "core/backward.h",
        "if (!order.is_reset(call, t, r)) continue;\n      clear_row(b.d_h",
        "continue;\n      clear_row(b.d_h",
    ),
    core(
        "backward: the gradient of c passes a reset",
        "core/backward.h",
        "if (s.traits.has_c) clear_row(b.d_c, first, end, part.row + r);",
        "",
    ),
    core(
        "backward: Zoneout's mask is read without its lane",
        "core/recurrence.h",
        "mask[token * columns + k]) : rate; }",
        "mask[token * columns]) : rate; }",
    ),
    core(
        "backward: rms of c subtracts a mean",
        "core/backward.h",
        "my.d_c_hat_mean[r] = call.rms ? E(0) : my",
        "my.d_c_hat_mean[r] = my",
    ),
    core(
        "gradients: those of weights are not centred",
        "core/gradients.h",
        "for (long k = 0; k < count; ++k) mean[k] /= (E)s.group_size[group];",
        "for (long k = 0; k < count; ++k) mean[k] = 0;",
    ),
    core(
        "gradients: each segment overwrites the one before",
        "core/gradients.h",
        "{to.data, my.target_at + first, C}, !is_first || team > 0);",
        "{to.data, my.target_at + first, C}, team > 0);",
        KERNELS,
    ),
    core(
        "gradients: each team overwrites the one before",
        "core/gradients.h",
        "{to.data, my.target_at + first, C}, !is_first || team > 0);",
        "{to.data, my.target_at + first, C}, !is_first);",
        KERNELS,
    ),
    core(
        "gradients: the second direction overwrites d_input",
        "core/gradients.h",
        "d_rows, r - row, s.directions == 2);",
        "d_rows, r - row, false);",
    ),
    core(
        "gradients: those of vectors are of one thread alone",
        "core/gradients.h",
        "for (long worker = 0; worker < s.threads; ++worker) total +=",
        "for (long worker = 0; worker < 1; ++worker) total +=",
        KERNELS,
    ),
    core(
        "fingerprint: of the weights alone",
        "api.cc",
        "for (int i = 0; i < FESTINA_PARAMETERS; ++i)\n      body(",
        "for (int i = 0; i < 2; ++i)\n      body(",
        WEIGHTS,
    ),
    core(
        "fingerprint: one value in two blocks is not seen",
        "core/digest.h",
        "for (; bytes >= stripe; bytes -= stripe, at += stripe) mix(at);",
        "for (; bytes >= stripe; bytes -= stripe, at += stripe) if (bytes & stripe) mix(at);",
        WEIGHTS,
    ),
    # The host.
    python(
        "call: both directions have the parameters of the first",
        "call.py",
        "self.parameters[d * len(names) : (d + 1) * len(names)]",
        "self.parameters[: len(names)]",
        "tests/test_backends.py -k cpu",
    ),
    python(
        "autograd: a gradient of a gradient goes on past its tensor",
        "autograd.py",
        "[tensor.view_as(tensor) for tensor in call.tensors()]",
        "[*call.tensors()]",
        "tests/test_autograd.py tests/test_backends.py",
    ),
    python(
        "autograd: resets are saved where a write goes unnoticed",
        "autograd.py",
        "ctx.save_for_backward(*around, *tensors",
        "around = tuple(t if t is None else t.clone() for t in around)\n"
        "        ctx.save_for_backward(*around, *tensors",
        "tests/test_autograd.py",
    ),
    python(
        "autograd: tangents of cotangents are lost",
        "autograd.py",
        "if is_again or ops.has_tangents(given):",
        "if is_again:",
        "tests/test_autograd.py",
    ),
    python(
        "ops: d_c_n is taken for d_h_n",
        "ops.py",
        "output, saved, *d_all, wanted)",
        "output, saved, *d_all[:1], d_all[2], d_all[1], wanted)",
        "tests/test_ops.py tests/test_compile.py",
    ),
    python(
        "ops: the output of a step is saved",
        "ops.py",
        "        return None\n    return output",
        "        return output\n    return output",
        "tests/test_autograd.py",
    ),
    python(
        "ops: the output of many steps is not saved",
        "ops.py",
        "not isinstance(N, torch.SymInt) and N == B",
        "not isinstance(N, torch.SymInt)",
        "tests/test_autograd.py",
    ),
    python(
        "ops: tangents go unnoticed",
        "ops.py",
        "        or forward_ad._current_level >= 0\n",
        "",
        "tests/test_autograd.py",
    ),
    python(
        "transforms: parts of a vmapped axis change places with rows",
        "transforms.py",
        "tensor.movedim(0, rows + 1).flatten(rows, rows + 1)",
        "tensor.movedim(0, rows).flatten(rows, rows + 1)",
        "tests/test_transforms.py",
    ),
    python(
        "transforms: all parts have the gradients of the first",
        "transforms.py",
        "            part = _part(arguments, dims, v)\n            if was_joined",
        "            part = _part(arguments, dims, 0)\n            if was_joined",
        "tests/test_transforms.py",
    ),
    python(
        "transforms: what was saved of all parts is taken for that of one",
        "transforms.py",
        "if was_joined:  #",
        "if False:  #",
        "tests/test_transforms.py",
    ),
    python(
        "transforms: weights of an ensemble stay in panels",
        "transforms.py",
        "p if dim is None else p.clone()",
        "p",
        "tests/test_transforms.py",
    ),
    python(
        "ops: a watched call is not checked",
        "ops.py",
        "    check_call(call, call.tensors())\n    # A compiled",
        "    # A compiled",
        "tests/test_call.py",
    ),
    python(
        "dispatch: autocast is overlooked",
        "dispatch.py",
        "if low != torch.float32:",
        "if False:",
        "tests/test_dispatch.py",
    ),
    python(
        "dispatch: calls are not checked",
        "dispatch.py",
        "    check_call(call, tensors)\n    if ops.is_lazy",
        "    if ops.is_lazy",
        "tests/test_call.py",
    ),
    python(
        "module: DropConnect in the first direction alone",
        "module.py",
        'range(names.index("weight_hh"), len(parameters), len(names))',
        'range(names.index("weight_hh"), len(names), len(names))',
        "tests/test_module.py tests/test_layers.py",
    ),
    python(
        "module: DropConnect on the input's weights",
        "module.py",
        'range(names.index("weight_hh"),',
        'range(names.index("weight_ih"),',
        "tests/test_module.py tests/test_layers.py",
    ),
    python(
        "module: DropConnect at half its rate",
        "module.py",
        "F.dropout(parameters[index], self.dropconnect, training=True)",
        "F.dropout(parameters[index], self.dropconnect / 2, training=True)",
        "tests/test_module.py",
    ),
    python(
        "module: Zoneout's masks have the rate of what is replaced",
        "module.py",
        "device=steps.device), rate)",
        "device=steps.device), 1 - rate)",
        "tests/test_module.py",
    ),
    python(
        "module: c has the mask of h",
        "module.py",
        "self._mask(self.zoneout_cell, steps, self.hidden_size)",
        "self._mask(self.zoneout, steps, self.hidden_size)",
        "tests/test_module.py",
    ),
    python(
        "module: a plan that differs in eps alone is loaded",
        "module.py",
        "if plan is not None and plan != self.norm and not",
        "if plan is not None and plan.with_eps(1) != self.norm.with_eps(1) and not",
        "tests/test_module.py",
    ),
    python(
        "module: a small part of another plan is overlooked",
        "module.py",
        "values.abs() < 1e-6",
        "values.abs() < 0.125",
        "tests/test_module.py",
    ),
    python(
        "module: the forget gate's bias goes to the input gate",
        "module.py",
        'spec.cell.rows("f", H)',
        'spec.cell.rows("i", H)',
        "tests/test_module.py",
    ),
    python(
        "sequences: the last states come in packed order",
        "sequences.py",
        "back = torch.argsort(self.order)",
        "back = self.order",
        "tests/test_sequences.py tests/test_properties.py",
    ),
    python(
        "sequences: rows of a NestedTensor may overlap",
        "checks.py",
        " & (bounds.diff() >= 0).all()",
        "",
        "tests/test_sequences.py",
    ),
    python(
        "sequences: a traced graph keeps the number of steps of its example",
        "sequences.py",
        'torch.as_tensor(size, device="cpu") for',
        "torch.tensor(int(size)) for",
        "tests/test_tooling.py",
    ),
    python(
        "flops: the first step's gradient of h counts without h_0",
        "flops.py",
        "(N if wants_h_0 else N - first) * flops",
        "N * flops",
        "tests/test_flops.py",
    ),
    python(
        "spec: a pickled plan keeps its name whatever it is",
        "spec.py",
        "and spec.cell.fit(named) == spec.plan:",
        "and spec.cell.fit(named):",
        "tests/test_tooling.py",
    ),
    python(
        "tooling: a pickled layer brings its own kind of spec",
        "tooling.py",
        "if not isinstance(got, kind):",
        "if False:",
        "tests/test_tooling.py",
    ),
    python(
        "sequences: a cut beyond a row's end counts",
        "sequences.py",
        "resets = resets & (steps.unsqueeze(1) < lengths).to(resets.device)",
        "pass",
        "tests/test_properties.py",
    ),
    python(
        "sequences: the reverse direction is reset a step late",
        "sequences.py",
        "torch.cat([resets[1:], torch.zeros_like(resets[:1])])",
        "resets",
        "tests/test_properties.py",
    ),
    python(
        "sequences: rows of equal length change places",
        "sequences.py",
        "torch.argsort(lengths, descending=True, stable=True)",
        "torch.argsort(lengths.flip(0), descending=True, stable=True)",
        "tests/test_properties.py tests/test_sequences.py",
    ),
    python(
        "weights: a ready step forgets the rate of c",
        "backends/cpu/__init__.py",
        "(input.shape, lead, input.dtype, rates, torch",
        "(input.shape, lead, input.dtype, rates[:1], torch",
        WEIGHTS,
    ),
    core(
        "training does not save what the weights were centred by",
        "core/core.h",
        "if (call.pass == FESTINA_TRAINING) save_means(worker, workers);",
        "",
    ),
    python(
        "weights: training reads a few values alone",
        "backends/cpu/weights.py",
        "is_training or self.reads_all or words",
        "self.reads_all or words",
        WEIGHTS,
    ),
    python(
        "weights: backward fills panels with other weights than the forward pass had",
        "backends/cpu/weights.py",
        "if not self._run_unchanged(plan, words, True):",
        "if self._run_unchanged(plan, words, True) is None:",
        WEIGHTS,
    ),
    python(
        "weights: views without an owner stay for ever",
        "backends/cpu/weights.py",
        "unowned[: max(0, len(unowned) + 1 - MOST_UNOWNED)]",
        "unowned[:0]",
        WEIGHTS,
    ),
    python(
        "autograd: the gradient of a step's c is lost",
        "autograd.py",
        "(d_h, None, d_c if d_c is None else d_c.unsqueeze(0))",
        "(d_h, None, None)",
        WEIGHTS,
    ),
    python(
        "weights: panels serve any plan",
        "backends/cpu/weights.py",
        "self._found.get((layer.token, *map(id, parameters)))",
        'self._found.get(("", *map(id, parameters)))',
        WEIGHTS,
    ),
    python("weights: a new version is not seen", "backends/cpu/weights.py", "*map(_VERSION, parameters),", "", WEIGHTS),
    python(
        "weights: an address that moved is not seen",
        "backends/cpu/weights.py",
        "*map(Tensor.data_ptr, parameters),",
        "",
        WEIGHTS,
    ),
    python(
        "weights: long calls read a few values",
        "backends/cpu/weights.py",
        'is_training or self.reads_all or words[at["T"]] >= STEPS_WHOLE',
        "is_training",
        WEIGHTS,
    ),
    python(
        "weights: fingerprints are taken after the kernel has read",
        "backends/cpu/__init__.py",
        "fingerprints_of(call, marks, words)\n        run_on(plan, words, panels)\n",
        "()\n        run_on(plan, words, panels)\n"
        "        fingerprints = fingerprints if fingerprints is None else fingerprints_of(call, marks, words)\n",
        WEIGHTS,
    ),
    python(
        "ops: shapes are handed out as numbers",
        "ops.py",
        "if type(call.input) in _PLAIN and not call.input.is_meta:",
        "if False:",
        "tests/test_call.py",
    ),
    python(
        "memory: a buffer may be too small",
        "backends/cpu/memory.py",
        "sizes = [rounded(max(wanted, 1))]",
        "sizes = [rounded(max(wanted // 2, 1))]",
        "tests/cpu/test_memory.py",
    ),
    python(
        "memory: what is idle has no limit",
        "backends/cpu/memory.py",
        "self._shrink(self.limit)",
        "pass",
        "tests/cpu/test_memory.py",
    ),
    python(
        "plans: has_zoneout forgets the mask",
        "backends/cpu/plans.py",
        "int(has_masks[0] or rates[0] != 0)",
        "int(rates[0] != 0)",
        CORE,
    ),
    python(
        "plans: what is saved has no room for c before Zoneout",
        "backends/cpu/plans.py",
        "call.zoneout_cell_mask is not None),\n        (call.zoneout, call.zoneout_cell),\n        1,",
        "False),\n        (call.zoneout, call.zoneout_cell),\n        1,",
        "tests/test_ops.py tests/test_compile.py",
    ),
    # Triton.
    triton(
        "triton: the LSTM forgets its old c",
        "cells.py",
        "return d_a, d_a, d * f",
        "return d_a, d_a, d",
        "lstm and HASTE and f32",
    ),
    triton(
        "triton: the GRU's reset gate gets no gradient",
        "cells.py",
        "(d_r, d_z, d_n), (d_r, d_z, d_n * r)",
        "(0 * d_r, d_z, d_n), (0 * d_r, d_z, d_n * r)",
        "gru-HASTE and f32",
    ),
    triton(
        "triton: the candidate's recurrent gradient misses r",
        "cells.py",
        "(d_r, d_z, d_n * r), d * z",
        "(d_r, d_z, d_n), d * z",
        "gru-HASTE and f32",
    ),
    triton(
        "triton: relu passes a gradient below 0",
        "cells.py",
        "tl.where(x[0] + h[0] > 0, d, 0.0)",
        "d",
        "indrnn_relu and f32",
    ),
    triton(
        "triton: the norm's backward keeps the mean",
        "norm.py",
        "(d[g] - mean - normed[g] * slope)",
        "(d[g] - normed[g] * slope)",
        "lstm-HASTE and f32",
    ),
    triton(
        "triton: the norm's backward misses the slope",
        "norm.py",
        "(d[g] - mean - normed[g] * slope)",
        "(d[g] - mean)",
        "lstm-HASTE and f32",
    ),
    triton(
        "triton: the gain of x is left out of its gradient",
        "norm.py",
        "d_normed = scaled(d, norm.GAIN, col, plan.H, G)",
        "d_normed = d",
        "lstm-HASTE and f32",
    ),
    triton(
        "triton: shifts sum over one block of rows",
        "norm.py",
        "d_gain, d_shift = gain_sums, shift_sums",
        "d_gain = gain_sums",
        "lstm-HASTE and f32",
    ),
    triton(
        "triton: a reset keeps h",
        "one_launch.py",
        "h = tl.where(is_reset, 0.0, h)",
        "h = h + 0.0",
        "indrnn and resets and f32",
    ),
    triton(
        "triton: backward keeps the gradient of h through a reset",
        "one_launch.py",
        "d_h = tl.where(is_reset, 0.0, d_kept) + recurrent",
        "d_h = d_kept + recurrent",
        "indrnn and resets and f32",
    ),
    triton(
        "triton: the initial state has the gradient of the last",
        "one_launch.py",
        "store_tile(side.D_H_0, d_h, first_p.row, first_p, plan.P)",
        "store_tile(side.D_H_0, d_h * 0, first_p.row, first_p, plan.P)",
        "indrnn and f32",
    ),
    triton(
        "triton: the second direction reads the parameters of the first",
        "direction.py",
        "call.of_direction(d).items()",
        "call.of_direction(0).items()",
        "bidirectional and HASTE and f32",
    ),
    triton(
        "triton: d_input is of one direction",
        "recurrence.py",
        "d_input.addmm_(d_product, parameters",
        "torch.mm(d_product, out=d_input, mat2=parameters",
        "bidirectional and HASTE and f32",
    ),
    triton(
        "triton: a wanted sum is forgotten between chunks",
        "recurrence.py",
        "self.sums[name].float() + gradient if name in self.sums else gradient",
        "gradient",
        "lstm-HASTE and ragged and f32",
    ),
]


def copied(folder: Path) -> None:
    """The tree in a folder."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
        else:
            shutil.copy(source, folder / name)
    (folder / "sitecustomize.py").write_text(OWN_COPY)


def applied(mutant: Mutant, text: str) -> str:
    """The text of the mutant's file, made wrong.

    Raises:
        ValueError: what is to be replaced does not stand there, or stands there more than once.
    """
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.old!r} must stand once in {mutant.file}, not {text.count(mutant.old)} times"
        )
    return text.replace(mutant.old, mutant.new)


def compiled(folder: Path) -> bool:
    """Compile the core of the tree in a folder, into `core`; False if it does not compile."""
    (folder / "core").mkdir()
    return subprocess.run(shlex.split(COMPILED), cwd=folder, capture_output=True).returncode == 0


def run(tests: str, folder: Path, core: Path | None, is_interpreted: bool) -> str:
    """ "pass", "fail", or what else came of some tests in a copy of the tree."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    if core:
        environment["FESTINA_CORE"] = str(core)
    if is_interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *shlex.split(tests)]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "fail"
    if done.returncode in (0, 1):
        return "fail" if done.returncode else "pass"
    if done.returncode < 0:  # a signal
        return "fail"
    return f"pytest ended with {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}"


def result(mutant: Mutant, core: Path | None) -> str:
    """ "killed", or what tells that it was not; `core` is the one without a mistake, None to do without."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copied(folder)
        path = folder / mutant.file
        path.write_text(applied(mutant, path.read_text()))
        if mutant.file.startswith("csrc/"):
            if not compiled(folder):
                return "does not compile"
            core = folder / "core"
        found = run(mutant.tests, folder, core, "/triton/" in mutant.file)
        return {"fail": "killed", "pass": "SURVIVED"}.get(found, found)


def unchanged(mutants: list[Mutant]) -> list[Mutant]:
    """A mutant without a mistake for each selection of tests: they must pass, or a failure tells nothing."""
    by_tests = {(mutant.tests, "/triton/" in mutant.file): mutant for mutant in mutants}
    return [mutant._replace(name=f"no mistake: {mutant.tests}", new=mutant.old) for mutant in by_tests.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose name or file contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="name them and stop")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.only in f"{mutant.name} {mutant.file}"]
    if args.list:
        print(*(f"{mutant.file}: {mutant.name}" for mutant in chosen), sep="\n")
        return 0
    start, killed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(name)
        copied(folder)
        if not compiled(folder):
            raise RuntimeError(f"the core does not compile; try: {COMPILED}")
        controls = unchanged(chosen)
        every = [*controls, *chosen]
        for mutant, found in zip(every, pool.map(lambda mutant: result(mutant, folder / "core"), every)):
            if mutant in controls:
                found = "passes" if found == "SURVIVED" else f"FAILS WITHOUT A MISTAKE ({found})"
            killed += found in ("killed", "passes")
            print(f"{mutant.name:<70} {found}", flush=True)
    print(f"{killed - len(controls)} of {len(chosen)} killed in {time.monotonic() - start:.0f} s")
    return int(killed < len(every))


if __name__ == "__main__":
    sys.exit(main())
