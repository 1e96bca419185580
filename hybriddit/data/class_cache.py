"""Cache class folders in shards on disk: as pixels, or as a VAE's latents of every image and its mirror image."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torchvision.transforms.v2.functional import horizontal_flip
from tqdm import tqdm

from ..files import checksum, read_json, read_tensors, write_json
from ..models.family import check_latents_scale
from ..stored import choose_variant
from .class_data import ClassData, ClassInfo, to_model_range
from .class_images import find_classes, read_images
from .image_files import content_of, say
from .shards import SETTINGS, ShardFile, check_settings, read_settings, save_shard, write_settings
from .tars import TarMember

INDEX = "index.json"  # written last: a cache without it is not finished


def load_vae(path: str) -> AutoencoderKL:
    """An AutoencoderKL from a folder or a repository, safetensors only. Raises ValueError where there is none.

    Of a folder without plain files it takes the variant that there is, see `stored.choose_variant`.
    """
    variant = None
    try:
        kind = AutoencoderKL.load_config(path).get("_class_name")
        if kind not in (None, AutoencoderKL.__name__):
            raise ValueError(f"it is a {kind}")
        if os.path.isdir(path):
            variant, _ = choose_variant({"VAE": os.listdir(path)}, None, path)
        vae = AutoencoderKL.from_pretrained(path, use_safetensors=True, variant=variant)
        check_latents_scale(vae.config)
        return vae.requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"no AutoencoderKL at {path!r}: {' '.join(str(error).split())}") from error


def run(
    folder: Path,
    out: Path,
    *,
    vae: str | None = None,
    size: int = 256,
    channels: int = 3,
    batch_size: int = 64,
    shard_size: int = 4096,
    quiet: bool = False,
) -> None:
    """Run `hybriddit cache`, in one process or in each of torchrun's. vae: folder or repository of the VAE."""
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    make_cache(
        folder,
        out,
        size=size,
        channels=channels,
        vae=load_vae(vae).to(device) if vae else None,
        vae_name=vae,
        batch_size=batch_size,
        shard_size=shard_size,
        rank=rank,
        processes=processes,
        progress=rank == 0 and not quiet,
    )
    if (out / INDEX).exists() and not quiet:
        index = read_index(out)
        print(f"{index['images']} images in {out}, {len(index['skipped'])} left out (see {out / INDEX})")


def make_cache(
    folder: str | Path,
    cache: str | Path,
    *,
    size: int,
    channels: int = 3,
    vae: AutoencoderKL | None = None,
    vae_name: str | None = None,
    batch_size: int = 64,
    shard_size: int = 4096,
    rank: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> None:
    """Cache class folders (see `find_classes`) in shards on disk: pixels, or with a VAE the moments of latents.

    Every shard is whole or absent; a run that was stopped continues where it stopped. With a finished cache no image is
    opened and nothing is written. The shards of images that have changed since, by content, are made again; a folder of
    other file names is refused. Folder and VAE may have moved, and the shards keep the size they have.

    Several processes, told apart by rank, take turns at the shards, and the last to finish writes the index: number of
    images, checksums, mean and standard deviation of each channel as the model would see it, and which images could not
    be read.

    size: side of the square images, in pixels. vae_name: recorded as the place of the VAE.

    Raises ValueError for a cache that was made with other settings, for impossible numbers, for a VAE that does not
    fit, and where no image can be read.
    """
    folder, cache = Path(folder), Path(cache)
    for name, number in (("size", size), ("batch size", batch_size), ("shard size", shard_size)):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, not {number}")
    if vae is not None:
        unit = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent, along each axis
        if channels != vae.config.in_channels or size % unit:
            raise ValueError(
                f"this VAE takes images of {vae.config.in_channels} channels and a multiple of {unit} pixels, "
                f"not of {channels} and {size}"
            )
    found = find_classes(folder)
    paths, labels, classes = found.paths, found.labels, found.classes
    if found.note and progress:
        say(found.note)
    in_tars = isinstance(paths[0], TarMember)
    if not in_tars and classes != [""] and cache.resolve().parent == folder.resolve():
        raise ValueError(f"--out {cache} would be a class, as every subfolder of {folder} is: give another folder")
    shape = (channels, size, size)
    info = ClassInfo(shape, classes)
    if vae is not None:
        with torch.no_grad():
            moments = _moments(vae, torch.zeros(1, *shape, dtype=torch.uint8))
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        digest = checksum({name: value.float().cpu() for name, value in vae.state_dict().items()})
        info = ClassInfo(shape, classes, vae_name, digest, scaling, shift)
    names = [path.relative_to(folder).as_posix() for path in paths]
    settings = {**asdict(info), "size": size, "images": len(paths), "shard_size": shard_size}
    # a path in class folders tells the class; in tars it does not
    told = [f"{name}: {label}" for name, label in zip(names, labels, strict=True)] if in_tars else names
    settings["files"] = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    before = read_settings(cache, "--out")
    if before is None:
        write_settings(cache, settings)
    else:
        fixed = ("shape", "classes", "vae_sha256", "scaling_factor", "shift_factor", "size")
        check_settings(cache, before, {name: settings[name] for name in fixed}, "--out")
        if before["files"] != settings["files"]:
            _check_files(cache, before, paths, names)
        if before["shard_size"] != shard_size and progress:
            say(f"{cache} has shards of {before['shard_size']} images: it keeps them, --shard-size is for a new one")
        shard_size = before["shard_size"]

    starts = range(0, len(paths), shard_size)
    todo = []
    for number in range(rank, len(starts), processes):
        part = slice(starts[number], starts[number] + shard_size)
        record, shard = _shard_files(cache, number)
        line = read_json(record) if record.exists() else None
        changed = [] if line is None else _changed(line.get("files"), names[part], paths[part])
        if changed:  # no index before all of them are made again
            say(
                f"{changed[0]} has changed since {cache} was made: the {len(paths[part])} images of its shard are read anew"
            )
            for path in (cache / INDEX, record):
                path.unlink(missing_ok=True)
        if changed or line is None or (line["images"] and not shard.exists()):
            todo.append((part, record, shard))
    for part, record, shard in tqdm(todo, desc="caching", unit="shard", disable=not (progress and todo)):
        files = {name: _file_state(path) for name, path in zip(names[part], paths[part], strict=True)}
        images, kept, skipped = read_images(paths[part], labels[part], size, channels)
        line = {"images": len(kept), "skipped": {str(Path(p).relative_to(folder)): why for p, why in skipped.items()}}
        if kept:
            table = {"images": torch.stack(images), "labels": torch.tensor(kept)}
            if vae is not None:
                table = {**_encode(vae, table["images"], batch_size), "labels": table["labels"]}
            save_shard(shard, table)
            line |= {"checksum": checksum(table), **_sums(table, info)}
        write_json(record, {**line, "files": files})
    records = [_shard_files(cache, number)[0] for number in range(len(starts))]
    if (todo or not (cache / INDEX).exists()) and all(record.exists() for record in records):
        _write_index(cache, records)


def _shard_files(cache: Path, number: int) -> tuple[Path, Path]:
    """The record of a shard, written after the shard, and the shard, which is absent if no image of it can be read."""
    return cache / f"shard-{number:05d}.json", cache / f"shard-{number:05d}.safetensors"


def _file_state(path: Path | TarMember) -> list:
    """What `content_of` tells of a file; [None] * 3 of one that cannot be read."""
    try:
        return list(content_of(path))
    except (OSError, ValueError):  # a link that leads nowhere, for example, or a pipe
        return [None, None, None]


def _changed(files: dict[str, list] | None, names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """The names of the images whose content is another than when their shard was made.

    A file of the same size and time is not opened. files: None in shards of version 0.1, which does not know.
    """
    if files is None:
        return []
    changed = []
    for name, path in zip(names, paths, strict=True):
        stat = path.stat() if path.is_file() else None
        now = [None, None] if stat is None else [stat.st_size, stat.st_mtime_ns]
        if files[name][:2] != now and files[name][2] != _file_state(path)[2]:
            changed.append(name)
    return changed


def _check_files(cache: Path, found: dict, paths: Sequence[Path], names: Sequence[str]) -> None:
    """Raise ValueError, if possible naming one, where a folder's images are not those of the cache.

    Version 0.1 also recorded their sizes.
    """
    # a broken link has no size; it is left out as an image that cannot be read
    sizes = [(name, path.stat().st_size if path.is_file() else None) for name, path in zip(names, paths, strict=True)]
    if found["files"] == hashlib.sha256(json.dumps(sizes).encode()).hexdigest():
        return
    records = [read_json(record) for record in sorted(cache.glob("shard-*.json"))]
    known, here = {name: None for record in records for name in record.get("files", {})}, set(names)
    gone = [f"{name} is gone" for name in known if name not in here]
    new = [f"{name} is new" for name in names if name not in known]
    which = f" ({(gone + new)[0]})" if gone or (new and len(known) == found["images"]) else ""
    raise ValueError(f"the cache {cache} was made with other values of files{which}: use another --out, or delete it")


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
    """Mean and log-variance of the latents of images and of their mirror images, fp16 [N, 2 C, h, w] each."""
    batches = images.split(batch_size)
    return {
        "moments": torch.cat([_moments(vae, batch) for batch in batches]).half(),
        "flipped": torch.cat([_moments(vae, horizontal_flip(batch)) for batch in batches]).half(),
    }


def _moments(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    pixels = to_model_range(images).to(vae.device, vae.dtype)
    return vae.encode(pixels).latent_dist.parameters.float().cpu()


def _sums(table: Mapping[str, torch.Tensor], info: ClassInfo) -> dict[str, list[float]]:
    """Each channel's sums of values and of squares over images and positions, for its mean and variance."""
    if "images" in table:
        x = table["images"].double() / 127.5 - 1
        variance = torch.zeros_like(x)
    else:
        mean, logvar = table["moments"].double().chunk(2, dim=1)
        x = (mean - info.shift_factor) * info.scaling_factor
        variance = logvar.clamp(-30, 20).exp() * info.scaling_factor**2
    return {"sum": x.sum((0, 2, 3)).tolist(), "square": (x**2 + variance).sum((0, 2, 3)).tolist()}


def _write_index(cache: Path, records: Sequence[Path]) -> None:
    lines = [read_json(record) for record in records]
    count = sum(line["images"] for line in lines)
    skipped = {path: why for line in lines for path, why in line["skipped"].items()}
    if not count:
        raise ValueError(f"none of the {len(skipped)} images can be read: {next(iter(skipped.values()))}")
    shape = json.loads((cache / SETTINGS).read_text())["shape"]
    positions = count * shape[1] * shape[2]
    full = [line for line in lines if line["images"]]
    mean = [sum(values) / positions for values in zip(*(line["sum"] for line in full), strict=True)]
    square = [sum(values) / positions for values in zip(*(line["square"] for line in full), strict=True)]
    index = {
        "images": count,
        "mean": mean,
        "std": [max(0.0, s - m * m) ** 0.5 for m, s in zip(mean, square, strict=True)],
        "shards": {
            _shard_files(cache, number)[1].name: line["checksum"] for number, line in enumerate(lines) if line["images"]
        },
        "skipped": skipped,
    }
    write_json(cache / INDEX, index)
    for left in cache.glob(".shard-*.tmp"):  # left by killed processes: no shard is being written any more
        left.unlink(missing_ok=True)


def read_index(cache: str | Path) -> dict:
    """The index of a finished cache. Raises ValueError where it is missing or damaged."""
    path = Path(cache) / INDEX
    if not path.exists():
        raise ValueError(f"the cache {cache} is not finished: run `hybriddit cache` again, it goes on from there")
    try:
        index = json.loads(path.read_text())
        return {name: index[name] for name in ("images", "mean", "std", "shards", "skipped")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete it and run `hybriddit cache` again"
        ) from None


def open_cache(cache: str | Path, *, memory: bool = False) -> ClassData:
    """Open a finished cache; each shard is compared with its checksum when it is first read.

    memory: read everything now. Raises ValueError where the cache is not finished, damaged or mixed with another.
    """
    cache = Path(cache)
    try:
        settings = json.loads((cache / SETTINGS).read_text())
        names = ("classes", "vae", "vae_sha256", "scaling_factor", "shift_factor")
        info = ClassInfo(tuple(settings["shape"]), **{name: settings[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{cache / SETTINGS} is damaged, or not of a cache by `hybriddit cache` "
            f"({type(error).__name__}: {error}): use another folder, or make the cache anew"
        ) from None
    index = read_index(cache)
    missing = [name for name in index["shards"] if not (cache / name).exists()]
    if missing:
        raise ValueError(f"{cache} lacks {missing[0]}: run `hybriddit cache` again, it makes what is not there")
    shards = list(_open_shards(cache, index["shards"], memory))
    if memory:
        shards = [{key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}]
    return ClassData(shards, info)


def _open_shards(cache: Path, shards: Mapping[str, str], memory: bool) -> Iterator[Mapping]:
    for name, expected in shards.items():
        shard = ShardFile(cache / name)
        if shard.checksum != expected:
            raise ValueError(f"{cache / name} is not the one of {INDEX}: delete it and run `hybriddit cache` again")
        yield read_tensors(cache / name) if memory else shard
