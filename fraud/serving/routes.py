"""The router: finds the declared route of a path and method. Undeclared paths are closed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from starlette.types import ASGIApp
from starlette.types import Scope as Connection

from fraud.errors import MethodNotAllowed, SettingsError, UnknownPath
from fraud.serving.http import ONE_SHAPE, Answer, Call, ErrorShape, Route
from fraud.serving.scopes import Scope

OTHER = "other"
"""Replaces undeclared paths in metrics, logs and traces: callers could send any number of different ones."""
NO_NAMES: Mapping[str, str] = {}
_NAME = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Mount:
    """A mounted ASGI application, with its own paths, methods, errors and headers, under a prefix.

    Parameters
    ----------
    prefix : str
        Such as ``/ui``: the application answers it and all paths below it, and finds it in its ``root_path``. Its
        lifespan is not run: the part that mounts it starts what it needs. A too large Content-Length is refused before
        it; it reads all other bodies itself.
    scope : Scope or None
        The scope that a key needs, for every path and method.
    errors : ErrorShape
        Encodes the refusals made before the application is called.
    """

    prefix: str
    scope: Scope | None
    app: ASGIApp
    errors: ErrorShape = ONE_SHAPE


@dataclass(frozen=True)
class Closed:
    """A prefix whose undeclared paths are refused in the error shape of one contract."""

    prefix: str
    errors: ErrorShape


class Resource:
    """A declared path: its routes by method, and the answer to every other method."""

    __slots__ = ("methods", "refusal")

    def __init__(self, routes: Iterable[Route]) -> None:
        declared = list(routes)
        self.methods = {route.method: route for route in declared}
        if "GET" in self.methods:
            self.methods.setdefault("HEAD", self.methods["GET"])
        allowed = ", ".join(self.methods)

        async def refuse(call: Call) -> Answer:
            raise MethodNotAllowed(call.scope["method"], allowed)

        self.refusal = replace(declared[0], method="", handler=refuse)


class Router:
    """Finds routes: fixed paths first, by one look-up; then paths with parameters; then mounted applications.

    Parameters
    ----------
    root_path : str
        A prefix under which a proxy offers the service, such as ``/fraud``. A request's path may lack it.

    Raises
    ------
    SettingsError
        Two declarations claim the same method and path, or a path begins with the root path.
    """

    def __init__(
        self,
        routes: Iterable[Route],
        mounts: Iterable[Mount] = (),
        closed: Iterable[Closed] = (),
        root_path: str = "",
    ) -> None:
        self.routes = tuple(routes)
        self._root = root_path
        by_path: dict[str, list[Route]] = {}
        for route in self.routes:
            others = by_path.setdefault(_NAME.sub("{}", route.path), [])
            if any(other.method == route.method for other in others):
                raise SettingsError(f"{route.method} {route.path} is declared twice")
            others.append(route)
        self._whole = {path: Resource(group) for path, group in by_path.items() if "{}" not in path}
        self._patterns: dict[int, list[tuple[re.Pattern[str], Resource]]] = {}
        for path, group in by_path.items():
            if "{}" in path:  # no parameter holds a slash
                named = self._patterns.setdefault(path.count("/"), [])
                named.append((_pattern(group[0].path), Resource(group)))
        mounts = list(mounts)
        for path in (*by_path, *[mount.prefix for mount in mounts]):
            if root_path and _is_under(path, root_path):
                raise SettingsError(f"FRAUD_ROOT_PATH={root_path!r} is the beginning of {path}; give another prefix")
        self._mounted = sorted(
            ((mount.prefix, _entrance(mount)) for mount in mounts), key=lambda mounted: -len(mounted[0])
        )
        self._closed = [(one.prefix, _nowhere(one.errors)) for one in closed]
        self._nowhere = _nowhere(ONE_SHAPE)

    def find(self, scope: Connection) -> tuple[Route, Mapping[str, str]]:
        """Return a request's route and the percent-encoded values of its path parameters.

        An undeclared path or method gets a route that refuses the call.
        """
        if self._root:
            _enter_root(scope, self._root)
            below = slice(len(self._root), None)
            scope = {**scope, "path": scope["path"][below] or "/", "raw_path": scope["raw_path"][below] or b"/"}
        resource = self._whole.get(scope["path"])
        if resource is not None:
            return resource.methods.get(scope["method"], resource.refusal), NO_NAMES
        return self._search(scope)

    def _search(self, scope: Connection) -> tuple[Route, Mapping[str, str]]:
        path = scope["path"]
        raw = (scope.get("raw_path") or path.encode()).decode("latin-1")  # where %2F is no slash
        for pattern, resource in self._patterns.get(raw.count("/"), ()):
            match = pattern.fullmatch(raw)
            if match is not None:
                return resource.methods.get(scope["method"], resource.refusal), match.groupdict()
        for prefix, entrance in self._mounted:
            if _is_under(path, prefix):
                return entrance, NO_NAMES
        for prefix, nowhere in self._closed:
            if _is_under(path, prefix):
                return nowhere, NO_NAMES
        return self._nowhere, NO_NAMES


def _pattern(path: str) -> re.Pattern[str]:
    parts = _NAME.split(path)
    return re.compile("".join(f"(?P<{part}>[^/]*)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _is_under(path: str, prefix: str) -> bool:
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/")


def _enter_root(scope: Connection, root_path: str) -> None:
    """Let a request's path begin with the root path, as ASGI has it, whether its proxy passes it on or strips it."""
    scope["root_path"] = root_path
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    if not _is_under(raw.decode("latin-1"), root_path):
        scope["path"] = root_path + scope["path"]
        raw = root_path.encode() + raw
    scope["raw_path"] = raw


def _entrance(mount: Mount) -> Route:
    async def enter(call: Call) -> ASGIApp:
        call.expect_length()
        call.scope["root_path"] = call.scope.get("root_path", "") + mount.prefix
        return mount.app

    return Route("", mount.prefix, mount.scope, enter, "", errors=mount.errors)


def _nowhere(errors: ErrorShape) -> Route:
    async def refuse(call: Call) -> Answer:
        raise UnknownPath(call.scope["path"])

    return Route("", OTHER, None, refuse, "", errors=errors)
