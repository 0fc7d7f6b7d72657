"""One step of the demonstration, in the work folder: ``step.py data|tokenizers|pretrain|evaluate --size SIZE ...``."""

import argparse
import json
from pathlib import Path

from fusion_demo.settings import SIZES


def main() -> None:
    """Run the step that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("data", "tokenizers", "pretrain", "evaluate"))
    parser.add_argument("name", nargs="?", help="of the model")
    parser.add_argument("folder", nargs="?", type=Path, help="of the model to evaluate")
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    arguments = parser.parse_args()
    settings = SIZES[arguments.size]
    data, tokenizers, models = Path("data"), Path("tokenizers"), Path("models")
    if arguments.step == "data":
        from fusion_demo.data import write_data

        print(write_data(data, settings))
    elif arguments.step == "tokenizers":
        from fusion_demo.pretrain import train_all_tokenizers

        train_all_tokenizers(data, tokenizers)
    elif arguments.step == "pretrain":
        from fusion_demo.pretrain import pretrain

        pretrain(arguments.name, data, tokenizers, models / arguments.name, settings)
    else:
        from fusion_demo.evaluate import evaluate

        Path("scores").mkdir(exist_ok=True)
        scores = evaluate(arguments.folder, data)
        Path("scores", f"{arguments.name}.json").write_text(json.dumps(scores, indent=1))
        print(scores)


if __name__ == "__main__":
    main()
