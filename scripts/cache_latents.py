#!/usr/bin/env python
"""Cache a folder of images for training: their latents, of the image and of its mirror image, or their pixels.

    python scripts/cache_latents.py imagenet/train --vae stabilityai/sd-vae-ft-ema --size 256 --out cache/imagenet256
    torchrun --nproc-per-node 8 scripts/cache_latents.py ...     # the same, on eight GPUs

The subfolders are the classes. Each image is cut as ADM cuts it. A run that was stopped, or killed, goes on where it
was when it is started again. Images that cannot be read are counted, listed in index.json and left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from hybriddit.data.class_images import INDEX, load_vae, make_cache, read_index


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of images; its subfolders are the classes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache")
    parser.add_argument("--vae", help="folder or repository of an AutoencoderKL; without one, pixels are kept")
    parser.add_argument("--size", type=int, default=256, help="of the square images, in pixels (default: %(default)s)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: grey (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="of the VAE (default: %(default)s)")
    parser.add_argument("--shard-size", type=int, default=4096, help="images of one file (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    args = parser.parse_args(argv)
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        make_cache(
            args.folder,
            args.out,
            size=args.size,
            channels=args.channels,
            vae=load_vae(args.vae).to(device) if args.vae else None,
            vae_name=args.vae,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            rank=rank,
            processes=processes,
            progress=rank == 0 and not args.quiet,
        )
        if (args.out / INDEX).exists() and not args.quiet:
            index = read_index(args.out)
            print(f"{index['images']} images in {args.out}, {len(index['skipped'])} left out (see {args.out / INDEX})")
    except (ValueError, OSError) as error:
        print(f"cache_latents.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
