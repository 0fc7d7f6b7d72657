"""The file of ``fusion run``: steps, and what each of them reads and writes."""

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fusion_plugins.config import Settings, load_config
from fusion_plugins.errors import ConfigError
from fusion_plugins.redaction import is_secret

#: a step's name is also that of its log
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: what a shell would take for an operator
OPERATORS = {"|", "||", "&", "&&", ";", "<", ">", ">>", "2>", "2>&1", "&>"}
#: files of these kinds that a command names decide its result
READ_SUFFIXES = (".yml", ".yaml", ".toml", ".py", ".sh")
#: names that a shell takes for a variable, and those of variables that are not shown
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URL = re.compile(r"https?://")


class Step(Settings):
    """One entry of ``steps``: a command in a process of its own."""

    name: str = Field(description="unique; the output goes to logs/NAME.log")
    command: str | list[str] = Field(description="program and arguments, quoted as in a shell, but run without one")
    needs: list[str] = Field(
        default_factory=list,
        description="steps that must have ended before; those that write what this one reads need not be named",
    )
    reads: list[str] = Field(
        default_factory=list,
        description="files and folders that decide the result; .yml, .yaml, .toml, .py and .sh files in the command "
        "count without being listed, and what other steps write where this one needs them or names it in its command",
    )
    writes: list[str] = Field(
        default_factory=list, description="files and folders that must be there when the step has ended"
    )
    stdout: str | None = Field(
        default=None, description="file that takes the standard output instead of the log; counts as written"
    )
    env: str | None = Field(
        default=None,
        description="where the command runs: the folder of a virtual environment, a name of `environments`, or the URL "
        "of a server that must answer before the step starts; default: the environment of `fusion run`",
    )
    variables: dict[str, str | int | float] = Field(
        default_factory=dict, description="environment variables of this step, such as CUDA_VISIBLE_DEVICES"
    )
    on_change: Literal["keep", "move"] | None = Field(
        default=None,
        description="what becomes of things that the step wrote for another command or other reads: keep (the command "
        "checks and extends them, as those of `fusion` do) or move (renamed to NAME.old, NAME.old1, ... before it "
        "starts); default: keep for `fusion`, move for other programs",
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("expected letters, digits, dots, dashes and underscores")
        return name

    @field_validator("command")
    @classmethod
    def _check_command(cls, command: str | list[str]) -> str | list[str]:
        words = _split(command)
        if not words:
            raise ValueError("expected a program and its arguments, got nothing")
        if isinstance(command, str) and (found := next((word for word in words if word in OPERATORS), None)):
            raise ValueError(f"a step has no shell, so {found!r} would be an argument; write `bash -c '...'`")
        if any("\0" in word for word in words):
            raise ValueError("expected words that a program can take, got a NUL in one of them")
        return command

    @field_validator("variables")
    @classmethod
    def _check_variables(cls, variables: dict[str, str | int | float]) -> dict[str, str | int | float]:
        return check_variables(variables)

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        return _split(self.command)

    @property
    def keeps(self) -> bool:
        """Whether the command itself sorts out what an earlier run with other inputs wrote."""
        return (self.on_change or ("keep" if self.words[0] == "fusion" else "move")) == "keep"


class ChainSettings(Settings):
    """Keys of the YAML file of ``fusion run``."""

    folder: str = Field(
        ".", description="where the steps run and where paths begin; relative to the folder of the file itself"
    )
    environments: dict[str, str] = Field(
        default_factory=dict, description="name -> folder of a virtual environment, or URL of a server"
    )
    variables: dict[str, str | int | float] = Field(
        default_factory=dict, description="environment variables of all steps"
    )
    steps: list[Step] = Field(min_length=1, description="what to do; the order follows from what they need and read")

    @field_validator("variables")
    @classmethod
    def _check_variables(cls, variables: dict[str, str | int | float]) -> dict[str, str | int | float]:
        return check_variables(variables)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [step.name for step in self.steps]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected different names of steps, got {', '.join(doubled)} twice")
        for step in self.steps:
            if unknown := sorted(set(step.needs) - set(names)):
                raise ValueError(f"step {step.name} needs {', '.join(unknown)}, which is no step")
        return self


@dataclass(frozen=True)
class Chain:
    """The steps of a file, with paths that are absolute.

    Attributes:
        path: the file; it need not exist.
        settings: its content.

    Raises:
        ConfigError: the steps wait for each other in a circle, two of them write the same place, or one writes what it
            reads.
    """

    path: Path
    settings: ChainSettings

    def __post_init__(self) -> None:
        for step in self.steps.values():
            for path in self.writes(step):
                if _inside(str(self.folder), path):
                    raise ConfigError(
                        f"{self.path}: step {step.name} writes the folder of the chain; name what it adds"
                    )
                if read := next((read for read in step.reads if _overlap(path, self.place(read))), None):
                    raise ConfigError(
                        f"{self.path}: step {step.name} writes {path} and reads {read}: it would never be up to date. "
                        "Let it write another place, or name more exactly what it reads."
                    )
        for one, other in combinations(self.steps.values(), 2):
            for left, right in ((left, right) for left in self.writes(one) for right in self.writes(other)):
                if _overlap(left, right):
                    raise ConfigError(
                        f"{self.path}: expected steps that write different places, got {one.name} ({left}) and "
                        f"{other.name} ({right}): what one has read could no longer be told. Give each its own."
                    )
        try:
            self.sorter().prepare()
        except CycleError as error:
            raise ConfigError(
                f"{self.path}: expected steps in some order, got a circle: {' -> '.join(error.args[1])}"
            ) from None

    @property
    def home(self) -> Path:
        """Folder of the file, and of the logs and records."""
        return Path(os.path.abspath(self.path)).parent

    @cached_property
    def folder(self) -> Path:
        """Where all steps run, without links: the programs know none above them, so that ".." means the same here."""
        return Path(os.path.realpath(self._named_folder))

    @cached_property
    def _named_folder(self) -> str:
        return os.path.normpath(self.home / os.path.expanduser(self.settings.folder))

    @cached_property
    def steps(self) -> dict[str, Step]:
        """The steps by name, in the order of the file."""
        return {step.name: step for step in self.settings.steps}

    def place(self, path: str) -> str:
        """Return a path of the file as an absolute one."""
        place = os.path.normpath(self.folder / os.path.expanduser(path))
        inside = os.path.isabs(path) and _inside(place, self._named_folder)
        return os.path.normpath(self.folder / os.path.relpath(place, self._named_folder)) if inside else place

    def writes(self, step: Step) -> list[str]:
        """Return what a step writes."""
        return [self.place(path) for path in (*step.writes, *([step.stdout] if step.stdout else []))]

    def reads(self, step: Step) -> list[str]:
        """Return what decides the result of a step: what it reads, and what the steps that it names write."""
        own = [self.place(path) for path in step.reads]
        made = [path for other in self.steps.values() if other is not step for path in self.writes(other)]
        # A path may also stand behind the name of its option, as in --config=FILE.
        named = (part for word in step.words for part in (word, word.partition("=")[2]) if part)
        for path in map(self.place, named):
            is_made = any(_inside(path, other) for other in made)
            is_config = path.endswith(READ_SUFFIXES) and os.path.isfile(path)
            if is_made or is_config and not any(_inside(path, mine) for mine in self.writes(step)):
                own.append(path)
        needed = (path for name in step.needs for path in self.writes(self.steps[name]))
        return list(dict.fromkeys([*own, *(path for path in needed if not any(_overlap(path, mine) for mine in own))]))

    def needs(self, step: Step) -> list[str]:
        """Return the steps that a step waits for: those that it names, and those that write what it reads."""
        read = self.reads(step)
        found = (
            other.name
            for other in self.steps.values()
            if other is not step and any(_overlap(mine, theirs) for mine in read for theirs in self.writes(other))
        )
        return list(dict.fromkeys([*step.needs, *found]))

    def with_needed(self, names: Iterable[str]) -> list[str]:
        """Return steps and all that they need, in the order of the file.

        Raises:
            ConfigError: a name is no step.
        """
        waiting, chosen = list(names), set()
        if unknown := [name for name in waiting if name not in self.steps]:
            raise ConfigError(f"{self.path}: expected some of the steps {', '.join(self.steps)}, got {unknown[0]!r}")
        while waiting:
            name = waiting.pop()
            if name not in chosen:
                chosen.add(name)
                waiting += self.needs(self.steps[name])
        return [name for name in self.steps if name in chosen]

    def sorter(self, names: Iterable[str] | None = None) -> "TopologicalSorter[str]":
        """Return the order of steps."""
        chosen = self.steps if names is None else names
        return TopologicalSorter({name: self.needs(self.steps[name]) for name in chosen})

    def where(self, step: Step) -> str | None:
        """Return the folder or the URL that ``env`` of a step means; None for the environment of this process."""
        if step.env is None:
            return None
        value = self.settings.environments.get(step.env, step.env)
        return value if is_url(value) else self.place(value)

    def variables(self, step: Step) -> Mapping[str, str]:
        """Return the environment variables that the file gives a step."""
        return {name: str(value) for name, value in (self.settings.variables | step.variables).items()}

    def known_variables(self, step: Step) -> Mapping[str, str]:
        """Return the same for a record: of a token, a key or a password only a digest."""
        return {name: digest_of(value) if is_secret(name) else value for name, value in self.variables(step).items()}


def load_chain(path: str | Path) -> Chain:
    """Return the chain of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong.
    """
    return Chain(Path(path), load_config(ChainSettings, path, {}))


def digest_of(value: str) -> str:
    """Return the sha256 (hex) of a value that no record may hold."""
    return hashlib.sha256(value.encode()).hexdigest()


def is_url(text: str) -> bool:
    """Return whether an environment is a server."""
    return _URL.match(text) is not None


def _split(command: str | list[str]) -> list[str]:
    return list(_Words(command)) if isinstance(command, str) else command


class _Words(shlex.shlex):
    """The words of a command. As in a shell, ``#`` begins a comment only where a word would begin."""

    def __init__(self, command: str) -> None:
        super().__init__(command, posix=True, punctuation_chars=False)
        self.whitespace_split = True

    @property
    def commenters(self) -> str:  # type: ignore[override]
        return "#" if self.state == " " else ""  # type: ignore[attr-defined]

    @commenters.setter
    def commenters(self, value: str) -> None:
        """What the base class sets stays unused."""


def check_variables(variables: dict[str, str | int | float]) -> dict[str, str | int | float]:
    """Return environment variables if a program can get them.

    Raises:
        ValueError: a name or a value is of no variable.
    """
    for name, value in variables.items():
        if not VARIABLE.fullmatch(name) or "\0" in str(value):
            raise ValueError(f"expected names of letters, digits and underscores, and values without NUL, got {name!r}")
    return variables


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _overlap(one: str, other: str) -> bool:
    return _inside(one, other) or _inside(other, one)
