"""Truth tables: responses as a model writes them, with the verdict that they deserve.

T is right, F is wrong, N is no verdict: a rule must not guess.
"""

from r1v3.suite.question import Question

T, F, N = True, False, None
Truth = tuple[str, bool | None]
THOUGHT = "Let me see. Wait, \\boxed{A}? No.\n</think>\n\n"


def question(gold: str, *options: str, **cells: str) -> Question:
    return Question("1", "", (), "Which one?", gold, options, cells=cells)


# Options: 12 cm, 14 cm, 16 cm, none of these. The right one is B.
LENGTHS = ("12 cm", "14 cm", "16 cm", "none of these")
CHOICES: tuple[Truth, ...] = (
    ("\\boxed{B}", T),
    ("\\boxed{(B)}", T),
    ("\\boxed{B. 14 cm}", T),
    ("\\boxed{14 cm}", T),
    ("\\boxed{14}", T),
    ("\\boxed{\\text{B}}", T),
    ("\\boxed{option B}", T),
    ("\\boxed{A}", F),
    ("\\boxed{A. 12 cm}", F),
    ("\\boxed{16 cm}", F),
    ("The answer is B because of A's length.", T),
    ("The answer is **B**.", T),
    ("**B**", T),
    ("B", T),
    ("(B)", T),
    ("B. 14 cm", T),
    ("Answer: B", T),
    ("Therefore the correct option is (B).", T),
    ("The two sides add up.\nB", T),
    ("\\boxed{B}. It is the only one that fits the drawing, as I said above.", T),
    ("Option A gives 12 cm, which is wrong. Answer: B", T),
    ("Option B looks right at first. Answer: C", F),
    ("The answer is D.", F),
    ("C", F),
    ("I cannot see the picture.", N),
    ("The picture shows twelve dots.", N),
    ("It is either A or B.", N),
    ("\\boxed{A or B}", N),
    ("\\boxed{}", N),
    ("", F),
)
# The whole completion, thought and all.
DRAFTS: tuple[Truth, ...] = (
    ("It is \\boxed{B}, I think.\n</think>\n\nThe picture shows twelve dots.", N),
    ("I consider B only. </think> The picture shows twelve dots.", N),
    ("It is \\boxed{B}.\n</think>\n\n\\boxed{A}", F),
    ("It is \\boxed{A}.\n</think>\n\n\\boxed{B}", T),
    ("It is B. Wait, is it \\boxed{B}? Let me measure that again, from the left", F),
    ("A thought without an end that goes on and on about B", F),
    ("One.\n</think>\n\n\\boxed{A}\n<think>\nTwo.\n</think>\n\n\\boxed{B}", T),
)

YES_NO: tuple[Truth, ...] = (
    ("\\boxed{Yes}", T),
    ("\\boxed{\\text{Yes}}", T),
    ("\\boxed{No}", F),
    ("Yes", T),
    ("yes.", T),
    ("**Yes**", T),
    ("**No**", F),
    ("Yes, there is no doubt.", T),
    ("No, there is no bar longer than it. The answer is no.", F),
    ("Yes, the first bar is the longest.", T),
    ("No. The second one is longer.", F),
    ("No", F),
    ("NO!", F),
    ("The answer is yes.", T),
    ("The answer is: **No**.", F),
    ("Answer: Yes", T),
    ("Looking at the chart, the first bar is the longest. So yes.", T),
    ("Looking at the chart, the second bar is longer. No.", F),
    ("<answer>Yes</answer>", T),
    ("Yes and no.", N),
    ("Yes or no? It cannot be told.", N),
    ("There is no such bar.", N),
    ("I know the first bar.", N),
    ("Yes, it seems so. But the axis is cut. So the answer is: No", F),
    ("The chart has three bars.", N),
    ("是", N),
    ("", F),
)


# The right answer is 14; no options.
OPEN: tuple[Truth, ...] = (
    ("\\boxed{14}", T),
    ("\\boxed{14.0}", T),
    ("\\boxed{\\frac{28}{2}}", T),
    ("\\boxed{7 \\times 2}", T),
    ("\\boxed{x = 14}", T),
    ("\\boxed{14 \\text{ cm}}", T),
    ("$\\boxed{14}$.", T),
    ("The answer is 14.", T),
    ("The final answer is: $14$", T),
    ("Answer: 14", T),
    ("**Answer: 14**", T),
    ("<answer>14</answer>", T),
    ("<answer> \\boxed{14} </answer>", T),
    ("14", T),
    ("\\boxed{14}. I hope it is correct.", T),
    ("\\boxed{140}", F),
    ("\\boxed{-14}", F),
    ("\\boxed{14.5}", F),
    ("\\boxed{1.4}", F),
    ("\\boxed{13}", F),
    ("The answer is 41.", F),
    ("<answer>13</answer>", F),
    ("Answer: 1,400", F),
    ("\\boxed{14, 15}", N),
    ("\\boxed{14 \\text{ or } 15}", N),
    ("There are fourteen of them.", N),
    ("The answer is about a dozen.", N),
    ("It holds 14 marbles and 3 stones.", N),
    ("", F),
)
# Gold, response, verdict: formulas and words as MathVision, MathVerse and SeePhys have them.
FORMULAS: tuple[tuple[str, str, bool | None], ...] = (
    ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", T),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", T),
    ("\\frac{1}{2}", "\\boxed{0.5}", T),
    ("\\alpha", "\\boxed{\\beta}", N),
    ("\\pi", "\\boxed{3.14}", T),
    ("\\pi", "\\boxed{4}", N),
    ("x^2+1", "\\boxed{1+x^2}", T),
    ("0.5", "\\boxed{50\\%}", T),
    ("(-2,1]", "\\boxed{(-2,1)}", N),
    ("(-2,1]", "\\boxed{(-2, 1]}", T),
    ("3:4", "\\boxed{\\frac{3}{4}}", T),
    ("1000", "\\boxed{1,000}", T),
    ("1000", "\\boxed{10^3}", T),
    ("Paris", "\\boxed{paris}", T),
    ("Paris", "\\boxed{\\text{Paris}}", T),
    ("Paris", "\\boxed{Lyon}", N),
    ("6", "\\boxed{16}", F),
    ("6", "The answer is 6 because of 16.", N),
    ("4.0 m/s", "\\boxed{4.0 \\text{ m/s}}", T),
    ("50 cm", "\\boxed{0.5 m}", T),
    ("50 cm", "\\boxed{5 m}", N),
    ("30", "\\boxed{30^\\circ}", T),
    ("2\\pi", "<answer>2\\pi</answer>", T),
    ("__import__('os').getcwd()", "\\boxed{/}", N),
    ("14", "\\boxed{__import__('os').abort()}", N),
    ("14", "\\boxed{9**9**9**9}", N),
)
# The options are in the picture; the right one is B.
IN_PICTURE: tuple[Truth, ...] = (
    ("Answer: \\boxed{B}", T),
    ("\\boxed{B}", T),
    ("\\boxed{(B)}", T),
    ("\\boxed{option B}", T),
    ("\\boxed{\\text{B}}", T),
    ("\\boxed{\\mathbf{B}}", T),
    ("\\boxed{B.}", T),
    ("$\\boxed{B}$", T),
    ("Answer: B", T),
    ("The answer is B.", T),
    ("The answer is (B).", T),
    ("So the correct option is B.", T),
    ("B", T),
    ("(B)", T),
    ("**B**", T),
    ("It turns by a quarter.\n\nB", T),
    ("\\boxed{A}", F),
    ("\\boxed{option C}", F),
    ("Answer: D", F),
    ("The answer is C.", F),
    ("A", F),
    ("\\boxed{\\text{LETTER}}", N),
    ("\\boxed{A or B}", N),
    ("It is A or B.", N),
    ("The second figure from the left.", N),
    ("I see a grid of nine cells.", N),
    ("", F),
)
# The right ones are B and C of three options.
TWO_LETTERS: tuple[Truth, ...] = (
    ("\\boxed{B, C}", T),
    ("\\boxed{BC}", T),
    ("\\boxed{C, B}", T),
    ("\\boxed{B and C}", T),
    ("\\boxed{(B), (C)}", T),
    ("\\boxed{B,C}", T),
    ("\\boxed{\\text{B, C}}", T),
    ("\\boxed{B}, \\boxed{C}", T),
    ("\\boxed{B} and \\boxed{C}", T),
    ("B, C", T),
    ("The answer is B and C.", T),
    ("The answer is B, C.", T),
    ("Answer: BC", T),
    ("Answer: B, C", T),
    ("The correct options are B and C.", N),
    ("\\boxed{B}", F),
    ("\\boxed{C}", F),
    ("\\boxed{A, B}", F),
    ("\\boxed{A, B, C}", F),
    ("\\boxed{AC}", F),
    ("The answer is A and B.", F),
    ("B", F),
    ("\\boxed{B or C}", N),
    ("Both of the last two follow.", N),
    ("I cannot tell.", N),
    ("", F),
)
GRID = "[[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]"
BASE4 = (
    '{"base_matrix": [[1, null, null, 4], [null, 4, 1, null],'
    " [2, 1, null, null], [null, null, null, 1]]}"
)
HASHI = (
    '{"init_islands": [{"cord": "a1", "requirement": 2}, {"cord": "c1", "requirement": 3},'
    ' {"cord": "c4", "requirement": 1}]}'
)
TOWERS = (
    '{"base_matrix": [[null, null, null], [null, null, null], [null, null, null]],'
    ' "visible_skyscrapers": [[3, 2, 1], [3, 2, 1], [1, null, 2], [1, 2, null]]}'
)
YIN = (
    '{"base_matrix": [[1, null, null, null, null, null], [null, null, null, null, null, null],'
    " [null, null, null, null, null, null], [null, null, null, null, null, null],"
    " [null, null, null, null, null, null], [null, null, null, null, null, 0]]}"
)
CARDS = '{"init_cards": [3, 8, 9, 1]}'
SIX = "[[1,2,3,4,5,6],[4,5,6,1,2,3],[2,3,4,5,6,1],[5,6,1,2,3,4],[3,4,5,6,1,2],[6,1,2,3,4,5]]"
_PLAIN6 = ", ".join("[null, null, null, null, null, null]" for _ in range(6))
BASE6 = '{"base_matrix": [' + _PLAIN6 + "]}"
RING = "[[1,1,1,1,1,1],[1,0,1,0,1,0],[1,0,1,0,1,0],[1,0,1,0,1,0],[1,0,1,0,1,0],[0,0,0,0,0,0]]"
# Found by searching through all numbers.
SOLVED = {
    3: "A:1, B:12, C:5, D:8, E:14, F:3, G:4, H:7, I:13, J:6, K:9, L:11, M:2, N:15, O:10",
    4: "A:1, B:6, C:7, D:8, E:5, F:2, G:3, H:4, I:9",
    5: "A:20, B:20, C:15, D:5, E:10, F:10, G:15, H:10, I:5, J:5, K:20, L:5, M:5, N:5, O:20, P:15,"
    " Q:20",
    6: "A:1, S:19, C:2, Q:18, E:3, O:17, G:4, M:16, I:5, K:15, L:6, H:14, N:7, F:13, P:8, D:12,"
    " R:9, B:11, J:10",
    7: "A:1, B:8, C:2, D:9, E:7, F:11, G:10, H:12, I:3, J:5, K:6, L:4",
    9: "A:1, B:9, C:12, D:18, E:19, F:8, G:6, H:3, I:17, J:2, K:16, L:4, M:14, N:15, O:13, P:11,"
    " Q:5, R:10, S:7",
}
# Function, answer cell, further information, response, verdict.
PUZZLES: tuple[tuple[str, str, str, str, bool | None], ...] = (
    ("calculate_answer_function_1", "", "", "A:3, B:1, C:2", T),
    ("calculate_answer_function_1", "", "", "A = 6, B = 2, C = 4", T),
    ("calculate_answer_function_1", "", "", "\\boxed{A:3, B:1, C:3}", F),
    ("calculate_answer_function_1", "", "", "A:0, B:0, C:0", F),
    ("calculate_answer_function_1", "", "", "I cannot tell.", N),
    ("calculate_answer_function_2", "", "", "A:10, B:5, C:10, D:5, E:5, F:10", T),
    ("calculate_answer_function_2", "", "", "A:10, B:5, C:10, D:5, E:5, F:11", F),
    *((f"calculate_answer_function_{n}", "", "", text, T) for n, text in SOLVED.items()),
    *((f"calculate_answer_function_{n}", "", "", f"{text}, A:15", F) for n, text in SOLVED.items()),
    ("calculate_answer_function_10", "", "", "A:1, B:5, C:6, D:4, E:2, F:3", F),
    ("calculate_answer_function_10", "", "", "A:1, B:6, C:5, D:2, E:4, F:3", T),
    ("calculate_answer_function_11", "", "", "A:3, B:5, C:7, D:7, E:5, F:7, G:8", N),
    ("calculate_answer_function_12", "", "", "C:9,A:2,T:8,D:1,O:6,G:0,P:1,E:0,S:8", T),
    ("calculate_answer_function_12", "", "", "C:9,A:2,T:8,D:1,O:6,G:0,P:1,E:1,S:8", F),
    ("match_answer_function", '{"A": 5, "B": 1}', "", "A:5, B:1", T),
    ("match_answer_function", '{"A": 5, "B": 1}', "", '{"A": 5, "B": 1}', T),
    ("match_answer_function", '{"A": 5, "B": 1}', "", "A:5, B:2", F),
    ("match_answer_function", "{'1': 'A'}", "", "1:A", T),
    ("match_coordinate_function", '[{"row": "A", "column": 1}]', "", "It is at (A, 1).", T),
    ("match_coordinate_function", '[{"row": "A", "column": 1}]', "", "(A, 2)", F),
    ("match_coordinate_function", '[{"row": "A", "column": 1}]', "", "(A, 1), (B, 3)", F),
    ("match_coordinate_function", '[{"row": "A", "column": 1}]', "", "at the top", N),
    ("multiple_match_function", '[["A", "C"], ["B", "D"]]', "", "The balls are: C, A", T),
    ("multiple_match_function", '[["A", "C"], ["B", "D"]]', "", "\\boxed{A, B}", F),
    ("multiple_match_function", '[["A", "C"]]', "", "the heavy ones", N),
    ("compare_expression_function", '["2+3=5"]', "", "3 + 2 = 5", T),
    ("compare_expression_function", '["2+3=5"]', "", "\\boxed{2+3=5}", T),
    ("compare_expression_function", '["2*3-1=5"]', "", "3 \\times 2 - 1 = 5", T),
    ("compare_expression_function", '["2+3=5"]', "", "The equation is 2 - 3 = -1", F),
    ("compare_expression_function", '["2+3=5"]', "", "no equation", N),
    ("judge_24points_function", "", CARDS, "9 \\div 3 \\times 1 \\times 8 = 24", T),
    ("judge_24points_function", "", CARDS, "\\boxed{9/3*A*8}", T),
    ("judge_24points_function", "", CARDS, "8*3=24", F),
    ("judge_24points_function", "", CARDS, "9/3*1*8+0 = 24", F),
    ("judge_24points_function", "", CARDS, "9+8+3+1 = 24", F),
    ("judge_24points_function", "", CARDS, "1/(3-3)*8*9", F),
    ("judge_24points_function", "", CARDS, "open('/tmp/x', 'w')", N),
    ("judge_24points_function", "", CARDS, "9**9**9**9", N),
    ("calculate_answer_function_sudoku_4", "", BASE4, f"Final grid: {GRID}", T),
    ("calculate_answer_function_sudoku_4", "", BASE4, GRID.replace("1, 2, 3, 4", "2, 1, 3, 4"), F),
    ("calculate_answer_function_sudoku_4", "", BASE4, "[[1,3,2,4],[2,4,1,3],[4,1,3,2]]", F),
    ("calculate_answer_function_sudoku_4", "", '{"base_matrix": [[1,null,null,null],'
     '[null,null,null,null],[null,null,null,null],[null,null,null,1]]}', f"So {GRID}", T),
    ("calculate_answer_function_sudoku_4", "", BASE4, "no grid", N),
    ("calculate_answer_function_sudoku_4", "", BASE4, "[[[1]]]", F),
    ("calculate_answer_function_sudoku_6", "", BASE6, SIX, T),
    ("calculate_answer_function_sudoku_6", "", BASE6, SIX.replace("6,1,2,3,4,5", "6,1,2,3,5,4"), F),
    ("calculate_answer_function_skyscraper", "", TOWERS, "[[1,2,3],[2,3,1],[3,1,2]]", T),
    ("calculate_answer_function_skyscraper", "", TOWERS, "[[1,3,2],[2,1,3],[3,2,1]]", F),
    ("calculate_answer_function_yinyang", "", YIN, RING, T),
    ("calculate_answer_function_yinyang", "", YIN, RING.replace("1,1,1,1,1,1", "1,1,1,1,1,0"), T),
    ("calculate_answer_function_yinyang", "", YIN, RING.replace("1,0,1,0,1,0", "1,1,1,0,1,0"), F),
    ("calculate_answer_function_hashi", "", HASHI,
     "Two bridges from a1 to c1, and one bridge between c1 and c4", T),
    ("calculate_answer_function_hashi", "", HASHI, '[{"start": "a1", "end": "c1", "number": 2},'
     ' {"start": "c1", "end": "c4", "number": 1}]', T),
    ("calculate_answer_function_hashi", "", HASHI, "a1 - c1: 2 bridges\nc1 - c4: 2 bridges", F),
    ("calculate_answer_function_hashi", "", HASHI, "a1 - c4: 1 bridge", F),
    ("calculate_answer_function_hashi", "", HASHI, "none", N),
)  # fmt: skip
