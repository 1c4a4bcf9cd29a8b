"""The demo's cold start under the pipeline's own verdicts and filters."""

from r1v3.config import Distill, load
from r1v3.data.builders import cold_start
from r1v3.data.chains import TeacherConfig
from r1v3.distill.chain import read_chain
from r1v3.distill.grade import caught, verdict
from r1v3.distill.questions import light


def test_the_demos_rows_pass_as_they_are() -> None:
    """Fails if the demo trains on a chain that the pipeline would drop or write otherwise."""
    config = load(Distill, "configs/distill/demo.yaml")
    rows = cold_start("train", 60, 3, TeacherConfig()).samples
    for row in rows:
        chain = read_chain({"reasoning": None, "content": row.response, "finish": "stop"})
        question = light("q", row)
        right = verdict(question, chain)
        assert right is True and caught(chain, question, right, config) == [], row.response
        assert chain.response == row.response
