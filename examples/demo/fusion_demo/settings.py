"""The sizes of the demonstration."""

from dataclasses import dataclass

__all__ = ["DOMAINS", "FULL", "QUICK", "SIZES", "SOURCES", "Settings"]

DOMAINS = ("code", "prose", "maths")
#: Each source model is named after the domain that it is trained for.
SOURCES = ("code", "maths", "prose")


@dataclass(frozen=True)
class Settings:
    """Sizes and seeds; bytes are UTF-8 bytes of text, tokens are tokens of the model in question.

    Attributes:
        seed: of everything random.
        pretrain_bytes: bytes of each domain in the pool that all four models are trained from.
        common_bytes: bytes of each domain in the texts that are captured and then trained on.
        heldout_bytes: bytes of each domain for bits per byte.
        source_tokens: training tokens of each source.
        target_tokens: training tokens of the target, before any fusion.
        source_share: share of its own domain in what a source sees; the other two halve the rest.
        heldout_problems: problems for the verified accuracy.
        prompts: problems for sampling; none of them held out.
        samples: responses per prompt and source.
        top_k: log-probabilities kept per position.
        max_steps: limit of each axolotl run, None for one epoch.
    """

    seed: int = 20
    pretrain_bytes: int = 2_200_000
    common_bytes: int = 250_000
    heldout_bytes: int = 60_000
    source_tokens: int = 750_000
    target_tokens: int = 350_000
    source_share: float = 0.8
    heldout_problems: int = 200
    prompts: int = 600
    samples: int = 4
    top_k: int = 128
    max_steps: int | None = None


FULL = Settings()
QUICK = Settings(
    pretrain_bytes=200_000,
    common_bytes=25_000,
    heldout_bytes=15_000,
    # Enough for a right answer now and then: without one there is nothing to fine-tune on.
    source_tokens=140_000,
    target_tokens=20_000,
    heldout_problems=16,
    prompts=80,
    samples=3,
    top_k=16,
    max_steps=4,
)
SIZES = {"full": FULL, "quick": QUICK}
