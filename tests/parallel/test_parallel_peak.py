"""The peak of the process that holds most, counted in one process, against torch's allocator in several."""

import torch
import torch.distributed as dist
from runs import in_processes
from test_parallel_models import make_model
from tiny_memory import allocated
from tiny_models import make_inputs
from torch.utils._pytree import tree_leaves

from hybriddit.models import family_of
from hybriddit.models.peak import forward_peak
from hybriddit.parallel import shard

# windows and text; layers that stayed dense. What the window's kernel takes on a CPU, a MiB or so at any size, is not counted
CASES = {"sd35-medium": (2, (128, 128)), "flux-dev": (1, (64, 64))}
CPU = torch.device("cpu")


def hold_what_was_counted(rank):
    for kind, (images, grid) in CASES.items():
        model = make_model(kind)[0].float()
        text = family_of(model).example_text(model.config, images, 24, torch.zeros)
        counted = torch.tensor(0)
        if rank == 0:
            where = {"device": CPU, "dtype": torch.float32, "processes": dist.get_world_size()}
            counted += forward_peak(model, grid, text, **where)
        dist.broadcast(counted, 0)
        shard(model, dist.group.WORLD)
        inputs = make_inputs(model, grid, batch=images, text=24)
        given = sum(x.nbytes for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))
        held = torch.tensor(given + allocated(lambda model=model, inputs=inputs: model(**inputs)))
        dist.all_reduce(held, dist.ReduceOp.MAX)
        print(kind, int(counted), int(held))
        assert abs(counted / held - 1) < 0.1


def test_the_peak_that_is_counted_is_the_allocators(tmp_path):
    codes = in_processes(3, hold_what_was_counted, output=tmp_path / "said")
    assert codes == [0] * 3, (tmp_path / "said.0").read_text()
