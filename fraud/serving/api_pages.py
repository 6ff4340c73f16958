"""The API's document as pages: Swagger UI at ``/docs``, ReDoc at ``/redoc``, without an outside network.

Their scripts are files of the package fastapi-standalone-docs, which is never imported. The pages name everything by
relative paths, so they work under any prefix of a proxy.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from starlette.responses import FileResponse
from starlette.types import ASGIApp

from fraud.serving.http import Answer, Call, Headers, Route

PACKAGE = "fastapi_standalone_docs"
FILES = {
    "/docs/swagger-ui.css": "swagger/swagger-ui.css",
    "/docs/swagger-ui-bundle.js": "swagger/swagger-ui-bundle.js",
    "/redoc/redoc.standalone.js": "redoc/redoc.standalone.js",
}
"""The files of the package, by the paths under which they are served."""

SWAGGER = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>API</title><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,"><link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="page"></div><script src="docs/swagger-ui-bundle.js"></script><script src="docs/start.js"></script></body>
</html>
"""
SWAGGER_START = 'SwaggerUIBundle({url: "docs.json", dom_id: "#page", deepLinking: true, validatorUrl: null})\n'
MARGIN = "body { margin: 0 }"
SCROLLBARS = "QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc="
"""SHA-256 of the style that ReDoc's script adds for its scroll bars."""
REDOC = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>API</title><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,"><style>{MARGIN}</style></head>
<body><redoc spec-url="docs.json"></redoc><script src="redoc/redoc.standalone.js"></script></body>
</html>
"""


def api_pages() -> list[Route]:
    """Return the routes of both pages and of what they load; like ``/docs.json``, they need the scope `read`."""
    # ReDoc's script also adds empty style elements, which it fills, and searches in a worker that it makes from a blob.
    redoc = f"style-src {_hash_of('')} {_hash_of(MARGIN)} 'sha256-{SCROLLBARS}'; worker-src blob:"
    pages = {
        "/docs": _page(SWAGGER, "style-src 'self'"),
        "/docs/start.js": Answer(SWAGGER_START.encode(), headers=_headers("text/javascript")),
        "/redoc": _page(REDOC, redoc),
    }
    return [
        *[_fixed(path, answer) for path, answer in pages.items()],
        *[_file(path, name) for path, name in FILES.items()],
    ]


def _page(text: str, styles: str) -> Answer:
    policy = (
        f"default-src 'none'; script-src 'self'; {styles}; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return Answer(text.encode(), headers=(*_headers("text/html"), (b"content-security-policy", policy.encode())))


def _headers(media_type: str) -> Headers:
    return (
        (b"content-type", f"{media_type}; charset=utf-8".encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    )


def _hash_of(style: str) -> str:
    """A source of a Content-Security-Policy that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"


def _fixed(path: str, answer: Answer) -> Route:
    async def show(_: Call) -> Answer:
        return answer

    return Route("GET", path, "read", show, "A page of the API's document, or a part of it.")


def _file(path: str, name: str) -> Route:
    async def show(_: Call) -> ASGIApp:
        headers = {"cache-control": "private, max-age=86400", "x-content-type-options": "nosniff"}
        return FileResponse(_folder() / name, headers=headers)

    return Route("GET", path, "read", show, "A part of such a page.")


@cache
def _folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None, f"the package {PACKAGE} is not installed"
    assert found.origin is not None
    return Path(found.origin).parent / "static"
