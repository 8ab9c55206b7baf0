"""Batch norms over the batches of several processes: each kind, against the plain one on the joined batch."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import nn

from stl_offline.distributed import share_batch_statistics
from stl_offline.errors import InputError
from stl_offline.models.layers import recomputed

CASES = {
    "2d": (nn.BatchNorm2d, (5, 3, 4, 2)),
    "1d": (nn.BatchNorm1d, (5, 3)),
    "tokens": (nn.BatchNorm1d, (5, 3, 7)),
    "timm's": (BatchNormAct2d, (5, 3, 4, 2)),
}


def make(kind):
    torch.manual_seed(3)
    norm = CASES[kind][0](3)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    return norm


def inputs(kind):
    return torch.randn(CASES[kind][1], generator=torch.Generator().manual_seed(4)) * 3 + 1


def run(norm, batch, recompute=False):
    batch = batch.clone().requires_grad_()
    out = recomputed(norm, batch) if recompute else norm(batch)
    out.pow(3).sum().backward()
    return [out.detach(), batch.grad, *(value.clone() for value in norm.buffers())]


def process(rank, place, folder):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    found = {}
    for kind in CASES:
        for recompute in (False, True):
            norm = nn.Sequential(make(kind))
            assert share_batch_statistics(norm) == 1
            part = inputs(kind)[:3] if rank == 0 else inputs(kind)[3:]
            found[kind, recompute] = run(norm, part, recompute)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_statistics_of_all_images(tmp_path):
    """Of unequal parts; also where activations are computed again in the backward pass."""
    mp.spawn(process, (tmp_path / "store", tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in CASES:
        expected = run(make(kind), inputs(kind))
        for recompute in (False, True):
            one, other = (part[kind, recompute] for part in parts)
            for place in (0, 1):
                joined = torch.cat([one[place], other[place]])
                torch.testing.assert_close(joined, expected[place], rtol=1e-4, atol=1e-4)
            for found in (one, other):
                for value, wanted in zip(found[2:], expected[2:], strict=True):
                    torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "levit_128s"])
def test_every_batch_norm_of_a_model_is_shared(name):
    model = timm.create_model(name)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    state = copy.deepcopy(model.state_dict())
    assert share_batch_statistics(model) == len(norms) > 10
    assert all(type(norm).__name__.startswith("SyncBatchNorm") for norm in norms)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_batch_norm_that_cannot_be_shared_is_named():
    for norm in (nn.BatchNorm3d(2), nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2, track_running_stats=False)):
        with pytest.raises(InputError, match=f"`sync_bn` cannot share .* {type(norm).__name__}; set `sync_bn`"):
            share_batch_statistics(nn.Sequential(nn.BatchNorm2d(2), norm))
