"""params.yaml as people keep it: values change, comments and the order of the keys stay."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from cae.config import Params, parse_params, read_sections, unknown_key
from cae.errors import UserError

# Where params.yaml has its comments; for a comment on a line that had none.
COMMENT_COLUMN = 30


def read(path: Path) -> CommentedMap:
    """The sections of a parameter file; UserError where it cannot be read or is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a parameter file in UTF-8") from None
    read_sections(text, str(path))  # refuses what is no YAML, and keys given twice
    return yaml().load(text)


def change(raw: CommentedMap, key: str, value: Any, source: str, comment: str = "") -> None:
    """Set a dotted key, and the comment on its line where one is given.

    UserError names `source`, the key and the nearest one where there is no such key.
    """
    *sections, name = path = key.split(".")
    section: Any = raw
    for depth, part in enumerate(path):
        if not isinstance(section, dict):
            found = ", ".join(path[depth:])
            raise UserError(f"{source}: {'.'.join(path[:depth])}: is a value without keys of its own, found {found}")
        if part not in section:
            raise UserError(f"{source}: {unknown_key(path[: depth + 1], list(section))}")
        if depth < len(sections):
            section = section[part]
    if isinstance(section[name], dict):
        raise UserError(f"{source}: {key}: is a section; expected one of its keys: {', '.join(section[name])}")
    if isinstance(value, list):
        value = CommentedSeq(value)
        value.fa.set_flow_style()
    if isinstance(value, list) and isinstance(section[name], list):
        # In place, so that the comment behind the list stays.
        section[name][:] = value
    else:
        section[name] = value
    if comment:
        _set_comment(section, name, comment)


def comment_of(raw: CommentedMap, key: str) -> str:
    """The comment on the line of a dotted key, with its #; empty where there is none."""
    *sections, name = key.split(".")
    section: Any = raw
    for part in sections:
        section = section[part]
    token = _token(section, name)
    return token.value.partition("\n")[0].strip() if token else ""


def _set_comment(section: CommentedMap, name: str, comment: str) -> None:
    token = _token(section, name)
    if token is None:
        section.yaml_add_eol_comment(comment, name, column=COMMENT_COLUMN)
    else:
        # What follows on the next lines belongs to the same token.
        token.value = comment + token.value[token.value.find("\n") :]


def _token(section: CommentedMap, name: str) -> Any:
    return next((item for item in section.ca.items.get(name, ()) if item is not None), None)


def values_of(raw: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every value of nested sections, under its dotted key."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from values_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def validate(raw: CommentedMap, source: str) -> Params:
    """The parameters, checked; UserError names `source` and every wrong key."""
    return parse_params(plain(raw), source)


def plain(raw: Any) -> Any:
    """Without ruamel's types, which strict validation does not know."""
    if isinstance(raw, dict):
        return {str(key): plain(value) for key, value in raw.items()}
    if isinstance(raw, list):
        return [plain(value) for value in raw]
    if isinstance(raw, bool) or raw is None:
        return raw
    return next((kind(raw) for kind in (int, float, str) if isinstance(raw, kind)), raw)


def text_of(raw: CommentedMap) -> str:
    """The file's text."""
    buffer = io.StringIO()
    yaml().dump(raw, buffer)
    return buffer.getvalue()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another place") from None


def yaml() -> YAML:
    """A reader and writer that keeps comments, quotes and lines as they are."""
    kept = YAML()
    kept.preserve_quotes = True
    kept.width = 4096  # a long path stays on its line
    # As `key: null` is written in the shipped file.
    kept.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    # A program that reads YAML 1.1 takes 1e-05 for a text.
    kept.representer.add_representer(
        float,
        lambda r, value: r.represent_scalar("tag:yaml.org,2002:float", np.format_float_positional(value, trim="0")),
    )
    return kept
