"""docs/axolotl.md names every key of the `fusion:` block, with its default and meaning."""

import json

import pytest
from axolotl_runs import ROOT

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.response_args import PairArgs, ReferenceArgs, SftArgs, SplitArgs, WRPOArgs
from fusion_plugins.axolotl.source_args import AlignmentArgs, FusedSourceArgs, ProjectionArgs, RuleArgs, SourceArgs

PAGE = (ROOT / "docs" / "axolotl.md").read_text(encoding="utf-8")
NESTED = {
    "sources": "a list",
    "alignment": "a block",
    "projection": "a block",
    "pairs": "a block",
    "sft": "a block",
    "split": "a block",
    "wrpo": "a block",
    "reference": "a block",
}


def table(model):
    """The table that belongs into the page."""
    lines = ["| key | default | |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if model is FusionBlock and name in NESTED:
            default = NESTED[name]
        elif field.is_required():
            default = "required"
        else:
            default = f"`{json.dumps(field.get_default(call_default_factory=True))}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "model",
    [
        FusionBlock,
        FusedSourceArgs,
        RuleArgs,
        SourceArgs,
        AlignmentArgs,
        PairArgs,
        ProjectionArgs,
        SftArgs,
        SplitArgs,
        WRPOArgs,
        ReferenceArgs,
    ],
)
def test_the_page_has_the_table_of_every_block(model):
    assert table(model) in PAGE, f"docs/axolotl.md should contain:\n{table(model)}"
