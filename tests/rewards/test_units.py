r"""Nothing that changes the meaning is cut away: words, denials, units."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v3.rewards.rules import answers_match
from r1v3.rewards.units import parse_unit

AGREE = [
    ("50\\%", "50 percent"), ("50%", "50％"), ("50\\%", "50\\text{ percent}"), ("0.5", "50％"),
    ("5 cm", "5 centimeters"), ("5\\text{ cm}", "5 centimetre"), ("3 h", "3 hours"),
    ("3\\text{ hours}", "3 hrs"), ("12\\text{ cm}^2", "12 square centimeters"),
    ("12 cm^2", "12\\ \\mathrm{cm}^{2}"), ("12\\text{ cm}^2", "12 sq cm"),
    ("60 km/h", "60 km per hour"),
    ("60\\text{ km/h}", "60 kilometers per hour"), ("\\$5", "5 dollars"), ("5 dollars", "$5"),
    ("5", "\\$5"), ("30^\\circ", "30 degrees"), ("30°", "30\\text{ degrees}"),
    ("30º", "30^{\\circ}"),
    ("1 m", "100 cm"), ("100\\text{ cm}", "1\\text{ m}"), ("1.5 hours", "90 minutes"),
    ("2 km", "2000 m"), ("36 km/h", "10 m/s"), ("1 m^2", "10000 cm^2"), ("1 L", "1000 cm^3"),
    ("1 day", "24 hours"), ("\\$1", "100 cents"), ("1 kWh", "3600000 J"), ("1 N", "1 kg*m/s^2"),
    ("2\\pi\\text{ m}", "200\\pi\\text{ cm}"), ("\\frac{1}{2}\\text{ kg}", "500 g"),
    ("2\\sqrt{3}\\text{ cm}", "2\\sqrt3"), ("1 foot", "12 inches"), ("2 feet", "24 in"),
    ("7 apples", "7 apple"), ("3 children", "3"), ("15", "15 square units"), ("8", "8 units"),
    ("5 million", "5000000"), ("2 dozen", "24"), ("3 thousand", "3{,}000"), ("25℃", "25 °C"),
    ("25^\\circ\\text{C}", "25 ^\\circ C"), ("9.8\\text{ m/s}^2", "9.8 m/s²"), ("3 μm", "3 \\mu m"),
    ("120 lb", "120 pounds"), ("€20", "20 euros"), ("45\\text{ mph}", "45"), ("6", "6 people"),
    ("10 Ω", "10 ohms"), ("5\\text{ m}", "5m"), ("180^\\circ", "\\pi"),
]  # fmt: skip
DIFFER = [
    ("6", "6\\text{ or 7}"), ("6", "6 or 7"), ("7", "6\\text{ or }7"),
    ("2\\pi\\text{ m}", "2\\pi\\text{ cm}"),
    ("5", "\\text{not }5"), ("5", "5\\text{ is wrong}"), ("5", "5\\text{ is not the answer}"),
    ("5 cm", "5 m"), ("5 cm", "5 cm^2"), ("5 h", "5 min"), ("5 kg", "5 g"), ("\\$5", "5 euros"),
    ("\\$5", "5 cents"), ("5 cm", "5 kg"), ("50\\%", "50 cm"), ("30^\\circ", "30 cm"),
    ("25 °C", "25 °F"), ("25 °C", "25^\\circ"), ("7 apples", "7 pears"), ("7", "7 million"),
    ("5", "5 thousand"), ("5", "5 dozen"), ("3", "3 times"), ("4", "4 squared"),
    ("4", "4 factorial"),
    ("5", "5 minus 3"), ("3", "3\\text{ halves}"), ("8", "8 or more"), ("8", "8 more"),
    ("8", "at least 8"), ("8", "\\text{more than }8"), ("2", "2\\text{ negative}"),
    ("5", "5 apples or pears"), ("1 m", "10 cm"), ("60 km/h", "60 m/s"), ("1 m", "1 L"),
    ("5", "5\\text{ (wrong)}"), ("3", "3\\text{ cm, not }4"), ("10", "-10 cm"),
    ("6", "6\\text{ and 7}"),
    ("50\\%", "0.05"), ("2 rad", "2^\\circ"), ("4 cm", "4 cm cm"),
    ("5", "5 \\text{mod 7}"), ("2 h", "2 h 30 min"), ("12", "12\\text{ remainder }3"),
    ("2m", "2 cm"), ("3", "3\\text{x}"), ("4", "four"), ("100 cm", "100 m"), ("1 min", "60"),
    ("0", "0\\text{ is impossible, so }5"), ("5", "\\text{no, }5"), ("1000", "1 km"),
]  # fmt: skip


# A letter right behind a number may be a variable: a unit only where the other side has one.
UNSPACED = [
    ("0.05 kN", "50N"), ("50N", "0.05 kN"), ("3000 g", "3kg"), ("3", "3kg"), ("4m/s", "240 m/min"),
    ("4", "4m/s"), ("4m/s", "4"), ("9.8", "9.8m/s^2"), ("250 cm", "2.5m"), ("2.5m", "250 cm"),
    ("12V", "12 volts"), ("7 hours", "7h"), ("420 min", "7h"), ("6 square meters", "6m^2"),
    ("-5m/s", "-5 m/s"), ("3\\text{ A}", "3A"),
]  # fmt: skip
NOT_UNSPACED = [
    ("50", "50N"), ("50N", "50"), ("0.05 kN", "5N"), ("3", "3kx"), ("4", "4m/x"), ("4", "4x/s"),
    ("4", "4m/s^3"), ("4 m", "4s"), ("250 cm", "25m"), ("12V", "12 A"), ("420 min", "8h"),
    ("4m/s", "4 s/m"), ("6 m", "6m^2"), ("2", "2m"), ("4", "a4m/s"), ("3 km", "3m"),
]  # fmt: skip
# A percent sign that is left out, or put where the ground truth has none.
PERCENT = [("35\\%", "35"), ("35%", "0.35"), ("0.35", "35%"), ("12.5%", "1/8"),
           ("12.5 percent", "12.5"), ("100%", "1"), ("1", "100%"), ("\\frac14", "25\\%"),
           ("3%", "3"), ("40％", "40")]  # fmt: skip
NOT_PERCENT = [("35", "35%"), ("1", "1%"), ("12.5", "12.5 percent"), ("0.35", "0.35%"),
               ("100", "100%"), ("35%", "3500"), ("35%", "0.0035"), ("0.35", "3.5%"),
               ("7", "7％"), ("x", "x%")]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), UNSPACED + PERCENT)
def test_signs_and_letters_that_can_only_be_units_are(gold: str, answer: str) -> None:
    """Fails if a right answer is not paid because its unit has no space, or is left out."""
    assert answers_match(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), NOT_UNSPACED + NOT_PERCENT)
def test_a_variable_is_no_unit_and_a_percent_sign_divides(gold: str, answer: str) -> None:
    """Fails if `50N` is paid as 50, or 35% as 35: it is 0.35."""
    assert not answers_match(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), AGREE)
def test_units_in_every_spelling_agree(gold: str, answer: str) -> None:
    """Names, symbols, plurals and convertible units say the same."""
    assert answers_match(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), DIFFER)
def test_a_word_that_changes_the_meaning_is_not_dropped(gold: str, answer: str) -> None:
    """A second answer, a denial, a multiple or another unit must never be paid."""
    assert not answers_match(answer, gold)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("km/h", "km per hour"), ("m/s", "米每秒"), ("cm^2", "平方厘米"), ("m^3", "cubic metres"),
        ("J", "N*m"), ("W", "J/s"), ("Pa", "N/m^2"), ("V", "W/A"), ("mL", "cm^3"), ("ha", "10"),
        ("kN", "kilonewtons"), ("h", "小时"),
    ],
)  # fmt: skip
def test_compound_units(text: str, same: str) -> None:
    """Products, quotients and powers have one value."""
    unit = parse_unit(text)
    assert unit is not None
    assert parse_unit(same) == (None if same == "10" else unit)


@given(st.text(alphabet="abcdefghijklmnorstuvwxyz ", min_size=1, max_size=12), st.integers(1, 99))
@settings(max_examples=200, deadline=None)
def test_a_word_never_turns_one_number_into_another(word: str, value: int) -> None:
    """Whatever stands behind a number, it is not paid as another number."""
    assert not answers_match(f"{value + 1} {word}", str(value)) or "cm" in word
