"""Layered settings for frozen dataclasses: check types and ranges, and report all errors at once.

A *root* is a dataclass whose fields are section dataclasses (and perhaps plain top-level keys). A
*layer* maps dotted keys to values, each with the place where the value was given. This module does
not depend on Lazarus' own sections.
"""

from __future__ import annotations

import operator as op
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from lazarus.basics.careful import read_text
from lazarus.config.values import conforms, is_text, literals, normal, toml_value, type_text
from lazarus.errors import ConfigError, Problem

_MOST_BYTES = 16 << 20  # largest configuration file
_DEEPEST = 32
_RANGE = (("ge", ">=", op.ge), ("gt", ">", op.gt), ("le", "<=", op.le), ("lt", "<", op.lt))


@dataclass(frozen=True, slots=True)
class Given:
    """A value and its place, such as "configs/a.toml:14", "--nodes" or "preset tiny"."""

    value: Any
    where: str


Layer = Mapping[str, Given]  # dotted key -> value with its place


def setting(default: Any, doc: str, *, internal: bool = False, **bounds: float) -> Any:
    """Make a dataclass field for a setting.

    Args:
        default: The default value.
        doc: Meaning of the setting, for the reference page.
        internal: True leaves the setting out of the reference page.
        **bounds: Range of a number: ``ge``, ``gt``, ``le``, ``lt``.
    """
    if not bounds.keys() <= {name for name, _, _ in _RANGE}:
        raise TypeError(f"unknown bounds {sorted(bounds)}")
    metadata = {"doc": doc, "internal": internal, "bounds": bounds}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """Resolved annotations of a dataclass's fields."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def sections_of(root: type) -> dict[str, type]:
    """The sections of a root: name -> dataclass."""
    return {n: h for n, h in hints_of(root).items() if isinstance(h, type) and is_dataclass(h)}


def keys_of(root: type) -> dict[str, tuple[Field[Any], Any]]:
    """All keys of a root: dotted key -> field and type. Top-level keys have no dot."""
    found: dict[str, tuple[Field[Any], Any]] = {}
    sections = sections_of(root)
    for top in fields(root):
        if top.name in sections:
            hints = hints_of(sections[top.name])
            for f in fields(sections[top.name]):
                found[f"{top.name}.{f.name}"] = (f, hints[f.name])
        elif "doc" in top.metadata:
            found[top.name] = (top, hints_of(root)[top.name])
    return found


def value_of(root: object, dotted: str) -> Any:
    """The value of a dotted key."""
    section, _, name = dotted.rpartition(".")
    return getattr(getattr(root, section) if section else root, name)


def default_of(spec: Field[Any]) -> Any:
    """A field's default value."""
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return spec.default


def require(section: object, *extra: tuple[bool, str, str]) -> None:
    """Check the values of a section; to be called in its ``__post_init__``.

    Args:
        section: The section. Types and ranges of all fields are checked first.
        *extra: Further checks (holds, key, message), made only if types and ranges are right.

    Raises:
        ConfigError: All problems of the section.
    """
    cls: type = type(section)
    hints = hints_of(cls)
    name = getattr(cls, "SECTION", "")
    problems = []
    for spec in fields(cls):
        dotted = f"{name}.{spec.name}" if name else spec.name
        said = complaint(spec, hints[spec.name], getattr(section, spec.name), dotted)
        if said:
            problems.append(Problem(said, key=dotted))
    if not problems:
        problems = [Problem(text, key=f"{name}.{k}") for holds, k, text in extra if not holds]
    if problems:
        raise ConfigError(problems)


def complaint(spec: Field[Any], hint: Any, value: Any, dotted: str) -> str | None:
    """What is wrong with a value of a key, or None."""
    if not conforms(value, hint):
        expected = type_text(hint)
        close = _nearest(value, [a for a in literals(hint) if isinstance(a, str)])
        return f"{dotted} = {toml_value(value)} must be {expected}{close}"
    if isinstance(value, str) and not is_text(value):
        return f"{dotted} = {value!a} holds a byte that is no text: NUL, or no UTF-8"
    if isinstance(value, int | float) and not isinstance(value, bool):
        for bound, sign, holds in _RANGE:
            limit = spec.metadata.get("bounds", {}).get(bound)
            if limit is not None and not holds(value, limit):
                return f"{dotted} = {value} must be {sign} {limit}"
    return None


def toml_of(text: str) -> dict[str, Any]:
    """Parse a TOML document.

    Raises:
        ValueError: The text is not TOML, has numbers beyond 64 bits, or is nested too deeply.
    """
    try:
        content = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_numbers(content)
    return content


def _check_numbers(value: Any, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} deep")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError(f"a number of {value.bit_length()} bits")
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        _check_numbers(item, depth + 1)


def read_toml(path: str | Path, root: type) -> tuple[dict[str, Given], list[Problem]]:
    """Read a layer from a TOML file, with line numbers, and the problems of the file."""
    place = Path(path)
    try:
        text = read_text(place, most=_MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return {}, [Problem(f"cannot read the configuration: {reason}", where=str(path))]
    try:
        content = toml_of(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        where = f"{path}:{line[1] if line else len(text.splitlines())}"
        return {}, [Problem(f"not valid TOML: {error}", where=where)]
    except ValueError as error:
        return {}, [Problem(f"not valid TOML: {error}", where=str(path))]
    lines = _line_numbers(text)
    return flatten(content, root, lambda dotted: f"{path}:{lines.get(dotted, 1)}")


def flatten(
    content: Mapping[str, Any], root: type, where: Callable[[str], str]
) -> tuple[dict[str, Given], list[Problem]]:
    """Convert nested mappings to a layer of dotted keys, and a list of problems.

    Args:
        content: The nested mappings.
        root: The root dataclass.
        where: Returns the place of a dotted key.
    """
    layer: dict[str, Given] = {}
    problems = []
    sections = sections_of(root)
    for name, value in content.items():
        if name in sections and not isinstance(value, Mapping):
            text = f"[{name}] is a section; {name} = {toml_value(value)} makes no sense"
            problems.append(Problem(text, where=where(name)))
        elif isinstance(value, Mapping) and (name in sections or name not in keys_of(root)):
            if name not in sections:
                close = _nearest(name, list(sections), show="[{}]")
                problems.append(Problem(f"unknown section [{name}]{close}", where=where(name)))
                continue
            for inner, inner_value in value.items():
                dotted = f"{name}.{inner}"
                layer[dotted] = Given(inner_value, where(dotted))
        else:
            layer[name] = Given(value, where(name))
    return layer, problems


def read_override(text: str, origin: str) -> tuple[dict[str, Given], list[Problem]]:
    """Parse ``a.b=VALUE`` to a layer of one key, and problems.

    VALUE is read as TOML; text that is not TOML is taken as a string.
    """
    dotted, equals, raw = (part.strip() for part in text.partition("="))
    where = f"{origin} {text}".strip()
    if not equals or not dotted or not raw:
        message = 'must be section.key=value; section.key="none" clears an optional key'
        return {}, [Problem(message, where=where)]
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    return {dotted: Given(value, where)}, []


def assemble(
    root: type, layers: Sequence[Layer]
) -> tuple[dict[str, Any] | None, dict[str, str], list[Problem]]:
    """Merge layers over the defaults; later layers override earlier ones.

    Returns:
        Keyword arguments for the root (None if a value is invalid), the place of every key that
        was given, and all problems. Unknown keys are problems, but do not make the arguments None.
    """
    known = keys_of(root)
    problems: list[Problem] = []
    chosen: dict[str, Given] = {}
    for layer in layers:
        for dotted, given in layer.items():
            if dotted in known:
                chosen[dotted] = replace(given, value=normal(given.value, known[dotted][1]))
            else:
                problems.append(Problem(_unknown(dotted, root), where=given.where))
    bad = [
        Problem(said, where=given.where, key=dotted)
        for dotted, given in chosen.items()
        if (said := complaint(*known[dotted], given.value, dotted))
    ]
    origins = {dotted: given.where for dotted, given in chosen.items()}
    spoiled = {p.key.split(".")[0] for p in bad}
    sound = {k: given for k, given in chosen.items() if k.split(".")[0] not in spoiled}
    arguments, unusable = _sections(root, sound, origins)
    usable = not bad and not unusable
    return (arguments if usable else None), origins, problems + bad + unusable


def _sections(
    root: type, chosen: Mapping[str, Given], origins: Mapping[str, str]
) -> tuple[dict[str, Any], list[Problem]]:
    arguments: dict[str, Any] = {k: g.value for k, g in chosen.items() if "." not in k}
    problems: list[Problem] = []
    for name, cls in sections_of(root).items():
        given = {k.split(".")[1]: g.value for k, g in chosen.items() if k.startswith(f"{name}.")}
        try:
            arguments[name] = cls(**given)
        except ConfigError as error:
            problems += located(error.problems, origins)
    return arguments, problems


def located(problems: Iterable[Problem], origins: Mapping[str, str]) -> list[Problem]:
    """Add the place where the key was given to problems that have a key but no place."""
    return [p if p.where else replace(p, where=origins.get(p.key, "")) for p in problems]


def _unknown(dotted: str, root: type) -> str:
    known = [k for k, (spec, _) in keys_of(root).items() if not spec.metadata.get("internal")]
    section = dotted.split(".")[0]
    if "." in dotted and section not in sections_of(root):
        close = _nearest(section, list(sections_of(root)), show="[{}]")
        return f"unknown section [{section}] in {dotted}{close}"
    siblings = [k for k in known if "." in k and k.split(".")[0] == section]
    name = dotted.split(".")[-1]
    # First look among the keys of the same section, then among those of other sections.
    close = _nearest(name, [k.split(".")[-1] for k in siblings], full=siblings)
    close = close or _nearest(name, [k.split(".")[-1] for k in known], full=known)
    return f"unknown key {dotted}{close}"


def _nearest(
    word: Any, known: Sequence[str], *, show: str = "{}", full: Sequence[str] | None = None
) -> str:
    close = get_close_matches(str(word), known, n=1, cutoff=0.6)
    if not close:
        return ""
    answer = close[0] if full is None else full[list(known).index(close[0])]
    return f"; did you mean {show.format(answer)}?"


_HEADER = re.compile(r"\s*\[+\s*([^\]]+?)\s*\]+")
_ASSIGN = re.compile(r"""\s*([A-Za-z0-9_."' -]+?)\s*=""")


def _line_numbers(text: str) -> dict[str, int]:
    """Line numbers, from 1, of dotted keys and sections. Lines in multi-line values are skipped."""
    found: dict[str, int] = {}
    section = ""
    for number, line in _logical_lines(text):
        if header := _HEADER.match(line):
            section = _bare(header[1])
            found.setdefault(section, number)
        elif assign := _ASSIGN.match(line):
            name = _bare(assign[1])
            dotted = f"{section}.{name}" if section else name
            found[dotted] = number
            found.setdefault(dotted.split(".")[0], number)
            for inner in re.findall(r"[{,]\s*([A-Za-z0-9_-]+)\s*=", line):
                found.setdefault(f"{dotted}.{inner}", number)
    return found


def _bare(name: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in name.split("."))


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of lines outside multi-line brackets and triple-quoted strings."""
    depth, quote = 0, ""
    for number, line in enumerate(text.split("\n"), start=1):
        if not depth and not quote:
            yield number, line
        depth, quote = _scan(line, depth, quote)


_TOKEN = re.compile(r'"""|\'\'\'|"(?:\\.|[^"\\])*"|\'[^\']*\'|#|[\[\]{}]')


def _scan(line: str, depth: int, quote: str) -> tuple[int, str]:
    position = 0
    while True:
        if quote:
            end = line.find(quote, position)
            if end < 0:
                return depth, quote
            position, quote = end + 3, ""
        token = _TOKEN.search(line, position)
        if token is None or token[0] == "#":
            return depth, quote
        position = token.end()
        if token[0] in ('"""', "'''"):
            quote = token[0]
        elif token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
