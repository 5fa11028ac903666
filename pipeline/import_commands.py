"""`cae-pipe import`: the official checkpoints, the DALL-E tokenizer, and any Vision Transformer of timm."""

import re
from pathlib import Path
from typing import Annotated

import typer

from cae.errors import UserError

imports = typer.Typer(
    no_args_is_help=True,
    help="Take over weights of other software. Files are read as tensors; code in them never runs.",
)

OutOption = Annotated[Path, typer.Option(help="Folder to write; every --checkpoint takes it.")]
MeanOption = Annotated[
    str | None,
    typer.Option(
        help="Mean of each channel, pixels in 0-1, with commas between.",
        show_default="ImageNet's; of timm's models those that timm names",
    ),
]
StdOption = Annotated[
    str | None,
    typer.Option(
        help="Standard deviation of each channel, as --mean.",
        show_default="ImageNet's; of timm's models those that timm names",
    ),
]


@imports.command()
def official(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the official CAE release (.pth or .safetensors).")],
    out: OutOption,
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of the encoder.", show_default="16 for width 1024, else 12")
    ] = None,
    predictor_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of regressor and decoder.", show_default="12")
    ] = None,
    mean: MeanOption = None,
    std: StdOption = None,
    dalle: Annotated[
        Path | None,
        typer.Option(help="Folder that `import dalle` wrote: the target of the decoder, for reconstructions."),
    ] = None,
) -> None:
    """A pretrained CAE, or a fine-tuned encoder, of the official release.

    Sizes are read from the weights; heads cannot be, and the checkpoints hold no preprocessing. Every key is used or
    named as dropped with the reason.

    \b
    Examples:
      cae-pipe import official cae_base_1600ep.pth --out imported/cae-b --dalle data/dalle
      cae-pipe export --checkpoint imported/cae-b --out bundle
    """
    from pipeline import imports as work

    statistics = _numbers("--mean", mean), _numbers("--std", std)
    work.official(checkpoint, out, num_heads, predictor_heads, *statistics, dalle)


@imports.command("dalle")
def dalle_tokenizer(
    encoder: Annotated[Path, typer.Argument(help="encoder.pkl as published, or a state dict.")],
    decoder: Annotated[Path, typer.Argument(help="decoder.pkl as published, or a state dict.")],
    out: Annotated[Path, typer.Option(help="Folder for encoder.safetensors and decoder.safetensors.")],
) -> None:
    """The DALL-E tokenizer, which the paper's CAE* predicts; for `tokenizer.kind: dalle` and `import official --dalle`.

    \b
    Example:
      cae-pipe import dalle encoder.pkl decoder.pkl --out data/dalle
    """
    from pipeline import import_dalle

    import_dalle.run(encoder, decoder, out)


@imports.command("timm")
def timm_model(
    model: Annotated[
        str, typer.Argument(help="timm's name of a model, a folder that timm wrote, or a file of weights.")
    ],
    out: OutOption,
    architecture: Annotated[str | None, typer.Option(help="With a file: timm's name of the model.")] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Pixels, e.g. 224 or 96x160 (height x width).", show_default="the model's")
    ] = None,
    mean: MeanOption = None,
    std: StdOption = None,
) -> None:
    """Any Vision Transformer of timm, to be probed, fine-tuned, exported and served.

    \b
    Examples:
      cae-pipe import timm vit_small_patch16_224.dino --out imported/dino-s
      cae-pipe import timm mae.pth --architecture vit_base_patch16_224.mae --out imported/mae-b
    """
    from pipeline import imports as work

    size = _size(image_size) if image_size else None
    work.from_timm_model(model, out, architecture, size, _numbers("--mean", mean), _numbers("--std", std))


def _numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: {text!r}; expected numbers with commas between, e.g. 0.485,0.456,0.406") from None


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise UserError(f"--image-size: {text!r}; expected 224 or 96x160")
    return int(match[1]), int(match[2] or match[1])
