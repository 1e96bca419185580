"""The bytes of the formula against those that are given to torch.distributed."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from runs import in_processes

from hybriddit.attention import HybridAttention, TokenLayout
from hybriddit.parallel.rows import Rows
from hybriddit.parallel.traffic import hybrid_bytes, ring_bytes, ulysses_bytes

ROOT = Path(__file__).parents[2]
HEADS, HEAD_DIM, COLUMNS = 4, 16, 6


def make_layer(options):
    return HybridAttention(HEADS * HEAD_DIM, HEADS, HEAD_DIM, map_rank=0, **options)


def bytes_of(x):
    return x.numel() * x.element_size()


def count_what_is_sent(rank):
    size, sent, added_up = dist.get_world_size(), [], []
    exchange, all_reduce = dist.batch_isend_irecv, dist.all_reduce

    def counted_exchange(operations):
        sent.append(sum(bytes_of(each.tensor) for each in operations if each.op is dist.isend))
        return exchange(operations)

    def counted_sum(x, *arguments, **keywords):
        added_up.append(bytes_of(x))
        return all_reduce(x, *arguments, **keywords)

    dist.batch_isend_irecv, dist.all_reduce = counted_exchange, counted_sum
    cases = {"window": (3, 4)}, {"window": (14, 4), "kv_heads": 2}, {"window": (4, 4), "stride": (3, 1)}
    for options in (*cases, {"window": (3, 4), "mixer": "blocks"}):
        for height, text, dtype in ((11, 5, torch.bfloat16), (44, 5, torch.bfloat16), (13, 0, torch.float32)):
            layer = make_layer(options)
            whole = TokenLayout(text, ((height, COLUMNS),), True)
            rows = Rows(dist.group.WORLD, height)
            layout = whole._replace(grids=((rows.count, COLUMNS),), rows=rows)
            tokens = text + rows.count * COLUMNS
            query, key, value = (torch.randn(1, tokens, n, HEAD_DIM).to(dtype)
                                 for n in (HEADS, layer.kv_heads, layer.kv_heads))  # fmt: skip
            sent.clear(), added_up.clear()
            with torch.no_grad():
                layer.to(dtype)(query, key, value, layout)
            found = hybrid_bytes(layer, whole, size, dtype.itemsize)
            assert sum(sent) == found["window"][rank], (options, height)
            assert 2 * sum(added_up) * (size - 1) // size == found["far"][rank] + found["text"][rank]


def test_the_formula_counts_what_is_sent(tmp_path):
    codes = in_processes(4, count_what_is_sent, output=tmp_path / "said")
    assert codes == [0] * 4, (tmp_path / "said.0").read_text()


def test_it_grows_with_the_width_and_the_others_with_the_tokens():
    layer = make_layer({"window": (8, 8)})
    small, large = (hybrid_bytes(layer, TokenLayout(7, ((side, side),), True), 4, 2) for side in (64, 256))
    assert max(large["window"]) == 4 * max(small["window"]) == 4 * 2 * 7 * 64 * HEADS * HEAD_DIM * 2
    assert large["far"] == small["far"] and large["text"] == small["text"]
    assert ulysses_bytes(1600, 10, 4, 2) == 16 * ulysses_bytes(100, 10, 4, 2) == 4 * 1600 * 10 * 2 * 3 // 16
    # of its quarter of keys and values a process sends three on, its own and two of others
    assert ring_bytes(1600, 10, 4, 2) == 3 * 2 * 400 * 10 * 2


def test_the_table_of_the_page_is_the_script_s(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import communication

    monkeypatch.setattr(sys, "argv", ["communication.py"])
    communication.main()
    printed, page = capsys.readouterr().out, (ROOT / "docs" / "parallel.md").read_text()
    together = {
        f"| {name} |": f"| {row} |"
        for row in ("sd3, sd3.5-medium", "flux, chroma, qwen-image, flux2-klein, longcat-image", "flux2, krea2")
        for name in row.split(", ")
    }
    for line in printed.splitlines():
        name = line[2:].partition(" |")[0]
        if name in ("ovis-image", "flux3", "fibo"):  # of which the page says what is different
            assert line.split(" | ")[4] in page
        elif name != "sd3.5-large":  # which is not on the page
            for name, row in together.items():
                line = line.replace(name, row)
            assert line in page
    assert printed.count("\n") == 2 + 14 * 5
