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

# The right answer is 14.
OPEN_MMMU: tuple[Truth, ...] = (
    ("\\boxed{14}", T),
    ("\\boxed{14.0}", T),
    ("The answer is 14.", T),
    ("14", T),
    ("\\boxed{140}", F),
    ("\\boxed{-14}", F),
    ("\\boxed{14.5}", F),
    ("\\boxed{\\frac{28}{2}}", T),
    ("The answer is about a dozen.", N),
)
