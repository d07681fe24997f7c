"""The chat page: the files of `web/` as they are, the page's settings as JSON, and the headers that fence it in."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike, stat_result
from pathlib import Path
from typing import Literal

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

WEB = Path(__file__).with_name("web")

LOCAL_DOMAIN_KEY = "localhost-dev"
"""ChatKit's key for development. Any other was given out for a domain: its operator wants OpenAI's panel there."""

PANEL_HOST = "https://cdn.platform.openai.com"
"""Where OpenAI serves its ChatKit panel, a script that opens a frame from the same host."""

FENCE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again each time, answered 304: a new release is seen at once
}


def _policy(**directives: str) -> str:
    return "; ".join(f"{name.replace('_', '-')} {value}".strip() for name, value in directives.items())


_BOUNDS = {
    "default_src": "'none'",
    "connect_src": "'self'",
    "img_src": "'self' data: blob:",  # an image elsewhere could carry away, in its address, what the model has read
    "base_uri": "'none'",
    "form_action": "'none'",
    "frame_ancestors": "'self'",
}
PAGE_POLICY = _policy(
    **_BOUNDS,
    script_src="'self'",
    style_src="'self'",
    require_trusted_types_for="'script'",  # text never becomes markup: no script may even try
    trusted_types="'none'",
)
PANEL_POLICY = _policy(
    **_BOUNDS,
    script_src=f"'self' {PANEL_HOST}",
    frame_src=PANEL_HOST,
    style_src="'self' 'unsafe-inline'",  # the panel styles its element with attributes
)


@dataclass(frozen=True)
class PageSettings:
    """What the page is told. Everybody may read it, before any login."""

    login: str | None = None
    """The claim that names the user in the bearer token that requests need; None where they need none."""
    domain_key: str = LOCAL_DOMAIN_KEY
    models: tuple[str, ...] = ()
    attachments: bool = False
    upload_strategy: Literal["two_phase", "direct"] = "two_phase"
    max_attachment_bytes: int = 0
    attachment_types: tuple[str, ...] = ()
    dictation: bool = False
    greeting: str = "What can I help with?"
    prompts: tuple[str, ...] = ("What can you do?", "Show me a table", "Write a short poem")


def page_routes(settings: PageSettings, folder: Path = WEB) -> Sequence[BaseRoute]:
    """Return the routes of the page. All its links are relative, so that a proxy may put it under any prefix."""

    async def index(request: Request) -> Response:
        if _wants_panel(request, settings):
            return FileResponse(folder / "panel.html", headers={**FENCE, "content-security-policy": PANEL_POLICY})
        return FileResponse(folder / "index.html", headers={**FENCE, "content-security-policy": PAGE_POLICY})

    async def settings_json(request: Request) -> Response:
        return JSONResponse(asdict(settings), headers=FENCE)

    return [
        Route("/", index),
        Route("/settings.json", settings_json),
        Mount("/web", _Files(directory=folder)),
    ]


def _wants_panel(request: Request, settings: PageSettings) -> bool:
    """`?panel=chatkit` asks for OpenAI's panel and `?panel=own` for ours; else the domain key decides."""
    choice = request.query_params.get("panel")
    return choice == "chatkit" or (choice != "own" and settings.domain_key != LOCAL_DOMAIN_KEY)


class _Files(StaticFiles):
    def file_response(
        self, full_path: str | PathLike[str], stat_result: stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update({**FENCE, "content-security-policy": PAGE_POLICY})
        return response
