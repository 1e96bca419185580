"""The run of W&B or TensorBoard that a training run's settings, metrics and sample grids go to."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from .run_log import flat


def tracked_run(config, starts: list[dict[str, Any]]) -> dict[str, str]:
    """Which run the tracker is to write, for run.json: its tracker's name and what that needs to find it again.

    starts: the entries of a resumed run in run.json, whose run goes on; none for a new run. For W&B the config's names
    go before the environment's (WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY, WANDB_RUN_ID), and those before the run's own
    from an earlier start.
    """
    output = config.output
    if output.tracker == "tensorboard":
        return {
            "tracker": "tensorboard",
            "project": "/".join(filter(None, ("tensorboard", output.project, output.run_name))),
        }
    earlier = [start["tracker"] for start in starts if start.get("tracker", {}).get("tracker") == "wandb"]
    before = earlier[-1] if earlier else {}

    def found(key: str, variable: str, chosen: str | None = None) -> str | None:
        return chosen or os.environ.get(variable) or before.get(key)

    run = {
        "tracker": "wandb",
        "project": found("project", "WANDB_PROJECT", output.project) or "hybriddit",
        "name": found("name", "WANDB_NAME", output.run_name) or Path(output.folder).resolve().name,
        "entity": found("entity", "WANDB_ENTITY"),
        "id": found("id", "WANDB_RUN_ID") or secrets.token_hex(4),
    }
    return {key: value for key, value in run.items() if value is not None}


def start_tracker(accelerator: Accelerator, run: dict[str, str], settings: dict[str, Any], first: int) -> None:
    """Start the tracker of `run` (see `tracked_run`), or let it go on after step `first`, and give it the settings.

    Raises ValueError, in one line, if W&B refuses, for instance where nobody has logged in.
    """
    names = {key: value for key, value in run.items() if key not in ("tracker", "project")}
    if run["tracker"] == "wandb":
        for key, value in (("resume", "allow"), ("dir", str(accelerator.project_dir))):
            if not os.environ.get(f"WANDB_{key.upper()}"):
                names[key] = value
    elif first:
        names["purge_step"] = first + 1  # steps after the last checkpoint are run again
        settings = None  # TensorBoard would show them as one more run
    else:
        plain = (bool, int, float, str)
        settings = {name: v if isinstance(v, plain) else json.dumps(v) for name, v in flat(settings).items()}
    try:
        accelerator.init_trackers(run["project"], config=settings, init_kwargs={run["tracker"]: names})
    except Exception as error:  # W&B's errors cannot be named where it is not installed
        if not type(error).__module__.startswith("wandb"):
            raise
        raise ValueError(f"output.tracker: wandb did not start the run: {error}") from error


def track_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Give the tracker an RGB image of this step."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)
