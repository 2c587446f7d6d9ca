"""The explorer in the browser: `routeseg app`, or `routeseg.app.launch(model)`. Needs the extra `app` (Gradio).

explorer.py holds images and asks the network; page/ is what the browser runs; guard.py says who may ask; this file
brings them together.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routeseg.app.explorer import MAX_BYTES, Explorer, Survey
from routeseg.app.guard import Guard
from routeseg.errors import require

if TYPE_CHECKING:
    from routeseg.data.pairs import SegmentationData
    from routeseg.model import DynamicRoutingNetwork

__all__ = ["Explorer", "Survey", "build", "launch"]

PAGE = Path(__file__).parent / "page"
BODY_BYTES = 2 * MAX_BYTES  # of a request: a file in base64, its labels, and some words
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Arial", "sans-serif"]  # none that must be fetched


def build(explorer: Explorer) -> Any:
    """The page of an explorer as Gradio's Blocks. Raises ValueError if Gradio is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = require("gradio", "app", "the explorer")
    explorer.examples  # noqa: B018  drawn now, so that the page need not wait

    def about(_: Any = None) -> dict[str, Any]:
        return explorer.about()

    def open(question: Any) -> dict[str, Any]:
        return explorer.open(question)

    def look(question: Any) -> dict[str, Any]:
        return explorer.look(question)

    with gradio.Blocks(title="routeseg", analytics_enabled=False) as page:
        gradio.HTML(
            html_template=(PAGE / "explorer.html").read_text(),
            js_on_load=(PAGE / "explorer.js").read_text(),
            server_functions=[about, open, look],
            apply_default_css=False,
            elem_id="routeseg",
        )
    return page


def launch(
    model: DynamicRoutingNetwork | None = None,
    name: str = "street scenes, trained on CamVid",
    survey: Survey | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    wait: bool = True,
    names: Sequence[str] = (),
    pictures: SegmentationData | None = None,
    **options: Any,
) -> Any:
    """Serves the explorer of a network, by default of the one that is shipped.

    host  the address that it listens on: this machine alone, unless told otherwise ("0.0.0.0": all that reach it)
    port  None: the first free one from 7860 on
    names other names that it is reached under, such as that of a proxy in front of it; all else is refused
    wait  until it is stopped; else it runs beside, and `.close()` of what comes back ends it

    pictures  a data set that the network is for, of which the page shows examples

    `options` go to Gradio's `launch`. Raises ValueError if Gradio is not installed, or the port is taken.
    """
    if model is None:
        from routeseg.model import checkpoints

        model = checkpoints.load()
    page = build(Explorer(model, name, survey, pictures))
    import gradio
    from starlette.middleware import Middleware

    if port is not None and not _is_free(host, port):
        raise ValueError(f"port {port} of {host} is taken: choose another one")
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        theme=gradio.themes.Base(font=FONTS, font_mono=["monospace"]),
        css=(PAGE / "explorer.css").read_text(),
        footer_links=[],
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(Guard, body_bytes=BODY_BYTES, host=host, names=names)]},
        **{"quiet": True, **options},
    )
    return page


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
