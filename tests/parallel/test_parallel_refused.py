"""What is not spread over processes ends in one line on every process, and so does a process that ends or hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from diffusers import FirstBlockCacheConfig
from runs import in_processes
from tiny_models import make, make_inputs, run
from torch.distributed.device_mesh import init_device_mesh

from hybriddit import HybridConfig, dense_mode, hybridize, restore_dense
from hybriddit.attention import TokenLayout
from hybriddit.models import FLUX, flux
from hybriddit.parallel import equal, shard

GRID = (5, 4)


def hybrid(kind="pixart"):
    return hybridize(make(kind), HybridConfig(window=3))


def refused(words, function, *arguments, **keywords):
    with pytest.raises(ValueError) as found:
        function(*arguments, **keywords)
    assert words in str(found.value) and "\n" not in str(found.value), found.value


def try_everything(rank):
    world = dist.group.WORLD
    spread = shard(hybrid(), world)
    inputs = make_inputs(spread, GRID)
    refused("spread over processes already", shard, spread, world)
    refused("is not hybrid: hybridize it first", shard, make("pixart"), world)
    timed = hybridize(make("qwen-image", zero_cond_t=True), HybridConfig(window=3))
    refused("zero_cond_t: each token of this Qwen-Image has a time", shard, timed, world)
    refused("images of Z-Image are not spread over processes", shard, hybrid("z-image"), world)
    pooling = hybridize(make("pixart"), HybridConfig(window=3, pooled_keys=2, linear=False))
    refused("transformer_blocks.0.attn1.hybrid has pooled keys", shard, pooling, world)
    scanning = hybridize(make("pixart"), HybridConfig(window=3, mixer="scan"))
    refused("transformer_blocks.0.attn1.hybrid sees the whole image at once (a mixer", shard, scanning, world)
    refused("2 dimensions: give the one that shares an image", shard, hybrid(), init_device_mesh("cpu", (1, 2)))
    refused("is within OptimizedModule", shard, torch.compile(hybrid()), world)
    refused("2 processes cannot share an image of 1 rows of tokens", run, spread, make_inputs(spread, (1, 4)))

    other = {**inputs, "hidden_states": inputs["hidden_states"] + (rank == 1)}
    refused("rank 1 calls the model with other inputs than rank 0", run, spread, other)
    other = {**inputs, "hidden_states": inputs["hidden_states"].flip(-1) if rank else inputs["hidden_states"]}
    refused("every process needs the same prompt, settings and seed", run, spread, other)
    refused("rank 1 calls", run, spread, make_inputs(spread, (5, 4 + rank)))

    model = hybrid()
    with torch.no_grad():
        model.transformer_blocks[1].attn1.to_q.bias[3] += rank
    refused("rank 1 has other weights (transformer_blocks.1.attn1.to_q.bias) than rank 0", shard, model, world)
    model = hybridize(make("pixart"), HybridConfig(window=3 + rank))
    refused("rank 1 has other model config than rank 0", shard, model, world)
    refused("rank 1 has other model class than rank 0", shard, hybrid(("pixart", "sd3")[rank]), world)
    versions, equal.running_versions = equal.running_versions, lambda: {"torch": f"2.{rank}"}
    refused(f'rank 1 has other versions than rank 0: here {{"torch": "2.{rank}"}}', shard, hybrid(), world)
    equal.running_versions = versions

    cached = shard(hybrid("flux-dev"), world)
    cached.enable_cache(FirstBlockCacheConfig())
    refused("first-block cache would skip blocks", run, cached, make_inputs(cached, GRID))

    reference = shard(hybrid("flux-dev"), world)
    kontext = make_inputs(reference, (2 * GRID[0], GRID[1]))
    layout = {"token_layout": TokenLayout(5, (GRID, GRID), True)}
    refused("reference images is not spread", run, reference, kontext, joint_attention_kwargs=layout)
    processor = flux.HybridFluxAttnProcessor.__call__

    def forgetful(self, *args, token_layout, **kwargs):
        return processor(self, *args, token_layout=TokenLayout(*token_layout[:3]), **kwargs)

    flux.HybridFluxAttnProcessor.__call__ = forgetful
    refused("has dropped its layout's rows", run, reference, make_inputs(reference, GRID))
    flux.HybridFluxAttnProcessor.__call__ = processor
    type(FLUX).image_exit = None
    refused("FLUX does not say where its image tokens leave the model", shard, hybrid("flux-dev"), world)

    with dense_mode(spread):
        refused("has no gradients: no_grad()", spread, **inputs)
    restore_dense(spread)
    refused("was converted since its images were spread over processes", run, spread, inputs)
    hybridize(spread, HybridConfig(window=2, layers={"*.0.*": "dense"}))
    refused("was converted since its images were spread over processes", run, spread, inputs)


def test_one_line_on_every_process(tmp_path):
    codes = in_processes(2, try_everything, output=tmp_path / "said")
    assert codes == [0, 0], "".join((tmp_path / f"said.{rank}").read_text() for rank in range(2))


def test_no_processes():
    refused("there are no other processes", shard, hybrid(), None)


def test_diffusers_own_parallelism_is_refused():
    refused("use hybriddit.parallel.shard", hybrid("flux-dev").enable_parallelism, config=None)


def lose_one(rank, how, folder):
    model = shard(hybrid("sd3"), dist.group.WORLD)
    inputs = make_inputs(model, GRID)
    run(model, inputs)
    calls = []
    attention = model.transformer_blocks[1].attn.hybrid

    def fail(*_):
        calls.append(None)
        if rank == 1 and how == "ends":
            os._exit(7)
        if rank == 1:
            time.sleep(15)

    attention.register_forward_pre_hook(fail)
    started = time.monotonic()
    try:
        run(model, inputs)
    except ConnectionError as error:
        assert f"rank {rank} lost the other processes, of which one has ended or hangs" in str(error), error
        assert "\n" not in str(error)
        (folder / f"told.{rank}").write_text(str(time.monotonic() - started))
    os._exit(0)  # the others' connections are gone


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_a_lost_process_ends_the_others(how, tmp_path):
    codes = in_processes(3, lose_one, how, tmp_path, output=tmp_path / "said", limit=4)
    assert codes == [0, 7 if how == "ends" else 0, 0], (tmp_path / "said.0").read_text()
    told = {path.name: float(path.read_text()) for path in tmp_path.glob("told.*")}
    assert (
        told["told.0"] < 12 and told["told.2"] < 12
    )  # each waits for at most 4 seconds, of which other work takes some
