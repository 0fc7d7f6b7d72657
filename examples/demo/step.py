"""One step of the demonstration that is no command of the tools, in the folder of its chain.

``step.py data | model NAME | measure-world | measure SEED | results``
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "lab"))

from fusion_demo.chain import MODELS
from fusion_lab import world
from fusion_lab.world import Lab

#: texts and problems that every training of a seed has: an amount of lab/sizes.yml
AMOUNT = "some"


def main() -> None:
    """Run the step that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("data", help="texts, problems and prompts").add_argument("--seeds", type=int, required=True)
    steps.add_parser("model", help="train a source or the target").add_argument("name", choices=world.MODELS)
    steps.add_parser("measure-world", help="measure the sources and the target, and check them")
    steps.add_parser("measure", help="measure all models of a seed").add_argument("seed", type=int)
    steps.add_parser("results", help="tables and plot")
    arguments = parser.parse_args()
    folder = Path.cwd()
    lab = Lab(folder.name, folder.parent)
    if arguments.step == "data":
        write_data(lab, arguments.seeds)
    elif arguments.step == "model":
        print(f"last loss: {world.train_model(lab, arguments.name):.4f} nats per token")
    elif arguments.step == "measure-world":
        write_scores("world", {name: measured(lab, name, lab.model(name)) for name in world.MODELS})
    elif arguments.step == "measure":
        folders = {name: lab.folder / "models" / f"{name}-{arguments.seed}" for name in MODELS}
        write_scores(str(arguments.seed), {name: measured(lab, name, path) for name, path in folders.items()})
    else:
        from fusion_demo.results import write_results

        write_results(folder)


def write_data(lab: Lab, seeds: int) -> None:
    """Write the rows of all splits, and for every seed a corpus and the problems that the sources answer."""
    from fusion_lab.recipes.answers import block, prompts

    print(world.write_data(lab)[0])
    for seed in range(seeds):
        world.write_corpus(lab, lab.folder / "corpus" / str(seed), AMOUNT, seed)
        world.write_rows(lab.folder / "prompts" / f"{seed}.jsonl", prompts(block(lab, seed)))


def measured(lab: Lab, name: str, folder: Path) -> dict[str, float]:
    """Measure a model on the held-out texts and problems; a model of the world must be what its name says."""
    figures = world.measure_model(lab, folder)
    print(name, figures, flush=True)
    if name in world.MODELS:
        world.check_model(lab, name, figures["chains"])
    return figures


def write_scores(name: str, scores: dict[str, Any]) -> None:
    """Write the figures of some models to ``scores/NAME.json``."""
    Path("scores").mkdir(exist_ok=True)
    Path("scores", f"{name}.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
