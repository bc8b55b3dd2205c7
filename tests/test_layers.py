"""The layers and cells as `torch.nn` users meet them: signatures, state dicts, saving, cells, randomness, forms of input."""

from __future__ import annotations

import torch

import festina
from festina import norms


def test_a_cell_under_a_joint_plan_keeps_its_bias_flag() -> None:
    cell = festina.LSTMCell(3, 5, norm=norms.TORCHAUDIO)
    assert cell.bias is True
    assert "bias_joint" in cell.state_dict()
    assert cell(torch.zeros(2, 3))[0].shape == (2, 5)
