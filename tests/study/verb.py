"""Stands for `python -m r1v3 VERB FILE` in the tests of the runner: leaves what a stage leaves.

It notes its start and end in `calls` of the working folder. A stage whose configuration has
`max_length: 13` fails; with `max_length: 99` it waits until the file `go` is there.
"""

import json
import sys
import time
from pathlib import Path

import yaml

_, _, module, verb, file, *flags = sys.argv[:1] + ["-m", *sys.argv[2:]]
config = yaml.safe_load(Path(file).read_text())
run = Path(config["run"])


def note(word: str) -> None:
    with Path("calls").open("a") as calls:
        calls.write(f"{word} {verb} {' '.join(flags)}".rstrip() + "\n")


(run / "config").mkdir(parents=True, exist_ok=True)
(run / "config" / f"{verb}.yaml").write_text("{}")
note("start")
if config.get("max_length") == 13:
    print("warming up\nerror: thirteen is too long")
    sys.exit(1)
while config.get("max_length") == 99 and not Path("go").exists():
    time.sleep(0.02)
if verb == "data":
    names = [key for key in ("grpo", "test_in_domain") if config[key]]
    (run / "data").mkdir()
    for name in names:
        (run / "data" / f"{name}.parquet").write_text("")
    (run / "data" / "statistics.json").write_text(json.dumps(dict.fromkeys(names, {})))
elif verb == "eval":
    (run / "evaluation").mkdir()
    modes = dict.fromkeys(config["modes"], {"correct": [[0, 1]], "tokens": [[3, 4]]})
    facts = {"domain": ["sums"], "difficulty": [None]}
    record = {"answers": modes, "questions": facts}
    (run / "evaluation" / f"{config['name']}.json").write_text(json.dumps(record))
else:
    (run / "models" / verb).mkdir(parents=True)
    (run / "config" / f"{verb}.record.json").write_text(json.dumps({"trained": 1}))
note("end")
