"""`cae-pipe import dalle`: the published files of the DALL-E tokenizer, checked and written as safetensors."""

import logging
from pathlib import Path

from cae.storage import save_weights
from cae.targets.dalle_files import read_dalle

logger = logging.getLogger(__name__)


def run(encoder: Path, decoder: Path, out: Path) -> None:
    """Write `out/encoder.safetensors` and `out/decoder.safetensors`, which `tokenizer.kind: dalle` reads too.

    Raises UserError, and writes nothing, where a file is missing, carries code or is no such tokenizer.
    """
    modules = read_dalle(encoder, decoder)
    out.mkdir(parents=True, exist_ok=True)
    written = {"encoder": modules.encoder, "decoder": modules.decoder}
    for part, module in written.items():
        save_weights(out / f"{part}.safetensors", module, {"kind": f"dalle_{part}"})
    millions = sum(weight.numel() for module in written.values() for weight in module.parameters()) / 1e6
    logger.info(
        "DALL-E tokenizer of %d codes, %.1f million weights, every tensor used: wrote %s and %s. To pretrain with it "
        "set tokenizer.kind: dalle, tokenizer.dalle_encoder and tokenizer.dalle_decoder to these files",
        modules.sizes.vocab_size,
        millions,
        *(out / f"{part}.safetensors" for part in written),
    )
