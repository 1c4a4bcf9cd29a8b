"""Questions of the demo in the forms that benchmark kits read, and our verdicts on their answers.

    python -m tests_stacks.digits write FOLDER COUNT
    python -m tests_stacks.digits judge ANSWERS.json

Runs in r1v3's own environment. The tests of kits call it from theirs.
"""

import json
import sys
from pathlib import Path

from r1v3.data.builders import questions
from r1v3.data.schema import write_samples
from r1v3.suite import kit, rules
from r1v3.suite.benchmarks.digits import rows_of, write_table
from r1v3.suite.question import Question, Response

DOMAINS = ("comparison", "ordering")
TASK = """\
task: digits
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function task.pictures
doc_to_text: !function task.prompt
doc_to_target: answer
process_results: !function task.grade
generation_kwargs: {{max_new_tokens: 48, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
TASK_CODE = '''\
"""The functions of the task: what is shown, asked and counted."""

import base64
import io
import re

from PIL import Image


def pictures(row):
    return [Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")]


def prompt(row, lmms_eval_specific_kwargs=None):
    lines = [row["question"], *(f"{a}. {b}" for a, b in zip("ABCDEF", row["options"]))]
    return "\\n".join(lines)


def grade(row, results):
    boxes = re.findall(r"\\\\boxed\\{([A-F])\\}", results[0])
    return {"acc": float(bool(boxes) and boxes[-1] == row["answer"])}
'''


def write(folder: Path, count: int) -> None:
    """Write MMStar.tsv of VLMEvalKit, digits_val.jsonl of evalscope and a task of lmms-eval.

    samples.parquet has the same questions for r1v3's stages.
    """
    samples = questions("test", DOMAINS, count, 0)
    table = [
        {**row, "category": "digits", "l2_category": row["category"]} for row in rows_of(samples)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / "samples.parquet", samples)
    write_table(folder / "MMStar.tsv", table)
    rows = [
        (row["question"], sample.options or [], row["answer"], row["image"])
        for row, sample in zip(table, samples, strict=True)
    ]
    with (folder / "digits_val.jsonl").open("w", encoding="utf-8") as file:
        for question, options, answer, picture in rows:
            image = f"data:image/png;base64,{picture}"
            row = {"question": f"<image 1>{question}", "options": options, "answer": answer}
            file.write(json.dumps({**row, "image_1": image}) + "\n")
    with (folder / "digits.jsonl").open("w", encoding="utf-8") as file:
        for question, options, answer, picture in rows:
            row = {"question": question, "options": options, "answer": answer, "image": picture}
            file.write(json.dumps(row) + "\n")
    task = TASK.format(data=json.dumps(str(folder / "digits.jsonl")))
    (folder / "task").mkdir(exist_ok=True)
    (folder / "task" / "digits.yaml").write_text(task)
    (folder / "task" / "task.py").write_text(TASK_CODE)


def judge(path: Path) -> list[dict[str, bool | None]]:
    """Return the verdicts of the report's protocol and of the kit's on each answer of a file."""
    verdicts = []
    for one in json.loads(path.read_text(encoding="utf-8")):
        question = Question("", "", (), "", gold=one["answer"], options=tuple(one["options"]))
        response = Response(one["text"], thinking=False)
        report = rules.answer_rule(question, response)
        verdicts.append({"report": report, "kit": kit.choice_rule(question, response)})
    return verdicts


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        print(json.dumps(judge(Path(sys.argv[2]))))
