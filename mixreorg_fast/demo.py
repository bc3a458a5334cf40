"""A web page on this machine: drop a photo, type class names, see where they are."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from .config import ScenesConfig, find_config, load_config
from .devices import choose
from .errors import UserError, extra
from .files import json_or_empty
from .images import load_image
from .inference.options import WEIGHTS_HELP, add_options, load_on_device
from .inference.overlay import segments_picture
from .inference.windows import segment_of_pixels
from .models.weights import find_weights
from .names import MASK_CLASSES, parse_classes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import gradio
    from starlette.requests import Request
    from starlette.responses import Response

    from .inference.model import Model

MAX_UPLOAD = 20 << 20  # bytes
MAX_PIXELS = 50_000_000  # 150 MB as RGB
SHOWN_SIDE = 1280  # pixels: larger photos are shown, and segmented, at this size
SAMPLES, SAMPLE_SIDE = 6, 192
EMBEDDED = "zero2"  # the configuration of `make train`

# The page loads nothing from other sites and sends nothing to them.
CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; form-action 'self'; frame-ancestors 'self'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="DIR", help=f"{WEIGHTS_HELP} (default: what `make train` leaves here)")
    parser.add_argument("--train", action="store_true", help="train on embedded scenes where there are no weights")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    add_options(parser, "short_side")


def main(args: argparse.Namespace) -> int:
    if args.short_side is not None and args.short_side < 1:
        raise UserError(f"--short-side must be at least 1, got {args.short_side}")
    if args.port is not None and not 0 < args.port < 65536:
        raise UserError(f"--port must lie in 1..65535, got {args.port}")
    # Checked now, not after minutes of training.
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port or 0), family=family).close()
    except (OSError, UnicodeError) as error:
        where = f"--host {args.host}" + (f" --port {args.port}" if args.port else "")
        raise UserError(f"{where}: cannot listen there ({error})") from None
    device = choose(args.device).type
    # Gradio reads these when it is imported. The folders are of this process only: Gradio serves every file in them.
    folder = tempfile.TemporaryDirectory(prefix="mixreorg-demo-")
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        HF_HUB_DISABLE_TELEMETRY="1",
        GRADIO_TEMP_DIR=f"{folder.name}/uploads",
        GRADIO_EXAMPLES_CACHE=f"{folder.name}/examples",
    )
    with folder:
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise UserError(f"the page needs Gradio ({error}): {extra('demo')}") from None
        weights = args.weights or embedded_run(args.train, device)
        model = load_on_device(str(weights), args.device)
        scenes, scores = scenes_of(model.source or weights)
        samples = sample_scenes(scenes, scores, Path(folder.name)) if scenes else []
        model.inference = model.inference.with_options(short_side=args.short_side)
        page = build(model, samples)
        url = serve(page, args.host, args.port)
        # SIGTERM too ends the process in order, so that the folder of uploads is removed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)
        print(f"{url} shows {model.source}; Ctrl-C ends it", flush=True)
        page.block_thread()  # until Ctrl-C
    return 0


def _end(number: int, frame: Any) -> None:
    """Ctrl-C and SIGTERM: end in order, without a traceback for each page that is still open."""
    logging.getLogger("uvicorn.error").disabled = True
    signal.default_int_handler(number, frame)


def embedded_run(train: bool = False, device: str = "cpu") -> Path:
    """The folder of the run of ``make train``; with `train`, a missing run is trained on `device` first. Raises a
    UserError if the run is missing or its training failed."""
    config = find_config(EMBEDDED)
    run = load_config(config).run_folder
    try:
        find_weights(run)
    except UserError:
        if not train:
            raise UserError(
                f"no weights in {run}: name some by --weights DIR, or let --train make them there, from embedded "
                "scenes (some minutes on a CPU)"
            ) from None
        command = [sys.executable, "-m", "mixreorg_fast.cli", "train", str(config), "--device", device]
        if subprocess.run(command).returncode:
            raise UserError("the training failed (see above); name weights by --weights DIR") from None
    return run


def scenes_of(weights: str | Path) -> tuple[ScenesConfig | None, Mapping[str, float | None]]:
    """The embedded scenes that the weights were trained on (None: other data), and the IoU that their run scored for
    each kind (empty: not known)."""
    folder = Path(weights).resolve()
    for place in (folder, folder.parent, folder.parent.parent):  # beside them, or of a run: RUN/checkpoints/step_*
        try:
            data = load_config(place / "config.json").data
        except UserError:
            continue
        scored = json_or_empty(place / "eval.json").get("scenes", {})
        return data.scenes if data.is_scenes else None, scored.get("per_class", {})
    return None, {}


class View(NamedTuple):
    """What the page shows of a photo."""

    overlay: Image.Image
    stages: list[Image.Image]  # the segments of each grouping stage, finest first
    areas: dict[str, float]  # share of each class


def view(model: Model, path: str, names: str, threshold: float) -> View:
    """Segment the photo at `path` by the class `names`; a `threshold` above 0 allows for background.

    A file that is not an image or is too large, and `names` that are not a list of names, raise a UserError.
    """
    classes = parse_classes(names, "class names", most=MASK_CLASSES)
    photo = load_image(path, max_pixels=MAX_PIXELS)
    photo.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    found = model.segment(photo, classes, background_threshold=threshold)
    stages = [segment_of_pixels(maps[None], (photo.height, photo.width))[0].cpu() for maps in found.stages]
    return View(found.overlay(), [segments_picture(photo, segments) for segments in stages], found.areas)


def sample_scenes(config: ScenesConfig, scores: Mapping[str, float | None], folder: Path) -> list[list[str]]:
    """Scenes of the evaluation set, drawn into `folder`: per scene its path and the names of all kinds.

    The first scene of each kind, the kinds with the best `scores` first. All kinds are named, because scores are a
    softmax over the names: of few names one would pass the background threshold on the ground.
    """
    from .data.scenes.painting import Painter
    from .data.scenes.planning import held_out_combinations, plan_scene
    from .data.scenes.scene import KINDS, Scene

    painter, held_out = Painter(SAMPLE_SIDE, config.seed), held_out_combinations(config.seed)
    scenes = [plan_scene(config, "val", number, held_out) for number in range(config.val)]
    shown: dict[frozenset[str], Scene] = {}  # a scene by its kinds
    for scene in sorted(scenes, key=lambda scene: -min(scores.get(thing.kind) or 0.0 for thing in scene.things)):
        shown.setdefault(frozenset(thing.kind for thing in scene.things), scene)
    samples = []
    for number, scene in enumerate(islice(shown.values(), SAMPLES)):
        path = folder / f"scene{number}.png"
        Image.fromarray(painter.paint(scene)[0]).save(path)
        samples.append([str(path), ", ".join(KINDS)])
    return samples


def build(model: Model, samples: list[list[str]]) -> gradio.Blocks:
    """The page, with `samples` (a picture's path, class names) to click; Gradio's environment has to be set before."""
    import gradio as gr

    nothing = [None] * (2 + len(model.config.groups))

    def show(missing: str, path: str | None, names: str, threshold: float) -> tuple:
        """The outputs; `missing`: the message where there is no photo."""
        if path is None:
            return missing, *nothing
        try:
            seen = view(model, path, names, threshold)
        except UserError as error:
            # Without the place of the upload on this machine.
            message = " ".join(str(error).replace(path, Path(path).name).split())
            return f"**{message}**", *nothing
        return "", seen.overlay, *seen.stages, seen.areas

    # Passes on the uploaded file: load_image reads more formats than Gradio and names the fault of a damaged file.
    # Made by type.__new__, since Gradio's metaclass would write a .pyi beside this file.
    methods = {"preprocess": lambda self, payload: payload and payload.path, "get_block_name": lambda self: "image"}
    Photo = type.__new__(type(gr.Image), "Photo", (gr.Image,), methods)
    picture = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
    with gr.Blocks(title="mixreorg", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# What is where?\nDrop a photo, name what may be in it. No mask was ever shown to the model.")
        with gr.Row():
            with gr.Column():
                photo = Photo(label="Photo", sources=["upload", "clipboard"], elem_id="photo")
                first = samples[0][1] if samples else "cat, dog, sofa"
                names = gr.Textbox(first, label="Class names, separated by commas", max_length=4000, elem_id="names")
                usual = model.inference.background_threshold or 0
                threshold = gr.Slider(
                    0, 1, usual, step=0.01, label="Background threshold (0: none)", elem_id="background"
                )
                button = gr.Button("Segment", variant="primary", elem_id="segment")
            with gr.Column():
                message = gr.Markdown(elem_id="message")
                result = gr.Image(label="Classes", elem_id="overlay", **picture)
                areas = gr.Label(label="Areas", show_heading=False, elem_id="areas")
        with gr.Row():
            stages = [
                gr.Image(label=f"Segments of stage {i}", elem_id=f"stage{i}", **picture)
                for i in range(1, len(model.config.groups) + 1)
            ]
        if samples:
            gr.Examples(samples, [photo, names], label="Scenes", cache_examples=False)
        inputs, outputs = [photo, names, threshold], [message, result, *stages, areas]
        asked = "**Choose a photo first.**"  # a click or Enter needs a photo
        for missing, triggers in (("", [photo.change, threshold.release]), (asked, [names.submit, button.click])):
            show_it = partial(show, missing)
            gr.on(triggers, show_it, inputs, outputs, trigger_mode="always_last", api_visibility="private")
    return page.queue(max_size=20)


def serve(page: gradio.Blocks, host: str, port: int | None) -> str:
    """Serve `page` from a thread; returns its address. Raises a UserError where no port is free."""
    from gradio.themes import Default
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware

    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            max_file_size=MAX_UPLOAD,
            theme=Default(font=("system-ui", "sans-serif"), font_mono=("monospace",)),
            app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=guarded)]},
        )
    except OSError as error:
        raise UserError(f"--host {host}: {error}") from None
    return url


async def guarded(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Bounds requests, refuses Gradio's proxy routes, adds the content policy."""
    from starlette.responses import PlainTextResponse

    # Gradio would fetch other sites' files for whoever asks.
    if "/proxy=" in request.scope["path"] or "/file=http" in request.scope["path"]:
        return PlainTextResponse("not here", 404)
    # Gradio limits each file, not a request, which may hold many files or come in chunks without a length.
    length = request.headers.get("content-length", "")
    if request.method == "POST" and (not length.isdigit() or int(length) > MAX_UPLOAD + (1 << 16)):
        return PlainTextResponse("too large", 413)
    response = await answer(request)
    response.headers["content-security-policy"] = CONTENT_POLICY
    return response
