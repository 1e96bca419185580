"""`hybriddit app`: a page on this machine that makes images by a hybrid and by its teacher, side by side."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('the page needs gradio: pip install "hybriddit[app]"') from error

from .generate.images import check_settings
from .generate.session import Made, Pair, Session, Source, find_source
from .images import save_png
from .machine import MENDABLE, check_offload, device_details, find_device

DENSE = "dense (the teacher)"
MEMORY = {"cuda": "peak memory on the GPU", "cpu": "peak memory of this process"}
QUEUE = {"concurrency_id": "model", "concurrency_limit": 1}  # there is one model: one user at a time
# settings of `generate` that have a field, by the field's label
FIELDS = {
    "negative_prompt": "Negative prompt",
    "width": "Width",
    "height": "Height",
    "steps": "Steps",
    "guidance": "Guidance",
    "true_cfg": "True CFG",
    "max_sequence_length": "Text tokens",
}
HINT = (
    '<div class="figures"><small>Compare makes an image by the dense teacher and by the hybrid, from the same noise, and '
    "measures both. Fields left empty have the grey value.</small></div>"
)
FONTS = ("system-ui", "sans-serif")  # the page fetches nothing, fonts included
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#title { gap: 0; }
#title h1 { font-size: 1.7rem; font-weight: 700; letter-spacing: -.02em; margin: 0; }
#title p { color: var(--body-text-color-subdued); margin: 0; }
#seeds { align-items: end; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.figures { display: grid; gap: .9em; padding: .2em .1em; }
.figures .row { display: grid; grid-template-columns: 5.5em 1fr 7em; gap: .8em; align-items: center; }
.figures .row + .row { margin-top: .35em; }
.figures h4 { margin: 0 0 .4em; font-weight: 600; font-size: .92em; color: var(--body-text-color-subdued); }
.figures .bar { height: .75em; border-radius: .4em; background: var(--border-color-primary); overflow: hidden; }
.figures .bar div { height: 100%; border-radius: .4em; }
.figures .teacher div { background: #94a3b8; } .figures .hybrid div { background: #0d9488; }
.figures .value { text-align: right; font-variant-numeric: tabular-nums; }
.figures .near { display: flex; gap: 2.2em; flex-wrap: wrap; }
.figures .near b { font-size: 1.5em; font-variant-numeric: tabular-nums; margin-right: .3em; }
.figures small { color: var(--body-text-color-subdued); }
"""


class Page:
    """What the page does: it has one session, which all its visitors share.

    settings: what the fields hold at first, by the names of `generate`'s settings. options: those of `find_source` that
    every model is loaded with. folder: where images are kept for the browser.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None, **options: Any):
        self.folder, self.settings, self.options = folder, settings or {}, options
        self.session: Session | None = None
        self.over = threading.Event()  # set at the end: an image that is being made is given up at its next step

    def load(self, model: str, adapters: str = "", any_base: bool = False) -> None:
        """Load a model in place of what is loaded. adapters: folders or repositories, one a line.

        What can be told to be wrong without reading weights leaves the model that is loaded in place.
        """
        if not model.strip():
            raise ValueError("give a model: the folder of a diffusers pipeline, or a repository's name")
        named = [line.strip() for line in adapters.splitlines() if line.strip()]
        self.open(find_source(model.strip(), named, any_base=any_base, **self.options))

    def open(self, source: Source) -> None:
        """Load what was found, in place of what is loaded: there may not be memory for both."""
        import torch

        self.session = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.session = Session(source)

    def loaded(self) -> Session:
        if self.session is None:
            raise ValueError("no model is loaded: load one first")
        return self.session

    def about(self) -> str:
        """One line on what is loaded."""
        if self.session is None:
            return "No model is loaded yet."
        device = device_details(self.session.source.device)["name"]
        what = f"{type(self.session.pipeline).__name__}, {str(self.session.pipeline.dtype).removeprefix('torch.')}"
        return f"{self.session.source.base.path}: {what}, on {device}"

    def choices(self) -> list[str]:
        """What can make images: the dense model, and its hybrids."""
        return [DENSE, *(self.session.hybrids if self.session else ())]

    def generate(
        self,
        choice: str,
        prompt: str,
        seed: float | None,
        tell: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> tuple[str, str, dict[str, Any]]:
        """Make one image. Returns its file, its figures as HTML, and its record. Settings that are None are left out."""
        session = self.loaded()
        named = None if choice == DENSE else choice
        [made], notes = session.make(
            named, prompt, tell=self._until_over(tell), seed=_whole(seed), **_whole_settings(settings)
        )
        kind = session.source.device.type
        return self.keep(made), figures_of(made, kind, [*session.notes, *notes]), made.record

    def compare(
        self,
        choice: str,
        prompt: str,
        seed: float | None,
        tell: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> tuple[str, str, str, dict[str, Any]]:
        """Make one image by the teacher and one by a hybrid. Returns their files, their figures as HTML, and records."""
        session = self.loaded()
        named = None if choice == DENSE else choice
        pair, notes = session.compare(
            named, prompt, tell=self._until_over(tell), seed=_whole(seed), **_whole_settings(settings)
        )
        kind = session.source.device.type
        records = {"teacher": pair.teacher.record, "hybrid": pair.hybrid.record}
        files = self.keep(pair.teacher), self.keep(pair.hybrid)
        return *files, figures_of(pair, kind, [*session.notes, *notes]), records

    def _until_over(self, tell: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        def told(done: int, total: int) -> None:
            if self.over.is_set():
                raise ValueError("the page was ended")
            if tell is not None:
                tell(done, total)

        return told

    def keep(self, made: Made) -> str:
        """Write an image with its record, and return the file."""
        path = self.folder / secrets.token_hex(8) / f"{made.record['seed']}.png"
        save_png(made.image, path, made.record)
        return str(path)


def _whole(number: float | None) -> int:
    """A seed as the browser sends it: a number, or nothing."""
    return 0 if number is None else int(number)


def _whole_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as the browser sends them: empty texts are left out."""
    return {name: value for name, value in settings.items() if value not in (None, "")}


def figures_of(made: Made | Pair, kind: str, notes: list[str]) -> str:
    """Seconds, memory and nearness as HTML. kind: of the device. notes: for the user."""
    each = {"teacher": made.teacher, "hybrid": made.hybrid} if isinstance(made, Pair) else {"image": made}
    parts = []
    if isinstance(made, Pair):
        parts.append(
            f'<div class="near"><div><b>{made.psnr:.2f} dB</b>PSNR</div><div><b>{made.ssim:.3f}</b>SSIM</div>'
            "<small>between the two, from the same noise</small></div>"
        )
    seconds = {name: one.seconds for name, one in each.items()}
    parts.append(_bars("seconds", seconds, "{:.2f} s"))
    memory = {name: one.memory / 2**20 for name, one in each.items() if one.memory is not None}
    if memory:
        parts.append(_bars(MEMORY[kind], memory, "{:,.0f} MiB"))
    said = [escape(note) for note in notes]
    if any(one.first for one in each.values()):
        said.append("The first image of a size takes longer: press again for its usual time.")
    parts += [f"<small>{text}</small>" for text in said]
    return f'<div class="figures">{"".join(parts)}</div>'


def _bars(title: str, values: dict[str, float], form: str) -> str:
    most = max(*values.values(), 1e-9)
    rows = (
        f'<div class="row"><span>{name}</span><div class="bar {"teacher" if name == "teacher" else "hybrid"}">'
        f'<div style="width: {100 * value / most:.1f}%"></div></div><span class="value">{form.format(value)}</span></div>'
        for name, value in values.items()
    )
    return f"<div><h4>{title}</h4>{''.join(rows)}</div>"


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the user can put right is one line in the page; anything else is a bug, whose traceback is in the terminal."""
    try:
        yield
    except MENDABLE as error:
        line = escape(" ".join(str(error).split()))
        raise gr.Error(line, duration=None, print_exception=False) from error


def _progress(progress: gr.Progress, names: tuple[str, ...] = ("",)) -> Callable[[int, int], None]:
    """Tell the page's progress bar of steps. names: of the images that are made, one after the other."""

    def tell(done: int, total: int) -> None:
        each = total // len(names)
        name = names[min(done - 1, total - 1) // each]
        progress(done / total, desc=f"{name} step {(done - 1) % each + 1} of {each}".strip())

    return tell


def build(page: Page) -> gr.Blocks:
    """The page as Gradio's blocks, which serve it."""
    with gr.Blocks(title="hybriddit", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        with gr.Column(elem_id="title", min_width=0):
            gr.HTML("<h1>hybriddit</h1>")
            about = gr.HTML(**_about(page))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=330):
                with gr.Accordion("Model", **_drawer(page)) as drawer:
                    model = gr.Textbox(
                        label="Pipeline", placeholder="folder or repository of a diffusers pipeline", **_model(page)
                    )
                    adapters = gr.Textbox(
                        label="Adapters", lines=2, placeholder="folders or repositories, one a line", **_adapters(page)
                    )
                    any_base = gr.Checkbox(label="also adapters of other weights than these (a finetune)")
                    load = gr.Button("Load", elem_id="load")
                choice = gr.Dropdown(label="Attention", elem_id="attention", interactive=True, **_choice(page))
                prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", placeholder="what the image shows")
                fields = {"negative_prompt": _text(page, "negative_prompt")}
                with gr.Row():
                    fields |= {name: _number(page, name) for name in ("width", "height", "steps")}
                with gr.Row():
                    fields |= {name: _number(page, name) for name in ("guidance", "true_cfg", "max_sequence_length")}
                with gr.Row(elem_id="seeds"):
                    seed = gr.Number(
                        label="Seed", value=0, precision=0, minimum=0, scale=2, min_width=90, elem_id="seed"
                    )
                    dice = gr.Button("Random", scale=1, min_width=90)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=90)
                    both = gr.Button("Compare", elem_id="compare", min_width=90)
            with gr.Column(scale=3, min_width=420):
                with gr.Row():
                    first, second = (
                        gr.Image(
                            label=label,
                            elem_id=name,
                            elem_classes="picture",
                            format="png",
                            type="filepath",
                            interactive=False,
                            height=400,
                            visible=name == "first",
                            buttons=["download", "fullscreen"],
                        )
                        for name, label in (("first", "Image"), ("second", "Hybrid"))
                    )
                figures = gr.HTML(HINT, elem_id="figures")
                with gr.Accordion("How it was made", open=False, visible=False) as drawer_of_record:
                    record = gr.JSON(show_label=False)

        parts = {about: _about, model: _model, adapters: _adapters, choice: _choice, drawer: _drawer}
        parts |= {field: partial(_field, name=name) for name, field in fields.items()}
        given = [choice, prompt, seed, *fields.values()]
        # the model, too: another visitor may have loaded one meanwhile
        made = [first, second, figures, record, drawer_of_record, about]

        def now() -> list[Any]:
            return [gr.update(**state(page)) for state in parts.values()]

        def load_model(model: str, adapters: str, any_base: bool, progress=gr.Progress()) -> list[Any]:  # noqa: B008
            progress(0, desc="loading")
            with _told():
                page.load(model, adapters, any_base)
            return now()

        def generate(choice: str, prompt: str, seed: float, *values: Any, progress=gr.Progress()) -> list[Any]:  # noqa: B008
            with _told():
                settings = dict(zip(fields, values, strict=True))
                image, html, record = page.generate(choice, prompt, seed, _progress(progress), **settings)
            return [
                gr.update(value=image, label=choice),
                gr.update(visible=False),
                html,
                record,
                gr.update(visible=True),
                gr.update(**_about(page)),
            ]

        def compare(choice: str, prompt: str, seed: float, *values: Any, progress=gr.Progress()) -> list[Any]:  # noqa: B008
            with _told():
                settings = dict(zip(fields, values, strict=True))
                tell = _progress(progress, ("teacher,", "hybrid,"))
                teacher, hybrid, html, records = page.compare(choice, prompt, seed, tell, **settings)
            images = gr.update(value=teacher, label=DENSE), gr.update(value=hybrid, label=choice, visible=True)
            return [*images, html, records, gr.update(visible=True), gr.update(**_about(page))]

        # a browser that comes later sees what was loaded meanwhile
        blocks.load(now, outputs=list(parts), queue=False, show_progress="hidden", api_name=False)
        load.click(load_model, [model, adapters, any_base], list(parts), api_name="load", **QUEUE)
        dice.click(lambda: secrets.randbelow(2**31), outputs=seed, queue=False, api_name=False)
        gr.on([go.click, prompt.submit], generate, given, made, show_progress_on=[first], api_name="generate", **QUEUE)
        both.click(compare, given, made, show_progress_on=[first], api_name="compare", **QUEUE)
    return blocks


# What parts of the page show: as arguments of their components


def _about(page: Page) -> dict[str, Any]:
    return {"value": f"<p>{escape(page.about())}</p>"}


def _model(page: Page) -> dict[str, Any]:
    return {"value": page.session.source.base.path} if page.session else {}


def _adapters(page: Page) -> dict[str, Any]:
    return {"value": "\n".join(page.session.source.adapters)} if page.session else {}


def _drawer(page: Page) -> dict[str, Any]:
    return {"open": page.session is None}


def _choice(page: Page) -> dict[str, Any]:
    return {"choices": page.choices(), "value": page.choices()[-1]}


def _field(page: Page, name: str) -> dict[str, Any]:
    """A setting's field: hidden where the pipeline does not take it, with what is taken if it is left empty."""
    session = page.session
    if session is None:
        return {"value": page.settings.get(name)}
    usual = session.usual(name)
    told = {} if usual is None else {"placeholder": f"{usual:g}"}
    return {"value": page.settings.get(name), "visible": name in session.takes, **told}


def _text(page: Page, name: str) -> gr.Textbox:
    return gr.Textbox(label=FIELDS[name], elem_id=name, **_field(page, name))


def _number(page: Page, name: str) -> gr.Number:
    whole = name not in ("guidance", "true_cfg")
    return gr.Number(
        label=FIELDS[name], precision=0 if whole else None, min_width=90, elem_id=name, **_field(page, name)
    )


@contextlib.contextmanager
def serving(
    model: str | None = None,
    adapters: tuple[str, ...] = (),
    *,
    any_base: bool = False,
    settings: dict[str, Any] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    **options: Any,
) -> Iterator[str]:
    """Serve the page within the block, in threads of its own. Yields its address.

    model, adapters, any_base, options: see `find_source`; without a model the page asks for one. settings: what the fields
    hold at first. port: None: the first free one from 7860 on. Raises ValueError or OSError, in one line.
    """
    settings = {name: value for name, value in (settings or {}).items() if value is not None}
    check_settings("", **settings)
    if model is None and (adapters or any_base):
        raise ValueError("an adapter is for a model: give --model too")
    # no page can load a model with others
    check_offload("--offload ", options.get("offload"), find_device(options.get("device")))
    check_address(host, port)
    source = None if model is None else find_source(model, adapters, any_base=any_base, **options)
    with tempfile.TemporaryDirectory(prefix="hybriddit-app-") as folder:
        page = Page(Path(folder), settings, **options)
        if source is not None:
            page.open(source)
        blocks = build(page)
        blocks.queue(default_concurrency_limit=1)
        theme = gr.themes.Soft(
            primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=("ui-monospace", "monospace")
        )
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                theme=theme,
                css=CSS,
                quiet=True,
                share=False,
                inbrowser=False,
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                allowed_paths=[folder],
                prevent_thread_lock=True,
            )
            yield address
        finally:
            page.over.set()  # Python would be aborted within a thread that still makes an image
            blocks.close(verbose=False)


def check_address(host: str, port: int | None) -> None:
    """Raise ValueError where nothing can be served at an address: that is better told before a model is loaded."""
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError) as error:
        where = host if port is None else f"{host}:{port}"
        reason = os.strerror(error.errno) if (getattr(error, "errno", None) or 0) > 0 else error
        raise ValueError(f"nothing can be served at {where} ({reason}): give another --port or --host") from None


def run(model: str | None = None, adapters: tuple[str, ...] = (), **options: Any) -> None:
    """Serve the page until Ctrl-C. The arguments are those of `serving`."""
    with serving(model, adapters, **options) as address:
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        wait()


def wait() -> None:
    """Wait for Ctrl-C."""
    threading.Event().wait()
