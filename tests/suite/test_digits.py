"""The demo's questions in the kit's columns: asked and graded by the suite as by the demo."""

from pathlib import Path

from r1v3.data.builders import questions
from r1v3.data.tasks import IN_DOMAIN, OUT_OF_DOMAIN
from r1v3.rewards import score
from r1v3.suite.benchmarks.digits import BENCHMARK, rows_of, write_table
from r1v3.suite.question import Response
from r1v3.suite.table import pictures, read_table


def test_a_question_is_asked_and_graded_as_in_the_demo(tmp_path: Path) -> None:
    """Fails if the suite asks the demo's questions in other words, shows another picture, or
    counts an answer otherwise than the demo's evaluation."""
    samples = questions("test", (*IN_DOMAIN, *OUT_OF_DOMAIN), 16, 0)
    write_table(tmp_path / BENCHMARK.files[0].name, rows_of(samples))
    table = read_table(tmp_path, BENCHMARK.files[0])
    asked = [BENCHMARK.question(row, i) for i, row in enumerate(table.rows)]
    shown = dict(pictures(table, range(16)))
    for i, (question, sample) in enumerate(zip(asked, samples, strict=True)):
        assert question is not None and shown[i] == sample.images
        assert question.prompt == sample.prompt[0]["content"]
        assert question.options == tuple(sample.options or ())
        said = [sample.ground_truth, "A", "B", "7", "12", *(sample.options or ())]
        texts = [f"Look. \\boxed{{C}}?\n</think>\n\nSo \\boxed{{{answer}}}." for answer in said]
        texts += [f"It is \\boxed{{{sample.ground_truth}}}", "I cannot tell.\n</think>\n\nNothing."]
        rewards = score(texts, [sample] * len(texts), thinking=True)
        verdicts = [BENCHMARK.rule(question, Response(text, True)) for text in texts]
        assert [one.rule == 1 for one in rewards] == [one is True for one in verdicts]
        assert verdicts[0] is True and False in verdicts
