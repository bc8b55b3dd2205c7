"""The character model: an embedding, a recurrent layer, a linear layer. Only the recurrent layer differs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import festina
from festina import backends
from festina.call import Case
from festina.cli.demo.text import UNKNOWN
from festina.layers import Recurrent

State = Tensor | tuple[Tensor, ...]

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "torch.nn.LSTM": nn.LSTM,
    "festina.LSTM": festina.LSTM,
    "festina.LayerNormLSTM": festina.LayerNormLSTM,
    "torch.nn.GRU": nn.GRU,
    "festina.GRU": festina.GRU,
    "festina.LayerNormGRU": festina.LayerNormGRU,
    "festina.LayerNormIndRNN": festina.LayerNormIndRNN,
}
"""The recurrent layers that can be compared. All are built and called alike: (input, hidden, layers), (x, state)."""

DEFAULT = ("torch.nn.LSTM", "festina.LSTM", "festina.LayerNormLSTM")

EMBEDDING = 64
"""Width of the character embedding: about the number of characters that source code uses."""


class CharacterModel(nn.Module):
    """Scores of the next character, `[T, B, V]`, for characters `[T, B]`; the state goes in and comes out."""

    def __init__(self, layer: str, characters: int, hidden: int, layers: int) -> None:
        super().__init__()
        # The recurrent layer is made last: under one seed the other two start alike, whatever it draws.
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.head = nn.Linear(hidden, characters)
        self.recurrent = LAYERS[layer](EMBEDDING, hidden, layers)

    def forward(self, characters: Tensor, state: State | None) -> tuple[Tensor, State]:
        output, state = self.recurrent(self.embedding(characters), state)
        return self.head(output), state


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The function applied to h, or to h and c."""
    return function(state) if isinstance(state, Tensor) else tuple(function(part) for part in state)


def backend_of(model: CharacterModel, device: torch.device) -> str:
    """Who carries out the recurrence of this model: a backend of festina, or torch itself."""
    layer = model.recurrent
    if not isinstance(layer, Recurrent):
        return "torch"
    return backends.select(Case(layer.spec, torch.float32, device.type), backends.forced())


@torch.no_grad()
def sample(
    model: CharacterModel, characters: str, prompt: str, length: int, seed: int, temperature: float = 0.6
) -> str | None:
    """`prompt` and `length` more characters, streamed through the layer's cells one step at a time.

    The cells share the layer's parameters and give its numbers, so what was trained on windows runs as a stream.
    None for a layer of `torch.nn`, which has no cell.
    """
    layer = model.recurrent
    if not isinstance(layer, Recurrent):
        return None
    cells = [layer.cell(k) for k in range(layer.num_layers)]
    states: list[State | None] = [None] * len(cells)
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    number = {c: k for k, c in enumerate(characters)}

    text, scores = "", torch.zeros(1, len(characters))
    for step in range(len(prompt) + length):
        if step < len(prompt):
            text += prompt[step]
        else:
            scores[:, number[UNKNOWN]] = -torch.inf
            text += characters[int(torch.multinomial(torch.softmax(scores / temperature, 1), 1, generator=generator))]
        x = model.embedding(torch.tensor([number.get(text[-1], number[UNKNOWN])], device=device))
        for k, cell in enumerate(cells):
            state: State = cell(x, states[k])
            states[k] = state
            x = state if isinstance(state, Tensor) else state[0]
        scores = model.head(x).float().cpu()
    return text
