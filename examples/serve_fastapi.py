"""A network behind HTTP, on one machine. docs/prediction.md says what the limits mean and what belongs in front of it.

    python examples/serve_fastapi.py runs/my/best
    curl --data-binary @street.jpg "http://127.0.0.1:8000/segment?budget=40%25"

One image runs at a time, on all threads of PyTorch. It needs the extra `routeseg[serve]`.
"""

import argparse
import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

import routeseg
from routeseg.app.guard import stranger
from routeseg.budgets.asked import Asked, check_exits
from routeseg.data.decoding import decode_image
from routeseg.errors import BudgetNotKept
from routeseg.prediction.files import label_png
from routeseg.prediction.image import SegmentedImage

WAITING = 16  # requests that are accepted and not answered yet; one more gets 503
BODY_BYTES, BODY_SECONDS = 20 << 20, 30.0  # of a request; a larger one gets 413, a slower one 408
MAX_PIXELS = 20_000_000  # of an image, about what one pass takes; a larger one is not decoded and gets 400
Answer = Literal["json", "png"]


def service(
    model: routeseg.Segmenter, waiting: int = WAITING, host: str = "127.0.0.1", names: Sequence[str] = ()
) -> FastAPI:
    """POST /segment, with at most `waiting` requests inside, and GET /health; `host`, `names`: see `admit`."""

    async def own(request: Request) -> None:
        await admit(request, host, names)

    app = FastAPI(title="routeseg", dependencies=[Depends(own)])
    places, worker = asyncio.Semaphore(waiting), ThreadPoolExecutor(1)

    def work(body: bytes, budget: str | None, answer: Answer) -> Response:
        image = decode(body)
        try:
            return respond(model.predict(image, budget), answer)
        except BudgetNotKept as error:
            raise HTTPException(400, str(error)) from error

    @app.post("/segment")
    async def segment(request: Request, budget: str | None = None, answer: Answer = "json") -> Response:
        if places.locked():
            await read(request, keep=False)
            raise HTTPException(503, f"{waiting} images are waiting: try again", {"Retry-After": "1"})
        async with places:
            body = await read(request)
            parse(budget, model)
            return await asyncio.get_running_loop().run_in_executor(worker, work, body, budget, answer)

    @app.get("/health")
    async def health() -> dict[str, list[str]]:
        return {"classes": list(model.config.class_names)}

    return app


async def admit(request: Request, host: str, names: Sequence[str] = ()) -> None:
    """Refuses what a page elsewhere in the browser of this machine asks: `host` is the address that the server is bound
    to, `names` are others that it is reached under."""
    if why := stranger(request.headers.raw, host, names):
        await read(request, keep=False)
        raise HTTPException(403, why)


async def read(request: Request, keep: bool = True) -> bytes:
    """The body. What is not kept is read to its end, too: a client that is still sending would not hear the answer."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if keep and size <= BODY_BYTES:
                    body += part
    except (TimeoutError, ClientDisconnect) as error:
        raise HTTPException(408, f"the body did not come within {BODY_SECONDS:g} s") from error
    if keep and size > BODY_BYTES:
        raise HTTPException(413, f"the body has {size} bytes: at most {BODY_BYTES} are taken")
    return bytes(body)


def parse(budget: str | None, model: routeseg.DynamicRoutingNetwork) -> Asked | None:
    """The budget of a request; None: what helps."""
    if budget is None:
        return None
    try:
        check_exits(model)
        asked = Asked.parse(budget)
        if asked.unit == "share":
            asked.look(model, (64, 64))  # whether it can be kept; of MACs the size of the image decides
        return asked
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def decode(body: bytes) -> np.ndarray:
    """The image, uint8 [H,W,3]."""
    try:
        return decode_image(io.BytesIO(body), "the body", MAX_PIXELS)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def respond(result: SegmentedImage, answer: Answer) -> Response:
    """What is in the image and what it cost; or its labels, a PNG whose bytes are the class ids."""
    if answer == "png":
        return Response(label_png(result.labels, result.palette), media_type="image/png")
    return JSONResponse(
        {
            "image_size": result.labels.shape,
            "class_shares": result.shares,
            "cost_gmacs": result.cost_gmacs,
            "full_gmacs": result.full_gmacs,
            "cost_share": result.found.prediction.share,
            "milliseconds": result.milliseconds,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a folder; the bundled network, if there is none")
    parser.add_argument("--host", default="127.0.0.1", help="this machine alone, unless it is another address")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--names", nargs="*", default=[], help="others that it is reached under, as of a proxy")
    parser.add_argument("--waiting", type=int, default=WAITING, help="requests inside at once; one more gets 503")
    args = parser.parse_args()
    app = service(routeseg.load(args.checkpoint), args.waiting, args.host, args.names)
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
