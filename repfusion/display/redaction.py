"""What may be shown or written -> the same without its secrets: by the key a value stands under, and by the
parts of addresses, connection strings and headers in texts.
"""

import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any, TypeVar

HIDDEN = "***"
REFERENCE = re.compile(r"(?i)(?:(?:bearer|basic|token) +)?(?:\$\{[\w.:]+(?:, *(?:null|none))?\})+")
"""Where a configuration takes a value from: `${oc.env:NAME}` names a secret and is none."""
T = TypeVar("T")

STEMS = (
    *("password", "passwd", "passphrase", "secret", "credential", "authorization", "connectionstring"),
    *("apikey", "accesskey", "accountkey", "privatekey", "sharedkey", "signingkey", "odbcconnect"),
)
"""A name that holds one of these, whatever its case and separators, is that of a secret."""
LAST_WORDS = {"token", "tokens", "pwd", "pw", "pass", "auth", "sig", "signature", "sas", "cookie"}
"""A name whose last word is one of these is that of a secret."""
TEXT_WORDS = {
    *("bos", "eos", "pad", "unk", "mask", "cls", "sep", "image", "special", "num", "max", "min", "text"),
    *("added", "prompt", "vocab"),
}
"""First words of names that speak of a tokenizer's tokens."""


@lru_cache(4096)
def is_secret_name(name: str, is_option: bool = True) -> bool:
    """Whether what stands under a key, or follows it in a query or a connection string, is a secret.

    Args:
        is_option: whether the name is surely an option's, as in a mapping: then `key` alone is one.
    """
    name = name.rpartition(".")[2]
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if not words or words[0] in TEXT_WORDS:
        return False
    joined = "".join(words)
    if any(stem in joined for stem in STEMS) or words[-1] in LAST_WORDS or joined.endswith("token"):
        return True
    return is_option and joined == "key"


def redact(value: T) -> T:
    """The value with HIDDEN in the place of every secret: mappings and lists with all that is in them, texts
    by what they hold; anything else as it is. What was redacted stays as it is.
    """
    found: Any = redact_text(value) if isinstance(value, str) else _redact_within(value)
    return found


def _redact_within(value: Any) -> Any:
    match value:
        case str():
            return redact_text(_whole_address(value))
        case Mapping():
            return {
                name: HIDDEN if is_secret_name(str(name)) and _can_be_secret(part) else _redact_within(part)
                for name, part in value.items()
            }
        case list() | tuple():
            return type(value)(map(_redact_within, value))
        case _:
            return value


def _can_be_secret(value: Any) -> bool:
    if isinstance(value, str):
        return value != "" and not REFERENCE.fullmatch(value)
    return not (value is None or isinstance(value, bool) or value in ([], {}, ()))


SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,40}"
NAME = r"(?P<name>[A-Za-z_][\w.-]{0,200})"
"""A key. Its length is bounded, so that a megabyte without spaces is read in a moment."""
ADDRESS = re.compile(rf"({SCHEME})://((?:[^\s/?#:@]*:\S*@)?[^\s'\"<>`]*)")
"""An address within a text; its password may hold all but spaces."""
NAMED = re.compile(
    rf"(?<![\w.]){NAME}(?P<sign>\s*=\s*)"
    r"(?P<value>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\{[^{}]*\}|\$\{[\w.:]+\}|[^\s,;&'\")\]}]+)"
)
"""password=x, AWS_SECRET_ACCESS_KEY=x, PWD={x y}"""
QUOTED = re.compile(
    rf"(?P<head>(?P<quote>[\"']){NAME}(?P=quote)\s*:\s*)"
    r"(?P<value>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\s,}\]]+)"
)
"""'password': 'x', as Python and JSON write a mapping."""
LINE = re.compile(
    rf"(?P<head>(?:^|[{{,])[ \t]*(?:- +)?{NAME}:[ \t]+)"
    r"(?P<value>[^\s,{}]+)(?=[ \t]*(?:$|[,}]))",
    re.MULTILINE,
)
"""password: x, as YAML does."""
HEADER = re.compile(
    r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?)(?!\*\*\*)[^\s\"',;}]+(?:[ \t]+[^\s\"',;}]+)?"
)
BEARER = re.compile(r"(?i)\b(bearer)\s+[A-Za-z0-9._~+/=-]{4,}")


def redact_text(text: str) -> str:
    """A text without passwords of addresses, secret parameters of queries and connection strings, headers
    that let somebody in, and what stands under a secret name in a mapping that was printed.
    """
    if _whole_address(text) != text and not re.search(r":\s|\n", text.partition("://")[2]):
        text = _whole_address(text)
    text = HEADER.sub(rf"\1{HIDDEN}", text)
    text = BEARER.sub(rf"\1 {HIDDEN}", text)
    text = ADDRESS.sub(lambda found: _redact_address(found[1], found[2]), text)
    text = NAMED.sub(_redact_named, text)
    text = QUOTED.sub(_redact_line, text)
    return LINE.sub(_redact_line, text)


def _whole_address(text: str) -> str:
    """A text that is one address, whose password may hold spaces and quotes, without it."""
    found = re.match(rf"({SCHEME})://(.*)", text, re.DOTALL)
    return text if found is None else _redact_address(found[1], found[2])


def _redact_address(scheme: str, rest: str) -> str:
    userinfo, at, place = _split_userinfo(scheme, rest)
    user, colon, password = userinfo.partition(":")
    if colon and _can_be_secret(password):
        userinfo = f"{user}:{HIDDEN}"
    elif at and not colon and scheme.lower() in ("http", "https"):
        userinfo = HIDDEN  # a name alone is a token there
    place, question, query = place.partition("?")
    if not question:
        place, question, query = place.partition("#")
    return f"{scheme}://{userinfo}{at}{place}{question}{_redact_query(query)}"


def _split_userinfo(scheme: str, rest: str) -> tuple[str, str, str]:
    """User and password, `@` where there are any, and the rest. A password that nobody encoded may hold `@`,
    `/` and `?`: the last `@` ends it, and too much is hidden rather than too little.
    """
    userinfo, at, place = rest.rpartition("@")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if not at or "@" in authority:
        return userinfo, at, place
    host, colon, port = authority.rpartition(":")
    is_port = port.isdecimal() and (scheme.lower() in ("http", "https") or host.endswith("]"))
    return (userinfo, at, place) if colon and not is_port else ("", "", rest)


def has_raw_password(address: str) -> bool:
    """Whether the password of an address holds what ends one, and so would be cut there by whoever
    reads it.
    """
    scheme, separator, rest = address.partition("://")
    password = _split_userinfo(scheme, rest)[0].partition(":")[2] if separator else ""
    return re.search(r"[@/?#\s]", password) is not None


def _redact_query(query: str) -> str:
    parts = re.split(r"([&;#])", query)
    return "".join(_redact_parameter(part) for part in parts)


def _redact_parameter(part: str) -> str:
    name, sign, value = part.partition("=")
    return f"{name}={HIDDEN}" if sign and _can_be_secret(value) and is_secret_name(name) else part


def _redact_named(found: re.Match[str]) -> str:
    is_option = "option" in found["name"].lower()
    if not is_secret_name(found["name"], is_option) or REFERENCE.fullmatch(found["value"]):
        return found[0]
    return f"{found['name']}{found['sign']}{HIDDEN}"


def _redact_line(found: re.Match[str]) -> str:
    value = found["value"]
    if value in ("None", "null", "True", "False", "true", "false") or not is_secret_name(found["name"]):
        return found[0]
    quote = value[0] if value[0] in "'\"" and value[-1] == value[0] and len(value) > 1 else ""
    return f"{found['head']}{quote}{HIDDEN}{quote}"


class RedactingFormatter(logging.Formatter):
    """Log lines, their tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


def traceback_lines(error: BaseException) -> Iterator[str]:
    """What Python says of an error and its causes, without secrets."""
    return map(redact_text, traceback.format_exception(error))


def redact_tracebacks() -> None:
    """What ends the process or one of its threads is shown without secrets: errors of drivers of databases
    and stores name addresses.
    """

    def show(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, where)
        else:
            sys.stderr.write("".join(traceback_lines(error)))

    def show_of_thread(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
            sys.stderr.write("".join(traceback_lines(ended.exc_value)))

    sys.excepthook, threading.excepthook = show, show_of_thread
