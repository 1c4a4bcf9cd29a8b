r"""Units of measurement: names, symbols and their exact factors.

A unit is a product of powers of base dimensions with a rational factor, so that convertible units
compare exactly: 1 m = 100 cm, 1 h = 60 min, 36 km/h = 10 m/s. Temperatures in different scales are
different dimensions (their zero points differ), and so are things that are counted (5 apples).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """`factor` of the base units of `dimension`, sorted pairs of base dimension and power.

    `noun`: whether it is surely a thing that is counted or measured. A word of no known unit in the
    singular ("6 excluded", "6 upward") may be a verdict on the number, unless that is 1.
    """

    dimension: Dimension
    factor: Fraction = Fraction(1)
    noun: bool = field(default=True, compare=False)

    def times(self, other: Unit, power: int = 1) -> Unit:
        """The product with a power of another unit."""
        powers = dict(self.dimension)
        for name, exponent in other.dimension:
            powers[name] = powers.get(name, 0) + exponent * power
        dimension = tuple(sorted((name, p) for name, p in powers.items() if p))
        return Unit(dimension, self.factor * other.factor**power, self.noun and other.noun)


ONE = Unit(())
PERCENT = Unit((("%", 1),))
DEGREE = Unit((("angle", 1),))

# Base unit, factor, then every spelling. Plurals in -s are found by rule.
_TABLE = r"""
length 1 m meter metre 米
length 1/1000000000 nm nanometer nanometre 纳米
length 1/1000000 μm um micrometer micrometre micron 微米
length 1/1000 mm millimeter millimetre 毫米
length 1/100 cm centimeter centimetre 厘米
length 1/10 dm decimeter decimetre 分米
length 1000 km kilometer kilometre 千米 公里
length 254/10000 inch inches in 英寸
length 3048/10000 ft foot feet 英尺
length 9144/10000 yd yard 码
length 1609344/1000 mi mile 英里
length 500 里
mass 1/1000 g gram gramme 克
mass 1/1000000 mg milligram 毫克
mass 1 kg kilogram kilogramme kilo 千克 公斤
mass 1/2 斤
mass 1000 t ton tonne 吨
mass 45359237/100000000 lb lbs pound 磅
mass 45359237/1600000000 oz ounce 盎司
time 1 s sec secs second 秒 秒钟
time 1/1000 ms millisecond 毫秒
time 60 min mins minute 分钟
time 3600 h hr hrs hour 小时 时
time 86400 d day 天 日
time 604800 week 周 星期
month 1 month 月 个月
month 12 year yr yrs 年
current 1 A ampere amp 安培 安
current 1/1000 mA milliampere 毫安
celsius 1 \celsius celsius 摄氏度
fahrenheit 1 \fahrenheit fahrenheit 华氏度
kelvin 1 K kelvin 开尔文
amount 1 mol mole 摩尔
angle 1 degree deg 度
angle 1/60 arcminute
radian 1 rad radian 弧度
dollar 1 \dollar dollar USD 美元
dollar 1/100 \cent cent 美分
euro 1 \euro euro EUR 欧元
sterling 1 \pound GBP 英镑
yuan 1 \yuan yuan RMB CNY 元 块
yuan 1/10 角
% 1 % percent pct percentage
"""
# Derived: kg, m, s and A powers, then spellings.
_DERIVED = r"""
1 1 1 -2 0 N newton 牛 牛顿
1000 1 1 -2 0 kN kilonewton
1 1 2 -2 0 J joule 焦 焦耳
1000 1 2 -2 0 kJ kilojoule 千焦
3600000 1 2 -2 0 kWh
1 1 2 -3 0 W watt 瓦 瓦特
1000 1 2 -3 0 kW kilowatt 千瓦
1 1 -1 -2 0 Pa pascal 帕 帕斯卡
1000 1 -1 -2 0 kPa kilopascal 千帕
1 1 2 -3 -1 V volt 伏 伏特
1/1000 1 2 -3 -1 mV millivolt
1000 1 2 -3 -1 kV kilovolt
1602176634/10000000000000000000000000000 1 2 -2 0 eV electronvolt
1602176634/10000000000000000000000000 1 2 -2 0 keV
1602176634/10000000000000000000000 1 2 -2 0 MeV
1602176634/10000000000000000000 1 2 -2 0 GeV
1 1 2 -3 -2 \Omega Ω ohm 欧 欧姆
1000 1 2 -3 -2 kΩ kiloohm
1000000 1 2 -3 -2 MΩ megaohm
1 0 0 1 1 C coulomb 库仑
1 0 0 -1 0 Hz hertz 赫兹
1000 0 0 -1 0 kHz
1 1 0 -2 -1 T tesla 特斯拉
1/1000 0 3 0 0 L l liter litre 升
1/1000000 0 3 0 0 mL ml milliliter millilitre cc 毫升
10000 0 2 0 0 ha hectare 公顷
44704/100000 0 1 -1 0 mph
5/18 0 1 -1 0 kph kmh
"""
_PLURALS = {"feet": "foot", "people": "person", "children": "child", "mice": "mouse",
            "men": "man", "women": "woman", "geese": "goose", "teeth": "tooth"}  # fmt: skip
_SAME_PLURAL = frozenset("fish sheep deer person each horsepower".split())
# Counted things in Chinese: all say "of them", and mean nothing that could differ.
_MEASURE_WORDS = frozenset(
    "个 只 人 本 张 条 支 枝 岁 次 种 名 位 件 棵 辆 页 组 份 台 间 袋 箱 盒 瓶 朵 颗 根 头 匹 "
    "座 套 把 道 题 户 对 双 排 行 列 班 篇 句 字 步 场 桶 筐 块钱 单位 名学生 个单位".split()
)
# A word after a number that is none of these is taken as what is counted ("7 apples").
_NOT_COUNTED = frozenset(
    """not non never neither nor none no wrong false incorrect untrue isn aren doesn isnt
    approximately about around roughly nearly almost maybe perhaps possibly probably likely circa
    more less fewer greater smaller larger over under above below least most exactly minus plus
    times time divided multiplied added subtracted over squared cubed square cube root power
    factorial half halves third thirds quarter quarters fourth fourths tenth tenths hundredth
    hundredths thousandth thousandths dozen dozens score pair pairs couple double twice triple
    ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty
    forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million millions
    billion billions trillion trillions zero one two three four five six seven eight nine
    negative positive reciprocal inverse modulo remainder either both each both then else but
    except instead rather unless without with mod divides infinity infinite answer correct right
    wait option choice true yes per only pi and or is are was were be the that this these those
    fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths percentile exponent
    base binary octal hexadecimal decimal degrees radians onwards upwards downwards afterwards
    backwards forwards always sometimes besides fails loses lacks contradicts violates unknowns
    guess guesses unless digits folds""".split()
)
_MULTIPLIERS = {
    "dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9,
    "trillion": 10**12, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8, "百万": 10**6,
    "千万": 10**7,
}  # fmt: skip
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "平方": 2, "立方": 3}
_MICRO = re.compile(r"\\mu\s*(?=[A-Za-z])")
_SPELLINGS = [
    (re.compile(r"(?<![^\W\d_])([kM])\s*\\Omega"), r"\1Ω"),
    (re.compile(r"degrees?\s+(?:[Cc]elsius|C)\b"), r"\\celsius"),
    (re.compile(r"degrees?\s+(?:[Ff]ahrenheit|F)\b"), r"\\fahrenheit"),
    (re.compile(r"\bper\s+cent"), "percent"),
    (re.compile(r"\bsq\s*\."), "square"),
    (re.compile(r"\bcu\s*\."), "cubic"),
    (re.compile(r"\b((?:year|month|week|day)s?)\s+old"), r"\1"),
]
_PIECE = re.compile(
    r"\s*(?:(?P<word>\\?[^\W\d_]+|%)|(?P<power>\^\s*\{?\s*(?P<exponent>[+-]?\s?\d)\s*\}?)"
    r"|(?P<over>/)|(?P<times>\*|\u00b7))"
)


def _units() -> dict[str, Unit]:
    found: dict[str, Unit] = {}
    for line in _TABLE.split("\n"):
        if line:
            base, factor, *names = line.split()
            found.update({name: Unit(((base, 1),), Fraction(factor)) for name in names})
    for line in _DERIVED.split("\n"):
        if line:
            factor, mass, length, time, current, *names = line.split()
            powers = {"mass": mass, "length": length, "time": time, "current": current}
            dimension = tuple(sorted((name, int(p)) for name, p in powers.items() if int(p)))
            found.update({name: Unit(dimension, Fraction(factor)) for name in names})
    return found


_UNITS = _units()


def find_unit(word: str) -> Unit | None:
    """The unit of one word or symbol, singular or plural, or None."""
    known = _UNITS.get(word)
    if known is not None or len(word) < 3:
        return known
    lower = word.lower()
    for name in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if len(name) > 2 and name in _UNITS:
            return _UNITS[name]
    return None


def multiplier(word: str) -> int | None:
    """12 for dozen, 10,000 for 万; None if the word is no multiple."""
    return _MULTIPLIERS.get(word.lower())


def _counted(words: list[str]) -> Unit | None:
    """One or two nouns of things that are counted ("apples", "red balls") as a dimension."""
    if words in (["unit"], ["units"]) or "".join(words) in _MEASURE_WORDS:
        return ONE
    if not 1 <= len(words) <= 2:
        return None
    for word in words:
        long = len(word) > 3 or word in _PLURALS
        if not (word.isascii() and word.isalpha() and long):
            return None
        if word.lower() in _NOT_COUNTED or word.lower().endswith(("teen", "illion", "illions")):
            return None
    noun = words[-1].lower()
    plural = noun.endswith("s") and not noun.endswith("ss")
    plural = plural or noun in _PLURALS or noun in _SAME_PLURAL
    noun = _PLURALS.get(noun, noun)
    for ending, singular in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("s", "")):
        if noun.endswith(ending) and not noun.endswith("ss"):
            noun = noun.removesuffix(ending) + singular
            break
    return Unit(((" ".join([*words[:-1], noun]).lower(), 1),), noun=plural)


def _chinese(word: str) -> Unit | None:
    """`平方厘米`, `米每秒`, `千米`: compounds without spaces."""
    for name, power in (("平方", 2), ("立方", 3)):
        if word.startswith(name) and (base := find_unit(word[len(name) :])):
            return ONE.times(base, power)
    top, per, bottom = word.partition("每")
    if per and (numerator := find_unit(top)) and (denominator := find_unit(bottom)):
        return numerator.times(denominator, -1)
    return None


def parse_unit(text: str) -> Unit | None:
    r"""The unit that `text` is: `cm`, `m/s^2`, `km per hour`, `square centimeters`, `apples`, `%`.

    Products, quotients and integer powers of known units, or one or two words that name what is
    counted. None for anything else, above all for words that change a number ("not", "or 7",
    "million").
    """
    text = _MICRO.sub("μ", text.strip().strip(".").strip())
    for spelling, name in _SPELLINGS:
        text = spelling.sub(name, text)
    if not text or len(text) > 60:
        return None
    nouns = text.split()
    if len(nouns) > 1 and all(word.isalpha() and find_unit(word) is None for word in nouns):
        return _squared_units(nouns) or _counted(nouns)
    unit, sign, power, last, position, word = ONE, 1, 1, None, 0, None
    while position < len(text):
        piece = _PIECE.match(text, position)
        if piece is None:
            return None
        position = piece.end()
        if piece["power"]:
            if last is None:
                return None
            exponent = int(piece["exponent"].replace(" ", ""))
            unit, last = unit.times(last, sign * (exponent - 1)), None
        elif piece["over"] or piece["word"] in ("per", "每"):
            sign, last = -1, None
        elif piece["times"]:
            last = None
        else:
            word = piece["word"]
            if word.lower() in _POWER_WORDS:
                power = _POWER_WORDS[word.lower()]
                continue
            found = find_unit(word) or _chinese(word) or _counted([word])
            if found is None:
                return None
            last = ONE.times(found, power)
            unit, power = unit.times(last, sign), 1
    # It must end in a word or a power, not in an operator.
    return unit if power == 1 and word is not None and text[-1] not in "/*·^" else None


def _squared_units(words: list[str]) -> Unit | None:
    """`square units`: says nothing that could differ."""
    if (
        len(words) == 2
        and words[0].lower() in _POWER_WORDS
        and words[1].lower() in ("unit", "units")
    ):
        return ONE
    return None
