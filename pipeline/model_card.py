"""MODEL_CARD.md of a bundle: what it is, what it was made from, how good it is, how to use it."""

from typing import Any

from jinja2 import Environment, StrictUndefined

TEMPLATE = """\
# {{ model.name }} encoder, pretrained with CAE

A Vision Transformer pretrained without labels as a Context Autoencoder, exported to ONNX by cae-pipe.

| | |
|---|---|
| input | uint8 [batch, {{ preprocessing.channels }}, {{ preprocessing.height }}, {{ preprocessing.width }}]; \
normalisation is inside the graph |
| patches | {{ model.grid[0] }} × {{ model.grid[1] }} of {{ model.patch_size }} px |
| width | {{ model.width }}, {{ model.num_heads }} heads |
| target of pretraining | {{ model.target }} |
| trained on | {{ origin.source }} |
| opset | {{ opset }}, {{ dtype }} |

## Use

`cae-pipe serve --bundle .` answers `POST /embed` and `POST /reconstruct`; any ONNX Runtime reads the files.

## Quality

| stage | figure | value |
|---|---|---|
{% for stage, figures in metrics.items() -%}
{% for name, value in figures.items() -%}
| {{ stage }} | {{ name }} | {{ "%.6g" | format(value) if value is number else value }} |
{% endfor -%}
{% endfor %}
`random_init_top1` is the same probe or training on the same encoder with random weights.

{% if variants -%}
## Precision

Beside float32, on validation images: cosine of each output, mean (least), and top-1 accuracy of probes on its features.

| variant | figure | value |
|---|---|---|
{% for name, variant in variants.items() -%}
{% for output, cosine in variant.cosine.items() -%}
| {{ variant.file }} | cosine of {{ output }} | {{ "%.4f (%.4f)" | format(cosine.mean, cosine.min) }} |
{% endfor -%}
{% for probe in ("knn", "linear") if variant[probe ~ "_top1"] is not none -%}
| {{ variant.file }} | {{ probe }} top-1 | {{ "%.4f (%+.4f)" | format(variant[probe ~ "_top1"], \
variant[probe ~ "_top1_change"]) }} |
{% endfor -%}
{% endfor %}
{% endif -%}
{% if examples -%}
## Example images

This folder contains {{ examples | length }} validation images ({{ examples[0] }} and on), which the server's page \
offers. To export without them set `export.num_examples: 0` in params.yaml.

{% endif -%}
## Limits

The encoder knows images like those it was trained on. The figures above were measured on validation images of the same
source. It was made without labels, so it carries whatever bias those images have.
"""


def model_card(bundle: dict[str, Any]) -> str:
    """The card of a bundle, from its bundle.json."""
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701 (Markdown, not HTML)
    return environment.from_string(TEMPLATE).render(bundle).rstrip() + "\n"
