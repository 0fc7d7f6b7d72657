"""Every feature of axolotl in the table of docs/features.md does what the table says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import axolotl_features
import pytest
import torch
from axolotl_features import FEATURES, Feature, key_named, pairs, table
from axolotl_runs import ENVIRONMENT, config, write_config

from fusion_plugins.errors import ConfigError

ROOT = Path(__file__).parents[2]
REFUSED = [
    feature for features in FEATURES.values() for feature in features if feature.verdict == "refused" and feature.keys
]
OWN = [feature for features in FEATURES.values() for feature in features if feature.verdict == "tested"]


def by_name(feature: Feature) -> str:
    return feature.name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Feature -> what its two runs logged."""
    folder = tmp_path_factory.mktemp("features")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    ended = subprocess.run(
        [sys.executable, str(Path(axolotl_features.__file__).with_name("feature_runs.py")), str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, dict] = {}
    for row in map(json.loads, ended.stdout.splitlines()):
        found.setdefault(row["name"], {})[row["kind"]] = row["logged"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("feature", [Feature("nothing", {}), *pairs()], ids=by_name)
def test_a_run_with_the_plugin_equals_one_without(trained, feature):
    plain, fused = trained[feature.name]["plain"], trained[feature.name]["fused"]
    if feature.verdict == "host" or (feature.verdict == "gpu" and not torch.cuda.is_available()):
        assert isinstance(plain, str), "it runs after all: the table should say more"
        assert isinstance(fused, str)
        assert fused.split(":")[0] == plain.split(":")[0]
        return
    assert not isinstance(plain, str), plain
    assert not isinstance(fused, str), fused
    assert len(plain["loss"]) >= 2
    assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert fused["grad_norm"] == pytest.approx(plain["grad_norm"], rel=feature.norms)
    assert fused["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert len(fused["fusion_loss"]) == len(fused["loss"]), "the fusion loss is logged at every step"


@pytest.mark.parametrize("feature", REFUSED, ids=by_name)
def test_what_cannot_be_combined_is_refused_by_name(material, run_folder, feature):
    from axolotl.cli.config import load_cfg
    from axolotl_runs import PLUGIN, forget_plugins

    settings = {**feature.keys, **feature.besides}
    if "datasets" in settings:
        settings["datasets"] = [
            {"path": str(material.texts), "type": "fusion_plugins.axolotl.fused"},
            {"path": str(material.chats), "type": "chat_template"},
        ]
    settings["plugins"] = [PLUGIN if name == "FUSION" else name for name in settings.get("plugins", ["FUSION"])]
    forget_plugins()
    with pytest.raises(ConfigError) as refusal:
        load_cfg(str(write_config(config(material, run_folder, **settings), run_folder)))
    assert key_named(feature, str(refusal.value)) or "chat_template" in str(refusal.value)


@pytest.mark.parametrize("feature", OWN, ids=by_name)
def test_a_feature_that_is_tested_elsewhere_names_a_test_that_exists(feature):
    file, _, name = feature.test.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text() if name else (ROOT / file).is_file()


def test_the_tables_of_the_documents_are_made_from_the_features():
    assert table() in (ROOT / "docs" / "features.md").read_text()
