"""The world's models, as measured."""

from pathlib import Path

from fusion_lab.report import markdown, read

NAMES = {
    "target": "target (Llama, 1,024 byte-level tokens, whole numbers)",
    "numbers": "source `numbers` (Mistral, SentencePiece, whole numbers)",
    "digits": "source `digits` (Qwen2, byte-level, single digits)",
    "docs": "source `docs` (GPT-NeoX, 2,048 byte-level tokens)",
}


def make(results: Path, images: Path) -> dict[str, str]:
    """Return the table of the models."""
    table = read(results, "world")
    if table is None:
        return {}
    rows = [
        [
            NAMES[row["of"]],
            f"{row['bpb_docs']:.3f}",
            f"{row['bpb_sums']:.3f}",
            f"{row['chains']:.1%}",
            f"{row['answers']:.1%}",
            f"{row['luck']:.1%}",
        ]
        for row in table.to_dict("records")
    ]
    header = ["model", "docs, bits per byte", "sums, bits per byte", "right sums", "right answer", "luck"]
    chance = f"The best constant answer solves {table['constant'].iloc[0]:.1%} of the problems.\n"
    return {"world": markdown(header, rows) + "\n" + chance}
