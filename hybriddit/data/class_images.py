"""Labelled images, and caches of their latents, for training from scratch."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from tqdm import tqdm

from ..files import checksum, read_tensors, write_json
from ..images import IMAGE_ENDINGS, open_image
from .latents import Shards, TableFile, claim_folder, save_table

INDEX = "index.json"  # written last: a cache without it is not finished
IDX_IMAGES, IDX_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
MODES = {1: "L", 3: "RGB"}  # PIL's, by the number of channels


@dataclass(frozen=True)
class ClassInfo:
    """What the rows of a set are.

    shape: (C, H, W) of what the model sees. classes: their names, in the order of the labels.
    vae: where the VAE of latents came from; None where the rows are images. vae_sha256: of its weights.
    scaling_factor, shift_factor: the model sees (latent - shift_factor) * scaling_factor.
    """

    shape: tuple[int, int, int]
    classes: list[str] = field(default_factory=list)
    vae: str | None = None
    vae_sha256: str | None = None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


class ClassData(Shards):
    """Images or latents with their labels.

    shards: tables of "labels" [N] and either "images", uint8 [N, C, H, W], or "moments" and "flipped", fp16
        [N, 2 C, H, W]: mean and log-variance of the latents of the image and of its mirror image.
    """

    def __init__(self, shards, info: ClassInfo):
        super().__init__(shards)
        self.info = info

    def draw(
        self, indices: list[int], mirrored: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model sees of the rows, fp32 [B, C, H, W], and their labels, int64 [B].

        mirrored: bool [B]. noise: normal, [B, C, H, W], which draws latents from their distribution; of images, None.
        """
        rows = self.rows(indices)
        mirrored = mirrored.view(-1, 1, 1, 1)
        if "images" in rows:
            images = torch.where(mirrored, rows["images"].flip(-1), rows["images"])
            return images.float() / 127.5 - 1, rows["labels"].long()
        moments = torch.where(mirrored, rows["flipped"], rows["moments"]).float()
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.mean + posterior.std * noise
        return (latents - self.info.shift_factor) * self.info.scaling_factor, rows["labels"].long()

    def labels(self) -> torch.Tensor:
        """All labels, int64 [N]."""
        return torch.cat([shard["labels"][:] for shard in self.shards]).long()


def open_set(
    path: str | Path, shape: tuple[int, int, int], *, memory: bool = False, progress: bool = True
) -> ClassData:
    """The set at `path`, a cache, a folder of images or MNIST's files, for a model of inputs of `shape` (C, H, W).

    memory: of a cache, to read all of it now. Raises FileNotFoundError where there is none, and ValueError, in one
    line, where it is of another shape or cannot be used.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder at {str(path)!r} (data.path)")
    if (path / "data.json").exists():
        data = open_cache(path, memory=memory)
    elif any(path.glob(f"{IDX_IMAGES}*")):
        data = read_idx(path)
    else:
        data = read_folder(path, shape, progress=progress)
    if data.info.shape != tuple(shape):
        what = "latents" if data.info.vae else "images"
        raise ValueError(
            f"{path} holds {what} of {_sides(data.info.shape)}, and the model takes {_sides(shape)}: set "
            "model.in_channels and model.sample_size, or use another data.path"
        )
    return data


def _sides(shape) -> str:
    return " x ".join(map(str, shape))


def class_images(folder: str | Path) -> tuple[list[Path], list[int], list[str]]:
    """Every image file under `folder` in the order of their names, their labels, and the classes' names.

    The classes are the subfolders, or links to folders, in the order of their names; images of a folder without
    subfolders are one class. What is hidden (.name) is not looked at. Raises FileNotFoundError for a folder that is not
    there and ValueError where it or one of its classes has no images, or where some are beside its subfolders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at {str(folder)!r}")
    seen = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = {path.name: _images_under(path) for path in seen if path.is_dir()}
    loose = [path for path in seen if path.suffix.lower() in IMAGE_ENDINGS and path.name not in found]
    if not any(found.values()):
        if not loose:
            raise ValueError(f"no images in {folder}: {', '.join(IMAGE_ENDINGS)} are read")
        return loose, [0] * len(loose), [""]
    if loose:
        raise ValueError(
            f"{loose[0]} belongs to no class: the subfolders of {folder} are the classes, move it into one"
        )
    empty = [name for name, paths in found.items() if not paths]
    if empty:  # to leave it out would move the labels of all classes after it
        raise ValueError(
            f"{folder / empty[0]} has no images, and every subfolder is a class ({len(empty)} of {len(found)} are "
            "empty): fill or remove it"
        )
    labels = [label for label, paths in enumerate(found.values()) for _ in paths]
    return [path for paths in found.values() for path in paths], labels, list(found)


def _images_under(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_ENDINGS
        ]
    return sorted(found)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image at size x size pixels, as ADM scales: halved by boxes while that leaves enough.

    ValueError for an image more than 100 times as long as wide: scaled before it is cut, it would take gigabytes.
    """
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"it is {image.width} x {image.height} pixels: too long to scale before it is cut")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in sides)
    return image.crop((left, top, left + size, top + size))


def read_pixels(path: Path, size: int, channels: int) -> torch.Tensor:
    """uint8 [C, size, size]. ValueError, in one line, where the file is no image."""
    pixels = np.array(adm_crop(open_image(path, MODES[channels]), size))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1).contiguous()


def read_folder(folder: str | Path, shape: tuple[int, int, int], *, progress: bool = True) -> ClassData:
    """A folder of images in memory; those that cannot be read are left out, and how many is printed."""
    paths, labels, classes = class_images(folder)
    channels, size = _pixel_shape(shape)
    images, kept, skipped = _read(paths, labels, size, channels, progress)
    if skipped and progress:
        print(f"{len(skipped)} of {len(paths)} images are left out: {'; '.join(list(skipped.items())[0])}")
    if not kept:
        raise ValueError(f"none of the {len(paths)} images in {folder} can be read: {next(iter(skipped.values()))}")
    tables = {"images": torch.stack(images), "labels": torch.tensor(kept)}
    return ClassData([tables], ClassInfo((channels, size, size), classes))


def _pixel_shape(shape: tuple[int, int, int]) -> tuple[int, int]:
    channels, size = shape[0], shape[1]
    if channels not in MODES:
        raise ValueError(
            f"images have 1 or 3 channels, and the model takes {channels}: set model.in_channels, or make a cache of "
            "latents with scripts/cache_latents.py and give that as data.path"
        )
    return channels, size


def _read(paths, labels, size, channels, progress=False):
    images, kept, skipped = [], [], {}
    for path, label in zip(tqdm(paths, desc="reading images", unit="image", disable=not progress), labels, strict=True):
        try:
            images.append(read_pixels(path, size, channels))
            kept.append(label)
        except (ValueError, OSError, NotImplementedError) as error:  # the last of formats that PIL reads in part
            skipped[str(path)] = " ".join(str(error).split())
    return images, kept, skipped


def read_idx(folder: str | Path) -> ClassData:
    """MNIST's or Fashion-MNIST's training images, from files as torchvision and Debian have them, gzipped or not."""
    arrays = []
    for name, dims in ((IDX_IMAGES, 3), (IDX_LABELS, 1)):
        path = next((p for p in (Path(folder) / name, Path(folder) / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no {name} or {name}.gz in {folder}")
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            sides = np.frombuffer(data, ">i4", dims, 4)
            if data[:4] != bytes([0, 0, 8, dims]):
                raise ValueError("another file format")
            arrays.append(torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(sides).copy()))
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is damaged or none of MNIST's files: {error}") from None
    images, labels = arrays
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} images and {len(labels)} labels: its files are of different sets")
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    return ClassData(
        [{"images": images.unsqueeze(1), "labels": labels.long()}], ClassInfo((1, *images.shape[1:]), classes)
    )


def load_vae(path: str) -> AutoencoderKL:
    """An AutoencoderKL from a folder or a repository, safetensors only. ValueError, in one line, where there is none."""
    try:
        return AutoencoderKL.from_pretrained(path, use_safetensors=True).requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"no AutoencoderKL at {path!r}: {' '.join(str(error).split())}") from error


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
    """Images of `folder`, see `class_images`, in shards on disk: their latents' moments, or without a VAE their pixels.

    Every shard is whole or absent; a run that was stopped goes on where it stopped. Of several processes, each makes
    its own shards, and the last one to be done writes the index: count, classes, checksums, mean and standard deviation
    of each channel as the model would see it, and which images could not be read and are left out.

    size: of the square images, in pixels. vae_name: what to note as the VAE's place.

    Raises ValueError for a cache that was made otherwise, for numbers and a VAE that do not fit, and where no image can
    be read.
    """
    folder, cache = Path(folder), Path(cache)
    for name, number in (("size", size), ("batch size", batch_size), ("shard size", shard_size)):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, not {number}")
    if vae is not None:
        unit = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels of a latent
        if channels != vae.config.in_channels or size % unit:
            raise ValueError(
                f"this VAE takes images of {vae.config.in_channels} channels and a multiple of {unit} pixels, "
                f"not of {channels} and {size}"
            )
    paths, labels, classes = class_images(folder)
    shape = (channels, size, size)
    info = ClassInfo(shape, classes)
    if vae is not None:
        with torch.no_grad():
            moments = _moments(vae, torch.zeros(1, *shape, dtype=torch.uint8))
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        digest = checksum({name: value.float().cpu() for name, value in vae.state_dict().items()})
        info = ClassInfo(shape, classes, vae_name, digest, scaling, shift)
    # of a link to nothing there is no size: it is left out as one that cannot be read
    files = [(str(path.relative_to(folder)), path.stat().st_size if path.exists() else None) for path in paths]
    making = {**asdict(info), "size": size, "images": len(paths), "shard_size": shard_size}
    making["files"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    claim_folder(cache, making, "--out")

    starts = range(0, len(paths), shard_size)
    own = range(rank, len(starts), processes)
    for number in tqdm(own, desc="caching", unit="shard", disable=not progress):
        record, shard = (cache / f"shard-{number:05d}.{ending}" for ending in ("json", "safetensors"))
        if record.exists() and (shard.exists() or not json.loads(record.read_text())["images"]):
            continue
        part = slice(starts[number], starts[number] + shard_size)
        images, kept, skipped = _read(paths[part], labels[part], size, channels)
        line = {"images": len(kept), "skipped": {str(Path(p).relative_to(folder)): why for p, why in skipped.items()}}
        if kept:
            table = {"images": torch.stack(images), "labels": torch.tensor(kept)}
            if vae is not None:
                table = {**_encode(vae, table["images"], batch_size), "labels": table["labels"]}
            save_table(shard, table)
            line |= {"checksum": checksum(table), **_sums(table, info)}
        write_json(record, line)
    if all((cache / f"shard-{number:05d}.json").exists() for number in range(len(starts))):
        _write_index(cache, len(starts))


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
    batches = images.split(batch_size)
    return {
        name: torch.cat([_moments(vae, batch.flip(-1) if name == "flipped" else batch) for batch in batches]).half()
        for name in ("moments", "flipped")
    }


def _moments(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    pixels = (images.float() / 127.5 - 1).to(vae.device, vae.dtype)
    return vae.encode(pixels).latent_dist.parameters.float().cpu()


def _sums(table: Mapping[str, torch.Tensor], info: ClassInfo) -> dict[str, list[float]]:
    """Sums over all places, for mean and variance of each channel."""
    if "images" in table:
        x = table["images"].double() / 127.5 - 1
        variance = torch.zeros_like(x)
    else:
        mean, logvar = table["moments"].double().chunk(2, dim=1)
        x = (mean - info.shift_factor) * info.scaling_factor
        variance = logvar.clamp(-30, 20).exp() * info.scaling_factor**2
    return {"sum": x.sum((0, 2, 3)).tolist(), "square": (x**2 + variance).sum((0, 2, 3)).tolist()}


def _write_index(cache: Path, shards: int) -> None:
    lines = [json.loads((cache / f"shard-{number:05d}.json").read_text()) for number in range(shards)]
    count = sum(line["images"] for line in lines)
    skipped = {path: why for line in lines for path, why in line["skipped"].items()}
    if not count:
        raise ValueError(f"none of the {len(skipped)} images can be read: {next(iter(skipped.values()))}")
    shape = json.loads((cache / "data.json").read_text())["shape"]
    places = count * shape[1] * shape[2]
    full = [line for line in lines if line["images"]]
    mean = [sum(values) / places for values in zip(*(line["sum"] for line in full), strict=True)]
    square = [sum(values) / places for values in zip(*(line["square"] for line in full), strict=True)]
    index = {
        "images": count,
        "mean": mean,
        "std": [max(0.0, s - m * m) ** 0.5 for m, s in zip(mean, square, strict=True)],
        "shards": {
            f"shard-{number:05d}.safetensors": line["checksum"] for number, line in enumerate(lines) if line["images"]
        },
        "skipped": skipped,
    }
    write_json(cache / INDEX, index)
    for left in cache.glob(".shard-*.tmp"):  # of processes that were killed; every shard is there, none is being made
        left.unlink(missing_ok=True)


def read_index(cache: str | Path) -> dict:
    """What the index of a finished cache says. ValueError where it has none, or a damaged one."""
    path = Path(cache) / INDEX
    if not path.exists():
        raise ValueError(
            f"the cache {cache} is not finished: run scripts/cache_latents.py again, it goes on from there"
        )
    try:
        index = json.loads(path.read_text())
        return {name: index[name] for name in ("images", "mean", "std", "shards", "skipped")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete it and run scripts/cache_latents.py again"
        ) from None


def open_cache(cache: str | Path, *, memory: bool = False) -> ClassData:
    """A finished cache; its shards are held against their checksums when they are read for the first time."""
    cache = Path(cache)
    try:
        making = json.loads((cache / "data.json").read_text())
        names = ("classes", "vae", "vae_sha256", "scaling_factor", "shift_factor")
        info = ClassInfo(tuple(making["shape"]), **{name: making[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{cache / 'data.json'} is damaged, or not of a cache by scripts/cache_latents.py "
            f"({type(error).__name__}: {error}): use another folder, or make the cache anew"
        ) from None
    index = read_index(cache)
    missing = [name for name in index["shards"] if not (cache / name).exists()]
    if missing:
        raise ValueError(f"{cache} lacks {missing[0]}: run scripts/cache_latents.py again, it makes what is not there")
    shards = list(_tables(cache, index["shards"], memory))
    if memory:
        shards = [{key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}]
    return ClassData(shards, info)


def _tables(cache: Path, shards: Mapping[str, str], memory: bool) -> Iterator[Mapping]:
    for name, expected in shards.items():
        table = TableFile(cache / name)
        if table.checksum != expected:
            raise ValueError(
                f"{cache / name} is not the one of {INDEX}: delete it and run scripts/cache_latents.py again"
            )
        yield read_tensors(cache / name) if memory else table
