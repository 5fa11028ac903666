"""`cae-pipe profile`: the commands over `params/`."""

from typing import Annotated

import typer

profile = typer.Typer(help="Ready-made parameters, those of the paper among them.", no_args_is_help=True)
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value, e.g. pretrain.epochs=100.")
]
ProfileName = Annotated[str, typer.Argument(help="One of `cae-pipe profile list`.")]


@profile.command("list")
def profile_list() -> None:
    """What there is in params/."""
    from pipeline import profiles
    from pipeline.workspace import Workspace

    profiles.show_all(Workspace.here())


@profile.command("show")
def profile_show(name: ProfileName, changes: SetOption = None) -> None:
    """Print the whole params.yaml of a profile."""
    from pipeline import profiles
    from pipeline.workspace import Workspace

    profiles.show(Workspace.here(), name, changes or [])


@profile.command("apply")
def profile_apply(
    name: ProfileName,
    changes: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite changes of params.yaml that are not kept.")] = False,
) -> None:
    """Write a profile to params.yaml."""
    from pipeline import profiles
    from pipeline.workspace import Workspace

    profiles.apply(Workspace.here(), name, changes or [], force)
