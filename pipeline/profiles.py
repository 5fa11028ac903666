"""Profiles: ready-made parameters in `params/`, to be listed, shown and written to params.yaml.

A profile is a whole parameter file or an overlay. An overlay's key `extends` names the file that it builds on, and its
other keys replace values there; order and comments of the base survive.
"""

import contextlib
import difflib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from cae.config import Params, read_sections
from cae.errors import UserError
from pipeline import params_file
from pipeline.workspace import Workspace

EXTENDS = "extends"


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
    path = folder / f"{name}.yaml"
    raw, is_whole = _merged(path, [])
    arguments = " ".join([name, *(f"--set {change}" for change in changes)])
    for change in changes:
        params_file.change(raw, *_parse_change(change), f"--set {change}")
    source = " ".join([str(path), *(f"--set {change}" for change in changes)])
    text = params_file.text_of(raw)
    about = _about(path.read_text(encoding="utf-8"))
    if changes or not is_whole:
        text = _with_origin(text, about, arguments)
    return Profile(name, about, text, params_file.validate(raw, source))


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
    params_file.write(path, profile.text)
    _report(workspace, profile, before)


def _merged(path: Path, above: list[Path]) -> tuple[CommentedMap, bool]:
    """The file laid over all that it builds on, and whether it is a whole file itself."""
    if path.resolve() in above:
        raise UserError(f"{path}: {EXTENDS} leads back to this file; expected a chain that ends at a whole file")
    layer = params_file.read(path)
    if EXTENDS not in layer:
        return layer, True
    following = layer.pop(EXTENDS)
    if not isinstance(following, str) or not (path.parent / following).is_file():
        near = difflib.get_close_matches(str(following), [p.name for p in path.parent.glob("*.yaml")], 1, cutoff=0)
        found = params_file.plain(following)
        raise UserError(
            f"{path}: {EXTENDS}: expected a parameter file, relative to {path.parent}, found {found!r}; "
            f"did you mean `{near[0]}`?"
        )
    base, _ = _merged(path.parent / following, [*above, path.resolve()])
    for key, value in params_file.values_of(layer):
        params_file.change(base, key, value, str(path), params_file.comment_of(layer, key))
    return base, False


def _parse_change(change: str) -> tuple[str, Any]:
    """Key and value of one `--set key=value`."""
    key, equals, text = change.partition("=")
    if not equals or not text.strip() or not all(key.split(".")):
        raise UserError(f"--set {change}: expected key=value, such as pretrain.epochs=100 (null for no value)")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserError(f"--set {change}: not a YAML value: {error}") from None
    # A comment or a section would end up in the file as something else than the value that was meant.
    if isinstance(value, dict) or " #" in text:
        raise UserError(
            f"--set {change}: expected one value, such as 3, [0.6, 1.0] or a text; quote what YAML would not"
        )
    return key, value


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
        old = dict(params_file.values_of(read_sections(before, "")))
    new = dict(params_file.values_of(read_sections(profile.text, profile.name)))
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
