"""Write benchmarks/results/recipes.md: what each config of configs/distill trains, and what it takes, by `--dry-run`.

    python scripts/recipes.py

Nothing is measured and no weights are read. The text around the table stays.
"""

from __future__ import annotations

import re
from pathlib import Path

from hybriddit.files import replacing
from hybriddit.training.dry_run import dry_run
from hybriddit.training.run_config import load_config

PAGE = Path("benchmarks/results/recipes.md")
COLUMNS = (
    "config",
    "size, px",
    "trained, M",
    "adapter, MB",
    "images",
    "steps x batch",
    "rate",
    "one GPU, GB",
    "8 GPUs, DDP, GB",
    "8 GPUs, FSDP2, GB",
    "images, h",
    "training, h",
)


def row(path: Path) -> list[str]:
    config = load_config(path)
    found = dry_run(config)
    several = found["several"]
    return [
        f"`{path.stem}`",
        f"{config.data.width} x {config.data.height}",
        f"{found['trained_parameters'] / 1e6:.0f}",
        f"{4 * found['trained_parameters'] / 1e6:.0f}",  # saved in float32
        f"{found['images']:,}",
        f"{found['steps']:,} x {found['batch_size']}",
        f"{config.optim.lr:.0e}".replace("e-0", "e-"),
        f"{found['memory_bytes']['total'] / 1e9:.0f}",
        f"{several['ddp'] / 1e9:.0f}",
        f"{several['fsdp2'] / 1e9:.0f}",
        f"{found['hours']['data']:.1f}",
        f"{found['hours']['training']:.1f}",
    ]


def main() -> None:
    paths = [path for path in sorted(Path("configs/distill").glob("*.yaml")) if not path.stem.startswith("demo")]
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(row, paths)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    text = PAGE.read_text(encoding="utf-8")
    text, count = re.subn(
        r"(?<=<!-- table -->\n).*?(?=\n<!-- end of table -->)", lambda _: table, text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE} has not the marks of one table")
    with replacing(PAGE) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
