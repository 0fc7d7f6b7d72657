"""One step of the demonstration, in the work folder: ``step.py data|tokenizers|pretrain|evaluate [MODEL ...]``."""

import argparse
import json
from pathlib import Path

from fusion_demo.settings import SIZES


def main() -> None:
    """Run the step that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("data", "tokenizers", "pretrain", "evaluate"))
    parser.add_argument("models", nargs="*", help="names of the models, for pretrain and evaluate")
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    arguments = parser.parse_args()
    settings = SIZES[arguments.size]
    data, tokenizers, models = Path("data"), Path("tokenizers"), Path("models")
    if arguments.step == "data":
        from fusion_demo.data import write_data

        print(write_data(data, settings))
    elif arguments.step == "tokenizers":
        from fusion_demo.vocabularies import train_all_tokenizers

        train_all_tokenizers(data, tokenizers)
    elif arguments.step == "pretrain":
        from fusion_demo.pretrain import pretrain

        for name in arguments.models:
            pretrain(name, data, tokenizers, models / name, settings)
    else:
        from fusion_demo.evaluate import evaluate

        Path("scores").mkdir(exist_ok=True)
        for name in arguments.models:
            scores = evaluate(models / name, data)
            Path("scores", f"{name}.json").write_text(json.dumps(scores, indent=1))
            print(name, scores)


if __name__ == "__main__":
    main()
