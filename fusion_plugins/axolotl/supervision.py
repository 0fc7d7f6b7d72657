"""Which turns of a chat are trained on, by axolotl's keys: ``roles_to_train``, ``train_on_eos`` and the like."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fusion_plugins.column_names import ColumnNames
from fusion_plugins.errors import ConfigError

Ends = Literal["all", "turn", "last", "none"]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Supervision:
    """Which turns are trained on, and which tokens that end a turn.

    Attributes:
        roles: whose turns are trained on.
        inputs: train on the turns of every role.
        flag: key of a message that says, as a boolean, whether its turn is trained on; it comes before the roles.
        eos: which EOS tokens are trained on: ``all``, those that end a trained ``turn``, only the ``last``, or none.
        eot: the same for other tokens that end a turn.
        eot_ids: ids of tokens that end a turn besides those that the tokenizer's template shows.
    """

    roles: frozenset[str] = frozenset({"assistant"})
    inputs: bool = False
    flag: str | None = None
    eos: Ends = "turn"
    eot: Ends = "turn"
    eot_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Any, cfg: Any, entry: Any) -> "Supervision":
        """Read the keys of the run and of the entry of the dataset.

        Raises:
            ConfigError: one of ``eot_tokens`` is not a token.
        """
        names, roles = ColumnNames.of(entry).role_names, entry.get("roles_to_train")
        eos: Any = entry.get("train_on_eos") or "turn"
        return cls(
            roles=frozenset(names.get(role, role) for role in (["assistant"] if roles is None else roles)),
            inputs=bool(cfg.get("train_on_inputs")),
            flag=entry.get("message_field_training"),
            eos=eos,
            eot=entry.get("train_on_eot") or eos,
            eot_ids=frozenset(_token_id(tokenizer, token) for token in cfg.get("eot_tokens") or ()),
        )

    def trains(self, message: Message) -> bool:
        """Whether the turn of a message is trained on."""
        flag = None if self.flag is None else message.get(self.flag)
        return bool(flag) if flag is not None else self.inputs or message.get("role") in self.roles

    def roles_to_find(self, messages: Iterable[Message]) -> tuple[str, ...]:
        """Return the roles whose turns have to be found in the rendered text, the assistant's always."""
        every = {self.eos, self.eot} & {"all", "last"}
        found = {str(message["role"]) for message in messages if every or self.trains(message)}
        return tuple(sorted(found | {"assistant"}))


#: what axolotl does by default
DEFAULT = Supervision()


def _token_id(tokenizer: Any, token: str) -> int:
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            f"eot_tokens: expected tokens of the target's vocabulary, but {token!r} is {len(ids)} tokens. Add it under "
            "`tokens:`, or name the token that the chat template writes."
        )
    return int(ids[0])
