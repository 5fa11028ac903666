"""Profiles: ready-made parameters in `params/`, to be listed, shown and written to params.yaml.

A profile is a whole parameter file or an overlay. An overlay's key `extends` names the file that it builds on, and its
other keys replace values there. The text of the base is edited in place, so its order and its comments survive.
"""

import contextlib
import difflib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode

from cae.config import Params, parse_params, read_sections, unknown_key
from cae.errors import UserError
from pipeline.workspace import Workspace

EXTENDS = "extends"
# Where params.yaml has its comments; for a comment on a line that had none.
COMMENT_COLUMN = 30


class Value(NamedTuple):
    """A value as written in a file: its text, where it stands, and what follows on its line."""

    text: str
    start: int
    end: int
    column: int
    tail: str  # spaces and a comment, or either, or neither


Tree = dict[str, Union[Value, "Tree"]]


class Layer(NamedTuple):
    """One file of a profile: a base, or an overlay without its `extends`."""

    path: Path
    text: str
    tree: Tree


@dataclass(frozen=True)
class Profile:
    """A profile after merging: the text of a whole params.yaml, and the same validated."""

    name: str
    about: str
    text: str
    params: Params


def names(folder: Path) -> list[str]:
    """Profiles of a folder, numbers in their names in the order of numbers."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run in the root of a checkout, where params/ holds the profiles")

    def in_order(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]

    return sorted((path.stem for path in folder.glob("*.yaml")), key=in_order)


def read(folder: Path, name: str, changes: Sequence[str] = ()) -> Profile:
    """Merge a profile, then `changes` ("key=value", dotted keys), and validate the result.

    Raises UserError naming the file or the change, the key, what was expected and the nearest name.
    """
    known = names(folder)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
        hint = f"did you mean `{nearest[0]}`? (known: {', '.join(known)})" if nearest else "the folder is empty"
        raise UserError(f"{folder}: no profile {name!r}; {hint}")
    base, *overlays = _layers(folder / f"{name}.yaml")
    text = base.text
    for layer in overlays:
        text = _lay_over(text, layer.tree, str(layer.path))
    for change in changes:
        text = _lay_over(text, _parse_change(change), f"--set {change}")
    source = " ".join([str(folder / f"{name}.yaml"), *(f"--set {change}" for change in changes)])
    about = _about((overlays or [base])[-1].text)
    if overlays or changes:
        text = _with_origin(text, about, " ".join([name, *(f"--set {change}" for change in changes)]))
    return Profile(name, about, text, parse_params(read_sections(text, source), source))


def show_all(workspace: Workspace) -> None:
    """Print a table of the profiles."""
    table = Table("profile", "what it is", "model", "epochs", "batch", "source")
    for column in table.columns:
        # A name cut short cannot be typed.
        column.overflow = "fold"
        column.no_wrap = column.header != "what it is"
    for name in names(workspace.profiles):
        profile = read(workspace.profiles, name)
        pretrain = profile.params.pretrain
        table.add_row(
            name,
            profile.about,
            profile.params.model.name,
            str(pretrain.epochs),
            str(pretrain.batch_size),
            profile.params.prepare.source,
        )
    console = Console()
    console.print(table)
    console.print("cae-pipe profile apply NAME writes one to params.yaml", markup=False, soft_wrap=True)


def show(workspace: Workspace, name: str, changes: Sequence[str]) -> None:
    """Write the whole params.yaml of a profile to standard output."""
    sys.stdout.write(read(workspace.profiles, name, changes).text)


def apply(workspace: Workspace, name: str, changes: Sequence[str], force: bool) -> None:
    """Write a profile to params.yaml and say what changed; raise UserError where work would be lost."""
    profile = read(workspace.profiles, name, changes)
    path = workspace.params_file
    before = path.read_bytes().decode(errors="replace") if path.exists() else ""
    if before and before != profile.text and not force and _is_unsaved(workspace, before):
        raise UserError(
            f"{path}: holds changes that would be lost; commit it or keep a copy "
            f"(`cp {path} params/mine.yaml` makes a profile of it), or add --force"
        )
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(profile.text, encoding="utf-8")
    temporary.replace(path)
    _report(workspace, profile, before)


def _layers(path: Path) -> list[Layer]:
    """The file and all that it builds on, the base first."""
    layers: list[Layer] = []
    while True:
        if path.resolve() in [layer.path.resolve() for layer in layers]:
            raise UserError(f"{path}: {EXTENDS} leads back to this file; expected a chain that ends at a whole file")
        text = _read_text(path)
        tree = _parse(text, str(path))
        extends = tree.pop(EXTENDS, None)
        layers.insert(0, Layer(path, text, tree))
        if extends is None:
            return layers
        following = YAML(typ="safe", pure=True).load(extends.text) if isinstance(extends, Value) else None
        if not isinstance(following, str) or not (path.parent / following).is_file():
            near = difflib.get_close_matches(str(following), [p.name for p in path.parent.glob("*.yaml")], 1, cutoff=0)
            raise UserError(
                f"{path}: {EXTENDS}: expected a parameter file, relative to {path.parent}, found {following!r}; "
                f"did you mean `{near[0]}`?"
            )
        path = path.parent / following


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a parameter file in UTF-8") from None


def _parse(text: str, name: str) -> Tree:
    read_sections(text, name)  # refuses what is no YAML, and keys given twice
    node = YAML(typ="safe", pure=True).compose(text)
    return _tree(node, text, name, [])


def _tree(node: MappingNode, text: str, name: str, path: list[str]) -> Tree:
    tree: Tree = {}
    for key_node, value_node in node.value:
        here = [*path, str(key_node.value)]
        if isinstance(value_node, MappingNode):
            tree[here[-1]] = _tree(value_node, text, name, here)
        else:
            start, end = value_node.start_mark.index, value_node.end_mark.index
            if start == end:
                # The parser puts a value that is left out at the next key; it belongs behind its colon.
                start = end = text.index(":", key_node.end_mark.index) + 1
            tree[here[-1]] = _value(text, start, end, f"{name}: {'.'.join(here)}")
    return tree


def _value(text: str, start: int, end: int, name: str) -> Value:
    if "\n" in text[start:end]:
        raise UserError(f"{name}: expected a value on one line, such as 3 or [0.6, 1.0], found {text[start:end]!r}")
    line_start, line_end = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    tail = text[end : line_end if line_end >= 0 else len(text)]
    return Value(text[start:end], start, end, start - line_start, tail)


def _parse_change(change: str) -> Tree:
    """The tree of one `--set key=value`."""
    key, equals, text = change.partition("=")
    if not equals or not text.strip() or not all(key.split(".")):
        raise UserError(f"--set {change}: expected key=value, such as pretrain.epochs=100 (null for no value)")
    text = text.strip()
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except YAMLError as error:
        raise UserError(f"--set {change}: not a YAML value: {error}") from None
    # A comment or a mapping would end up in the file as something else than the value that was meant.
    if node is None or isinstance(node, MappingNode) or (node.start_mark.index, node.end_mark.index) != (0, len(text)):
        raise UserError(
            f"--set {change}: expected one value, such as 3, [0.6, 1.0] or a text; quote what YAML would not"
        )
    tree: Tree | Value = _value(text, 0, len(text), f"--set {change}")
    for part in reversed(key.split(".")):
        tree = {part: tree}
    assert isinstance(tree, dict)
    return tree


def _lay_over(text: str, changes: Tree, source: str) -> str:
    """`text` with the values of `changes` in place of its own."""
    edits = list(_edits(_parse(text, source), changes, source, []))
    # From the end, so that the places of the others stay right.
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def _edits(base: Tree, changes: Tree, source: str, path: list[str]) -> Iterator[tuple[int, int, str]]:
    for key, change in changes.items():
        here = [*path, key]
        dotted = ".".join(here)
        if key not in base:
            raise UserError(f"{source}: {unknown_key(here, list(base))}")
        old = base[key]
        if isinstance(old, dict) and isinstance(change, dict):
            yield from _edits(old, change, source, here)
        elif isinstance(old, dict):
            raise UserError(f"{source}: {dotted}: is a section; expected one of its keys: {', '.join(old)}")
        elif isinstance(change, dict):
            raise UserError(f"{source}: {dotted}: is a value without keys of its own, found {', '.join(change)}")
        else:
            yield old.start, old.end + len(old.tail), _line(old, change)


def _line(old: Value, change: Value) -> str:
    """The new value and what follows it on the line: its own comment, or else the comment that was there."""
    # A value left out is null, and stands right behind the colon.
    text = ("" if old.text else " ") + (change.text or "null")
    comment = next((tail.strip() for tail in (change.tail, old.tail) if tail.strip().startswith("#")), "")
    if not comment:
        return text + old.tail.rstrip()
    had_one = old.tail.strip().startswith("#")
    column = old.column + len(old.text) + old.tail.index("#") if had_one else COMMENT_COLUMN
    return text + " " * max(1, column - old.column - len(text)) + comment


def _about(text: str) -> str:
    """What a profile is, which is the first line of its file."""
    first = text.partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def _with_origin(text: str, about: str, arguments: str) -> str:
    """The first line says what the file is; an overlay makes it something else than its base."""
    first, _, rest = text.partition("\n")
    body = rest if first.startswith("#") else text
    return f"# {about}\n# Written by `cae-pipe profile apply {arguments}`.\n{body}"


def _is_unsaved(workspace: Workspace, text: str) -> bool:
    """Whether params.yaml is kept nowhere else: neither committed nor just what a profile gives."""
    command = ["git", "status", "--porcelain", "--ignored", "--", workspace.params_file.name]
    with contextlib.suppress(FileNotFoundError):
        # The words are fixed; the one file name is our own.
        status = subprocess.run(command, cwd=workspace.root, capture_output=True, check=False)  # noqa: S603
        if status.returncode == 0 and not status.stdout:
            return False
    for name in names(workspace.profiles):
        # A profile that cannot be read keeps nothing, and is no reason to refuse another.
        with contextlib.suppress(UserError):
            if read(workspace.profiles, name).text == text:
                return False
    return True


def _report(workspace: Workspace, profile: Profile, before: str) -> None:
    old: dict[str, Any] = {}
    # What was no parameter file has no values to compare.
    with contextlib.suppress(UserError):
        old = _flat(read_sections(before, ""))
    new = _flat(read_sections(profile.text, profile.name))
    changed = [key for key in new if key not in old or old[key] != new[key]]
    lines = [f"{workspace.params_file}: profile {profile.name}, {len(changed)} values changed"]
    lines += [f"  {key}: {_shown(old[key]) if key in old else '-'} → {_shown(new[key])}" for key in changed]
    kind, _, location = profile.params.prepare.source.partition(":")
    if kind == "folder" and not (workspace.root / location).is_dir():
        lines.append(
            f"{location} is not there yet: put the images there (train/CLASS/ and val/CLASS/ where they have labels), "
            "or name another place with --set prepare.source=folder:PATH"
        )
    lines.append("next: make repro")
    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _shown(value: Any) -> str:
    # As YAML has it; the old file may hold what JSON has not, such as a date.
    return json.dumps(value, default=str, ensure_ascii=False)


def _flat(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
