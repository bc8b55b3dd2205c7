"""Several processes, on gloo: DDP and FSDP2 train as one process does, checkpoints come back, another plan is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import festina
from festina import norms

WORLD, STEPS, T, B, I, H = 2, 3, 5, 4, 3, 7


class Model(nn.Module):
    """Two layer-normalised layers, both directions, and a head; H is odd, so that no parameter splits evenly."""

    def __init__(self, norm: festina.NormPlan = norms.HASTE) -> None:
        super().__init__()
        self.rnn = festina.LSTM(I, H, num_layers=2, bidirectional=True, norm=norm, dtype=torch.float64)
        self.head = nn.Linear(2 * H, 1, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x, lengths=lengths)[0])
        return y


def model(seed: int = 0, norm: festina.NormPlan = norms.HASTE) -> Model:
    torch.manual_seed(seed)
    return Model(norm)


def sharded(module: Model) -> Model:
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(module.rnn, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def train(module: nn.Module, rank: int = 0, world: int = 1) -> list[float]:
    """The losses of a few steps on this process's rows; every row counts the same, so halves average to the whole."""
    torch.manual_seed(1)
    x, lengths = torch.randn(STEPS, T, B, I, dtype=torch.float64), torch.tensor([5, 2, 3, 4])
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    own, losses = slice(rank * B // world, (rank + 1) * B // world), []
    for batch in x:
        loss = module(batch[:, own], lengths[own]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with nothing sharded; empty on every process but the first."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def refused(load: Any) -> str:
    """The message with which `load` is refused."""
    try:
        load()
    except Exception as error:
        return str(error)
    return ""


def tried(rank: int, folder: str) -> dict[str, Any]:
    """What a process finds."""
    found: dict[str, Any] = {}

    ddp = DistributedDataParallel(model())
    found["ddp losses"] = train(ddp, rank, WORLD)
    found["ddp"] = ddp.module.state_dict()

    fsdp = sharded(model())
    found["fsdp losses"] = train(fsdp, rank, WORLD)
    found["fsdp"] = whole(fsdp)

    own = get_model_state_dict(fsdp)
    dcp.save({"model": own}, checkpoint_id=f"{folder}/checkpoint")
    other = sharded(model(seed=2))
    read = get_model_state_dict(other)
    dcp.load({"model": read}, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(other, read)
    found["read"] = whole(other)

    spread = sharded(model(seed=3))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(spread, dict(found["fsdp"]), options=options)  # which writes into the dict it is given
    found["spread"] = whole(spread)

    for name, plan in (("eps", norms.HASTE.with_eps(0.001)), ("place", norms.FASTRNNS)):
        wrong = sharded(model(norm=plan))
        found[f"refused {name}"] = refused(lambda wrong=wrong: set_model_state_dict(wrong, own))
    return found


def work(rank: int, folder: str) -> None:
    """What each process does; what it found goes to a file.

    Modules hold on to the process group, and it must not outlive `destroy_process_group`: ended with the interpreter, its
    threads may abort the process.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    torch.save(tried(rank, folder), f"{folder}/{rank}.pt")
    gc.collect()
    dist.barrier()  # neither leaves while the other still waits for it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found: they are started once for all tests."""
    folder = tmp_path_factory.mktemp("world")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of one process with the whole batch."""
    module = model()
    return train(module), module.state_dict()


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_as_one(way: str, found: Any, alone: Any) -> None:
    losses, weights = alone
    mean = torch.tensor([one[f"{way} losses"] for one in found], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0][way], dict(weights), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["read", "spread"])
def test_a_sharded_checkpoint_comes_back(way: str, found: Any) -> None:
    torch.testing.assert_close(found[0][way], found[0]["fsdp"], rtol=0, atol=0)


@pytest.mark.parametrize("what", ["eps", "place"])
def test_a_sharded_checkpoint_of_another_plan_is_refused(what: str, found: Any) -> None:
    for one in found:
        assert "the checkpoint was saved under the norm plan HASTE" in one[f"refused {what}"]


def test_a_checkpoint_of_two_processes_loads_into_one(found: Any, tmp_path: Path) -> None:
    torch.save(found[0]["fsdp"], tmp_path / "whole.pt")
    module = model(seed=4)
    module.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True))
    torch.testing.assert_close(dict(module.state_dict()), found[0]["fsdp"], rtol=0, atol=0)
