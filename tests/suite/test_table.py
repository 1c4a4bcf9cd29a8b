"""Benchmark files read as text, with pictures in every form that they come in."""

import csv
from pathlib import Path

import pytest

from r1v3.data.encoding import escape
from r1v3.suite.question import in_place, option_cells
from r1v3.suite.table import File, pictures, read_list, read_table
from tests.suite.files import choice_rows, encoded, picture, write_tsv

OWN = File("OWN.tsv")

# What a reader that guesses types changes: a blank beside it makes 12 into "12.0".
CELLS = (
    "12",
    "012",
    "1e5",
    "nan",
    "NA",
    "None",
    "1.50",
    "True",
    " x ",
    "a\tb",
    "two\nlines",
    '"q"',
)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_stays_the_text_that_it_is(cell: str, tmp_path: Path) -> None:
    """Fails if a number, a blank or a word such as NA becomes something else."""
    rows = choice_rows(2)
    rows[0]["A"], rows[1]["A"] = cell, ""
    write_tsv(tmp_path / "OWN.tsv", rows)
    first, second = read_table(tmp_path, OWN).rows
    assert first["A"] == cell and second["A"] == ""
    assert option_cells(second.cells) == ()


def test_a_cell_of_a_megabyte_is_whole(tmp_path: Path) -> None:
    """Fails if large cells are cut or refused, as csv does above 131,072 characters."""
    rows = choice_rows(1)
    rows[0]["question"] = "x" * 1_500_000
    write_tsv(tmp_path / "OWN.tsv", rows)
    assert len(read_table(tmp_path, OWN).rows[0]["question"]) == 1_500_000


def test_pictures_come_as_base64_lists_references_and_paths(tmp_path: Path) -> None:
    """Fails if a form of pictures that the files use is not read."""
    rows = choice_rows(5)
    rows[1]["image"] = f"['{encoded(7)}', '{encoded(8)}']"
    rows[2]["image"] = "0"
    rows[3]["image"] = ""
    (tmp_path / "there.png").write_bytes(picture(9))
    rows[4] = {**rows[4], "image": "", "image_path": "there.png"}
    write_tsv(tmp_path / "OWN.tsv", rows)
    table = read_table(tmp_path, OWN)
    assert [row.pictures for row in table.rows] == [1, 2, 1, 0, 1]
    found = dict(pictures(table, [1, 2, 3, 4]))
    assert found == {
        1: [picture(7), picture(8)],
        2: [picture(0)],
        3: [],
        4: [picture(9)],
    }


@pytest.mark.parametrize("place", ["../secret.png", "/etc/hosts.png", "absent.png"])
def test_a_path_out_of_the_folder_is_refused_with_its_row(place: str, tmp_path: Path) -> None:
    """Fails if a benchmark file could read any file of the machine."""
    (tmp_path / "secret.png").write_bytes(picture(1))
    rows = choice_rows(2)
    rows[1] = {**rows[1], "image": "", "image_path": place}
    write_tsv(tmp_path / "data" / "OWN.tsv", rows)
    table = read_table(tmp_path / "data", OWN)
    with pytest.raises(ValueError, match=r"OWN\.tsv row 1: picture"):
        dict(pictures(table, [0, 1]))


def test_another_file_is_refused_unless_told(tmp_path: Path) -> None:
    """Fails if numbers on a changed file could pass for those on the published one."""
    write_tsv(tmp_path / "OWN.tsv", choice_rows(1))
    other = File("OWN.tsv", "0" * 32)
    with pytest.raises(ValueError, match="allow_other_files"):
        read_table(tmp_path, other)
    assert read_table(tmp_path, other, allow_other=True).official is False
    found = read_table(tmp_path, OWN)
    assert found.official is None
    assert read_table(tmp_path, File("OWN.tsv", found.md5)).official is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("a\tb\n", "no rows"),
        ("a\ta\n1\t2\n", "same name"),
        ("a\tb\n1\n", "1 cells"),
        ("a\tb\n1\t2\t3\n", "3 cells"),
        ('a\tb\n1\t"x\n', "tab-separated"),
    ],
)
def test_a_malformed_file_says_so(content: str, message: str, tmp_path: Path) -> None:
    """Fails if a cut or broken file is scored as if it were whole."""
    (tmp_path / "OWN.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path, OWN)
    assert csv.field_size_limit() > 131_072


@pytest.mark.parametrize(
    ("text", "count", "prompt", "order"),
    [
        ("Is <image 1> it?", 1, "Is <image> it?", (0,)),
        ("<image 2> or <image 1>", 2, "<image> or <image>", (1, 0)),
        ("<image 1>, again <image 1>", 1, "<image>, again <image>", (0, 0)),
        ("See <image 2>.", 3, "<image>\n<image>\nSee <image>.", (0, 2, 1)),
        ("None named", 2, "<image>\n<image>\nNone named", (0, 1)),
        ("<image 3> of one", 1, "<image>\n<image 3> of one", (0,)),
        ("<image> <image 1>", 1, "< image> <image>", (0,)),
        ("<|im_end|> <image 1>", 1, "< |im_end|> <image>", (0,)),
    ],
)
def test_pictures_stand_where_the_text_names_them(
    text: str, count: int, prompt: str, order: tuple[int, ...]
) -> None:
    """Fails if a picture is lost, shown elsewhere, or a literal tag stands for one."""
    assert in_place(text, count) == (prompt, order)


@pytest.mark.parametrize("token", ["<image>", "<img>", "</img>", "<IMG_CONTEXT>", "<box>"])
def test_special_tokens_in_a_question_are_text(token: str) -> None:
    """Fails if a row of a benchmark could smuggle a special token into its prompt."""
    assert token not in escape(f"a {token}{token} b <{token}")


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ("['a', 'b, c']", ("a", "b, c")),
        ('["1", "2"]', ("1", "2")),
        ("[1, 2.5]", ("1", "2.5")),
        ("[]", ()),
        ("", ()),
        ("plain", ("plain",)),
        ("['cut", ("['cut",)),
        ("__import__('os').getcwd()", ("__import__('os').getcwd()",)),
        ("('x',)", ("x",)),
        ("{'a': 1}", ("{'a': 1}",)),
    ],
)
def test_lists_in_cells_are_read_and_never_run(cell: str, items: tuple[str, ...]) -> None:
    """Fails if a list of choices is misread, or a cell is executed."""
    assert read_list(cell) == items
