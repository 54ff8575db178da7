"""Web: the page at /. Choose a layer, upload a photograph, see its maps and the bill. No script, no other host.

In: GET, or the page's own form.  Out: HTML, with the picture of the maps inside it.
"""

import base64
from math import ceil, sqrt

from flask import Blueprint, Response, make_response, render_template

from ..errors import InvalidRequest, ServiceError
from ..pipeline import Outcome, Pipeline, bill
from ..wire import WireError
from .exchange import PNG, enter, files, of_model, option

#: Pixels of the picture on the page; a larger one is thinned out.
PICTURE_PIXELS = 6_000_000
POLICY = (
    "default-src 'none'; img-src data:; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
#: What the page offers first.
DEFAULT = "texture"


class Web:
    """One form, one answer."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline

    def page(self) -> Response:
        return self._render()

    def submit(self) -> Response:
        """As /v1/features, but errors too are shown on the page."""
        permit = None
        try:
            permit = enter(self._pipeline)
            return self._render(chosen=option("choice") or "", result=self._compute(permit))
        except (ServiceError, WireError) as error:
            self._pipeline.metrics.rejected.labels(getattr(error, "reason", "invalid")).inc()
            response = self._render(error=str(error), status=getattr(error, "status", 400))
            if (again := getattr(error, "retry_after_s", None)) is not None:
                response.headers["Retry-After"] = str(again)
            return response
        finally:
            if permit:
                permit.release()

    def _compute(self, permit) -> dict:
        name, _, layer = (option("choice") or "").partition(":")
        photographs = files(self._pipeline)
        if len(photographs) != 1:
            raise InvalidRequest(f"photograph: expected one image, got {len(photographs)}")
        served = self._pipeline.engine.image_model(name)
        of_model(served)
        image = self._pipeline.images(permit, photographs, served)[0]
        if len(image) != 1:
            raise InvalidRequest(f"{photographs[0][0]}: expected one image, got {len(image)}")
        (task,) = self._pipeline.image_tasks(served, [image], (layer,))
        outcome, picture = self._pipeline.run(permit, [task], self._picture)
        return {
            "title": f"{name}, {layer}",
            "photograph": photographs[0][0],
            "shape": image.shape[1:],
            "maps": len(outcome.maps[0][layer][0]),
            "picture": picture,
            "steps": task.quote.steps,
            "bill": bill(outcome.cost),
            "parameters": outcome.parameters(),
        }

    def _picture(self, outcome: Outcome) -> str:
        maps = next(iter(outcome.maps[0].values()))[0]
        grid = self._pipeline.engine.grid(maps if maps.ndim == 3 else maps.reshape(1, 1, -1))
        step = ceil(sqrt(max(1.0, grid.size / PICTURE_PIXELS)))
        png = self._pipeline.engine.png(grid[::step, ::step])
        return f"data:{PNG};base64,{base64.b64encode(png).decode()}"

    def _render(self, *, chosen: str = "", result: dict | None = None, error: str = "", status: int = 200) -> Response:
        models = self._pipeline.engine.image_models()
        if not chosen and models:
            first = next((served for served in models if served.name == DEFAULT), models[0])
            chosen = f"{first.name}:{first.model.outputs[0]}"
        page = render_template("page.html", models=models, chosen=chosen, result=result, error=error)
        response = make_response(page, status)
        response.headers["Content-Security-Policy"] = POLICY
        return response


def blueprint(pipeline: Pipeline) -> Blueprint:
    web = Web(pipeline)
    rules = Blueprint("web", __name__)
    rules.add_url_rule("/", "page", web.page)
    rules.add_url_rule("/", "submit", web.submit, methods=["POST"])
    return rules
