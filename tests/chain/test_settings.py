"""The file of `fusion run`: what is refused, and what follows from what."""

import pytest
import yaml

from fusion_plugins.chain.settings import load_chain
from fusion_plugins.errors import ConfigError


@pytest.fixture
def chain(tmp_path):
    def made(*steps, **keys):
        path = tmp_path / "fusion.yml"
        path.write_text(yaml.safe_dump({"steps": list(steps), **keys}))
        return load_chain(path)

    return made


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "steps: "),
        ([{"name": "a"}], "steps.0.command: missing"),
        ([{"name": "a/b", "command": "x"}], "expected letters, digits"),
        ([{"name": "../a", "command": "x"}], "expected letters, digits"),
        ([{"name": "a", "command": "   "}], "expected a program"),
        ([{"name": "a", "command": []}], "expected a program"),
        ([{"name": "a", "command": "x | y"}], "a step has no shell, so '|' would be an argument"),
        ([{"name": "a", "command": "x && y"}], "bash -c"),
        ([{"name": "a", "command": "x > y"}], "bash -c"),
        ([{"name": "a", "command": ["x", "a\0b"]}], "NUL"),
        ([{"name": "a", "command": "x", "variables": {"A; rm -r .": "1"}}], "'A; rm -r .'"),
        ([{"name": "a", "command": "x", "variables": {"A=B": "1"}}], "'A=B'"),
        ([{"name": "a", "command": "x"}, {"name": "a", "command": "y"}], "a twice"),
        ([{"name": "a", "command": "x", "needs": ["b"]}], "step a needs b, which is no step"),
        ([{"name": "a", "command": "x", "wants": ["b"]}], "unknown key"),
        ([{"name": "a", "command": "x", "on_change": "remove"}], "on_change"),
        ([{"name": "a", "command": "x", "needs": ["b"]}, {"name": "b", "command": "x", "needs": ["a"]}], "a circle"),
        (
            [{"name": "a", "command": "x", "reads": ["q"], "writes": ["p"]}]
            + [{"name": "b", "command": "x", "reads": ["p/in"], "writes": ["q"]}],
            "a circle: ",
        ),
        ([{"name": "a", "command": "x", "writes": ["d"]}, {"name": "b", "command": "x", "writes": ["d/e"]}], "own"),
        ([{"name": "a", "command": "x", "writes": ["d"]}, {"name": "b", "command": "x", "stdout": "./d"}], "own"),
        ([{"name": "a", "command": "x", "writes": ["."]}], "writes the folder of the chain"),
        ([{"name": "a", "command": "x", "writes": [".."]}], "writes the folder of the chain"),
        ([{"name": "a", "command": "x", "reads": ["d"], "writes": ["d/out"]}], "never be up to date"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(steps, said, chain):
    with pytest.raises(ConfigError) as refused:
        chain(*steps)
    assert said in str(refused.value)


def test_a_quoted_operator_is_an_argument(chain):
    (step,) = chain({"name": "a", "command": "bash -c 'x | y > z'"}).steps.values()
    assert step.words == ["bash", "-c", "x | y > z"]


def test_a_comment_begins_only_where_a_word_would(chain):
    (step,) = chain({"name": "a", "command": "x --name run#3 '# y' --lr 1  # not this\n--more"}).steps.values()
    assert step.words == ["x", "--name", "run#3", "# y", "--lr", "1", "--more"]


def test_a_configuration_behind_the_name_of_its_option_is_read(chain, tmp_path):
    (tmp_path / "a.yml").write_text("x: 1")
    found = chain(
        {"name": "a", "command": "fusion capture --config=a.yml --out=made ~nobody/x", "writes": ["made"]},
        {"name": "b", "command": "other --data=made/x"},
    )
    assert found.reads(found.steps["a"]) == [str(tmp_path / "a.yml")]
    assert found.needs(found.steps["b"]) == ["a"]


def test_what_is_above_a_folder_is_what_its_programs_see_there(tmp_path):
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    (tmp_path / "runs" / "fusion.yml").write_text(yaml.safe_dump({"steps": [{"name": "a", "command": "x"}]}))
    assert load_chain(tmp_path / "runs" / "fusion.yml").place("../b") == str(tmp_path / "disk" / "b")


def test_steps_wait_for_what_they_read(chain):
    made = chain(
        {"name": "measure", "command": "measure models/a"},
        {"name": "score", "command": "score", "reads": ["data/responses/part"], "writes": ["scored"]},
        {"name": "train", "command": "train", "reads": ["./scored/"], "writes": ["models/a"]},
        {"name": "sample", "command": ["sample"], "writes": ["data/responses"]},
        {"name": "other", "command": "other models", "needs": ["sample"]},
    )
    needs = {name: made.needs(step) for name, step in made.steps.items()}
    assert needs == {
        "sample": [],
        "score": ["sample"],
        "train": ["score"],
        "measure": ["train"],
        "other": ["sample"],
    }
    assert list(made.sorter().static_order()).index("measure") > 2
    assert made.with_needed(["train"]) == ["score", "train", "sample"]
    with pytest.raises(ConfigError, match="got 'no'"):
        made.with_needed(["no"])


def test_configurations_in_a_command_are_read_and_outputs_are_not(chain, tmp_path):
    for name in ("train.yml", "make.py", "made.yml", "text.txt"):
        (tmp_path / name).write_text("x")
    made = chain({"name": "a", "command": "run make.py train.yml text.txt --out made.yml", "writes": ["made.yml"]})
    assert made.reads(made.steps["a"]) == [str(tmp_path / "make.py"), str(tmp_path / "train.yml")]


def test_only_commands_of_fusion_sort_out_what_they_wrote_before(chain):
    made = chain(
        {"name": "capture", "command": "fusion capture -c c.yml"},
        {"name": "train", "command": "axolotl train t.yml"},
        {"name": "moved", "command": "fusion cut", "on_change": "move"},
        {"name": "kept", "command": "python x.py", "on_change": "keep"},
    )
    assert [step.keeps for step in made.steps.values()] == [True, False, False, True]


def test_an_environment_has_a_name_a_folder_or_a_url(chain, tmp_path):
    made = chain(
        {"name": "a", "command": "x", "env": "vllm"},
        {"name": "b", "command": "x", "env": "../other"},
        {"name": "c", "command": "x", "env": "served"},
        {"name": "d", "command": "x"},
        environments={"vllm": ".venv-vllm", "served": "http://host:1/v1"},
    )
    places = [made.where(step) for step in made.steps.values()]
    assert places == [str(tmp_path / ".venv-vllm"), str(tmp_path.parent / "other"), "http://host:1/v1", None]
