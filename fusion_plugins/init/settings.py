"""The settings of ``fusion init``."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fusion_plugins.column_names import ABOUT_PROMPTS, ColumnNames, PromptColumns
from fusion_plugins.config import Settings
from fusion_plugins.init.models import ModelFacts

METHODS = {
    "fusellm": "one target learns from the distributions of several sources",
    "fusechat": "one copy of the target per source learns from its distributions, then the copies are merged",
    "fusechat3": "the target learns from the scored answers of several sources, first the best ones, then pairs",
    "rounds": "the target, once tuned on answers of the sources, learns what they think of its own answers, in rounds",
}
#: methods that take prompts and make the answers themselves
ON_PROMPTS = ("fusechat3", "rounds")


class InitConfig(Settings):
    """The choices of ``fusion init``; what is null is chosen."""

    method: Literal["fusellm", "fusechat", "fusechat3", "rounds"] = Field(
        description="fusellm, fusechat, fusechat3 or rounds"
    )
    target: str = Field(min_length=1, description="folder or hub name of the model to train")
    sources: list[str] = Field(min_length=1, description="folders or hub names of the models to learn from")
    texts: str = Field(
        min_length=1,
        description="texts, chats or (fusechat3, rounds) prompts: .jsonl or .parquet, or a folder",
    )
    columns: PromptColumns = Field(default_factory=PromptColumns, description=ABOUT_PROMPTS)
    out: str = Field(min_length=1, description="folder to write")
    backend: Literal["transformers", "vllm"] = Field("transformers", description="what runs the sources")
    vllm: str | None = Field(None, description="environment with vLLM, where the sources run; implies backend vllm")
    gpus: int | None = Field(None, ge=0, description="GPUs of the machine that trains; default: those of this machine")
    gpu_memory: float | None = Field(None, gt=0, description="memory of one of them in GB")
    adapter: Literal["none", "lora", "qlora"] | None = Field(
        None, description="none, lora or qlora; default: what fits"
    )
    sequence_len: int | None = Field(None, ge=16, description="tokens of a training row")
    lm_loss_weight: float | None = Field(None, ge=0, le=1, description="lambda, the weight of the language-model loss")
    top_k: int | None = Field(None, ge=1, description="entries per position in the stores")
    rule: str | None = Field(None, description="fusion rule")
    batch: int | None = Field(None, ge=1, description="sequences per step, over all GPUs")
    epochs: int | None = Field(None, ge=1, description="passes over the texts")
    learning_rate: float | None = Field(None, gt=0, description="of the (first) training")
    pad_token: str | None = Field(None, description="token of the target to pad with")
    own: bool = Field(True, description="capture the target, too, so that its own distributions compete")
    merge: Literal["varm", "fusechat_sce"] = Field("varm", description="how fusechat merges")
    samples: int | None = Field(None, ge=2, description="fusechat3, rounds: answers per prompt and source")
    max_tokens: int | None = Field(None, ge=1, description="fusechat3, rounds: longest answer")
    reward_model: str | None = Field(
        None, description="fusechat3, rounds: reward model, for prompts that cannot be verified"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the reward model")
    rounds: int = Field(2, ge=1, description="rounds: how many")
    tuned: bool = Field(False, description="rounds: the target was tuned on answers of these sources before")
    held_out: str | None = Field(None, description="rounds: texts that the target is measured on after every round")
    chat_templates: dict[str, str] = Field(default_factory=dict, description="model -> file with its chat template")
    facts: dict[str, ModelFacts] = Field(default_factory=dict, description="model -> what it is, said by hand")

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM runs the sources."""
        return self.backend == "vllm" or self.vllm is not None

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        of_prompts = self.columns.model_fields_set - ColumnNames.model_fields.keys()
        if self.method not in ON_PROMPTS and of_prompts:
            raise ValueError(
                f"columns: {', '.join(sorted(of_prompts))} are of prompts, and {self.method} reads texts and chats"
            )
        if self.method != "rounds" and (self.tuned or self.held_out is not None):
            raise ValueError(f"tuned and held_out are for the method rounds, got the method {self.method}")
        return self
