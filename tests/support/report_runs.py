"""A small run for `fusion report`: its folders as the commands leave them, with names and texts that are hostile."""

import json

import yaml
from scored_rows import COLUMNS, write
from store_contents import make_store

HOSTILE = "</pre></td></svg><script>alert(1)</script>]]>\x1b[2J{{ 7 * 7 }}$x$\u202e"
#: what a page shows of it
SHOWN = "&lt;/pre&gt;&lt;/td&gt;&lt;/svg&gt;&lt;script&gt;alert(1)&lt;/script&gt;]]&gt;\\x1b[2J{{ 7 * 7 }}$x$\\u202e"
SOURCE = {"positions": 200, "exact": 900, "edited": 90, "unmapped": 10, "unaligned": 30, "left_out": 4, "low_mass": 2}
FUSED = {
    "texts": 40,
    "positions": 200,
    "fused_positions": 150,
    "chosen": {HOSTILE: 30, "b": 10},
    "sources": {HOSTILE: SOURCE, "b": SOURCE | {"positions": 100}},
    "shares": {HOSTILE: {"coverage": 0.83, "mass_kept": 0.7}, "b": {"coverage": 0.41, "mass_kept": 0.61}},
    "taught": {"math": {HOSTILE: 90, "b": 30}, HOSTILE: {"b": 30, "no source": 50}},
    "unusable": [{"row": HOSTILE, "reason": HOSTILE}],
    "missing_from_stores": [],
    "longer_than_sequence_len": 3,
    "sources_left_out": {"b": 7},
}
HISTORY = [
    {
        **{"step": step, "loss": 3.0 - step / 10, "lm_loss": 3.5 - step / 10, "fusion_loss": 2.125 - step / 10},
        **{"fusion_coverage": 0.75, "kept_mass": 0.7, f"share_{HOSTILE}": 0.6, "share_b": 0.4},
    }
    for step in range(1, 11)
]
RECORD = {
    "version": 1,
    "base_model": "../nowhere",
    "adapter": None,
    "versions": {"fusion-plugins": "1.2.3", "torch": HOSTILE},
    "config": {"learning_rate": 0.125, "note": HOSTILE, "hub_token": "hf_secret"},
    "examples": [
        {
            **{"row": 7, "of_tokens": 900, "ids": [1, 2, 3, 5, 4], "tokens": ["<s>", HOSTILE, " two", " six", "\n"]},
            "supervised": [True, True, True, True, False],
            "sources": [None, HOSTILE, "(several sources)", "(the label)", "b"],
        }
    ],
    "log_history": HISTORY,
}
PAIRS = {
    "pairs": 12,
    "prompts": 20,
    "kept": 12,
    "dropped_prompts": {HOSTILE: 8},
    "dropped_responses": {},
    "dropped_pairs": {"gap_too_small": 5},
    "limits": [0.01, 0.1],
    "lengths": {f"math/{HOSTILE}/chosen": {"count": 12, "mean": 31.5, "median": 30}},
    "warnings": [HOSTILE],
    "unusable": [],
    "longer_than_sequence_len": ["p1"],
}
SFT = {
    "answers": 33,
    "prompts": 40,
    "kept": 33,
    "by_source": {HOSTILE: 30, "b": 3},
    "dropped_prompts": {"unsolved": 7},
    "dropped_responses": {},
    "split": {"sft": 20, "dpo": 13, "dropped": {}},
    "unusable": [],
    "longer_than_sequence_len": [],
}
DOCTOR = {"sources": [{"diagnosis": {"name": HOSTILE}, "verdict": "good", "advice": [HOSTILE]}]}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def trained(folder, **files):
    """A trained model's reports, by the ends of their names."""
    for name, content in files.items():
        write_json(folder / f"fusion_{name}.json", content)
    return folder


def scored_rows(count=6):
    """Scored responses of two sources to prompts of two domains."""
    return [
        {
            **{"prompt_id": f"p{prompt}", "source": source, "index": index, "prompt": HOSTILE},
            **{"response": f"{HOSTILE} {prompt} {index}", "domain": ("math", HOSTILE)[prompt % 2], "reference": "1"},
            **{"reward": 0.5 * index, "correct": index == 0},
            "scores": {"math": {"correct": index == 0, "answer": HOSTILE, "gold": "1", "reason": None}},
        }
        for prompt in range(count)
        for source in ("a", HOSTILE)
        for index in range(2)
    ]


def make_run(folder):
    """A run of every kind of folder but a merged model; three of its steps have not been run."""
    texts = folder / "texts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"text-{n:04d}", "text": "x", "domain": (HOSTILE, "math")[n % 2]} for n in range(30)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_store(folder / "stores" / "a", range(12), model=HOSTILE, provenance={"texts": "texts.jsonl"})
    make_store(folder / "stores" / "b", range(4), finish=False, provenance={"texts": "texts.jsonl"})
    make_store(folder / "00" / "held_out", range(12), model="before")
    make_store(folder / "01" / "held_out", range(12), model="after")
    columns = {name: kind for name, kind in COLUMNS.items() if name not in ("reward", "correct", "scores")}
    write(folder / "responses", scored_rows(), columns, stage="responses")
    write(folder / "scored", scored_rows())
    trained(folder / "fused", report={"texts.jsonl": FUSED}, training=RECORD)
    trained(folder / "dpo", pairs=PAIRS, sft={"one": SFT, "two": SFT}, training=RECORD | {"log_history": []})
    write_json(folder / "doctor" / "doctor.json", DOCTOR)
    write_json(folder / "measured.json", {"accuracy": 0.625, "name": HOSTILE, HOSTILE: 3})
    outputs = {
        **{"capture-a": "stores/a", "capture-b": "stores/b", "00-measure": "00/held_out", "01-measure": "01/held_out"},
        **{"sample": "responses", "score": "scored", "train": "fused", "prefer": "dpo", "doctor": "doctor"},
        **{"merge": "merged", "plain": "nothing.txt"},
    }
    steps = [{"name": name, "command": f"do {name}", "writes": [path]} for name, path in outputs.items()]
    steps.append(
        {
            "name": "measure",
            "command": ["say", HOSTILE, "--api-key", "sk-1", "--set", "options={api_key: sk-4}"],
            "stdout": "measured.json",
        }
    )
    steps[0]["variables"] = {"HF_TOKEN": "hf_secret"}
    steps[0]["command"] = "do capture.yml"
    (folder / "capture.yml").write_text(
        yaml.safe_dump({"texts": HOSTILE, "options": {"api_key": "sk-2"}, "command": "x --api-key sk-3"})
    )
    (folder / "fusion.yml").write_text(yaml.safe_dump({"steps": steps}))
    for name in [*outputs][:-2]:
        words = ["do", "capture.yml" if name == "capture-a" else name]
        record = {"done": name != "prefer", "command": words, "variables": {}, "inputs": {}, "seconds": 61.0}
        write_json(folder / ".fusion_run" / "fusion" / f"{name}.json", record)
    return folder
