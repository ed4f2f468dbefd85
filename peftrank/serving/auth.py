"""Who may call: bearer tokens, compared in constant time, never logged and never shown."""

from __future__ import annotations

import hmac

from peftrank.errors import PeftRankError
from peftrank.serving.settings import ServeSettings


class AuthError(PeftRankError):
    """The caller did not say who it is (401), or may not do this (403)."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def check_token(settings: ServeSettings, header: str | None, *, admin: bool = False) -> None:
    """Raises AuthError unless an Authorization header allows a call; `admin`: one that changes.

    The admin token allows everything.
    """
    if admin and settings.admin_token is None:
        raise AuthError(
            403, "this server lets nobody do that; it was started without PEFTRANK_ADMIN_TOKEN"
        )
    if not admin and settings.token is None:
        return
    scheme, _, given = (header or "").partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else ""
    is_admin, is_user = _same(given, settings.admin_token), _same(given, settings.token)
    if is_admin or (is_user and not admin):
        return
    if is_user:
        raise AuthError(403, "this token may not do that; it needs the server's admin token")
    name = "admin token" if admin else "token"
    raise AuthError(401, f"this needs the server's {name}: Authorization: Bearer TOKEN")


def _same(given: str, kept: str | None) -> bool:
    return kept is not None and hmac.compare_digest(given.encode("utf-8", "replace"), kept.encode())
