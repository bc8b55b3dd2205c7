"""Convert another project's checkpoint to a festina state dict, or back.

    festina convert haste.LayerNormLSTM model.pt layer.safetensors
    festina convert sheeprl.LayerNormGRUCell model.ckpt layer.pt --prefix world_model.rssm.rnn. --option eps=1e-5
    festina convert keras.LSTM model.weights.h5 layer.pt --prefix layers/lstm/
    festina convert festina.LSTM layer.safetensors model.npz --to haste.LayerNormLSTM

Files are .safetensors, .pt (also .pth, .bin, .ckpt) and .npz, and Keras' .h5 (also .hdf5) to read. Nothing in a file is
executed, and no size in it is trusted. The output is written whole or, after an error, not at all.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

from torch import Tensor

from festina import convert
from festina.cli import UsageError, printable
from festina.convert import files
from festina.layers import Recurrent


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", help=f"format of the input: {', '.join(convert.names())}")
    parser.add_argument("input", type=Path, help="the file to read")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--to", metavar="FORMAT", help="format of the output (default: festina's own state dict)")
    parser.add_argument("--prefix", default="", help="read only names that start with this, and remove it")
    parser.add_argument("--to-prefix", default="", metavar="PREFIX", help="put this before every name")
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="take weights that are NaN or infinite (default: an error)"
    )
    for name, whose in (("--option", "the input's"), ("--to-option", "the output's")):
        parser.add_argument(
            name,
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"an option of {whose} format that its tensors do not determine, such as eps=1e-3; repeatable",
        )


def run(args: argparse.Namespace) -> int:
    try:
        of_input, of_output = options(args.option), options(args.to_option)
        convert.table(args.format, **of_input)
        if args.to:
            convert.table(args.to, **of_output)
        files.check_output(args.output)
        tensors = files.read(args.input, args.prefix)
        layer = loaded(args, tensors, of_input)
        target, own = (args.to, {}) if args.to else convert.own_format(layer)
        state = convert.dump(target, layer, **{**own, **of_output})
        files.write(args.output, {args.to_prefix + name: tensor for name, tensor in state.items()})
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(printable(f"{args.input}: {layer}"))
    print(printable(f"{args.output}: {target}, {len(state)} tensors"))
    return 0


def loaded(args: argparse.Namespace, tensors: dict[str, Tensor], of_input: dict[str, Any]) -> Recurrent:
    """The layer that the tensors make.

    Raises:
        UsageError: they make none.
    """
    try:
        return convert.load(args.format, tensors, prefix=args.prefix, allow_nonfinite=args.allow_nonfinite, **of_input)
    except (TypeError, ValueError) as error:
        hint = str(error).replace("allow_nonfinite=True", "--allow-nonfinite")
        raise UsageError(f"{args.input}: {hint}") from error


def options(texts: list[str]) -> dict[str, Any]:
    """Parse `NAME=VALUE` texts; a value that is no Python literal is a string.

    Raises:
        UsageError: a text has no `=`.

    >>> options(["eps=1e-3", "order=hx", "reset_after=False"])
    {'eps': 0.001, 'order': 'hx', 'reset_after': False}
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"an option must be NAME=VALUE, got {text!r}")
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
            found[name] = value
    return found
