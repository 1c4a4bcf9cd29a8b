"""Thoughts that say they cannot see the picture (report, table 5)."""

import re
from collections.abc import Sequence

_WHICH = (
    r"(?:(?:the|this|that|any|an|a|your|its|actual|attached|provided|given|original|uploaded|visual"
    r"|referenced)\s+)*"
)
_PICTURE = (
    rf"{_WHICH}(?:image|picture|figure|photo(?:graph)?|diagram|graph|chart|drawing|illustration"
    r"|screenshot|visual)s?\b(?!['’]s\b)"
)
_CANNOT = (
    r"(?:can(?:no|['’]?)t|can not|could(?:n['’]?t| not)|unable to|(?:not|n['’]t) able to|no way to)"
)
_NOT = r"(?:do|did)(?:n['’]?t| not)"
_SEE = (
    r"(?:(?:actually|directly|really|physically|clearly|currently)\s+)*"
    r"(?:see|view|access|look at|open)"
)
# "I can't see the image of B under f", "... the graph crossing the axis" speak of what is in it.
_ALL_OF_IT = r"(?!\s+(?:of|crossing|beyond|below|above|outside|inside|behind|at|where|that)\b)"
# "I don't have the image." and not "I don't have the image's scale yet"; the clause ends there.
_ENDS = r"(?=\s*(?:[.,;:!?)]|$|here|in front|available|attached|itself|provided|but|so|and\b|to\b))"
_SHOWN = r"(?:provided|attached|visible|shown|available|included|displayed|given|here|there)"

_WHICH_ZH = (
    r"(?:这张|这个|这幅|那张|该|此|原|题目中的|题中的|题目的|提供的|所给的|给出的|您的|你的|上传的|任何"
    r"|具体的|具体|实际的|实际|相应的|相关的)*"
)
_PICTURE_ZH = r"(?:图片|图像|图形|图表|图示|附图|配图|照片|原图|示意图|图)"
_CANNOT_ZH = r"(?:无法|不能|没法|没办法|没有办法|不可能)(?:直接|真正|实际|亲眼|清楚)?(?:地)?"
_SEE_ZH = r"(?:看到|看见|看清|看|查看|观看|观察到|访问|打开|识别|获取)"

PHRASES = (
    rf"\b{_CANNOT}\s+{_SEE}\s+{_PICTURE}{_ALL_OF_IT}",
    rf"\bwithout\s+(?:being able to\s+{_SEE}|access to|seeing|viewing|looking at)\s+{_PICTURE}",
    rf"\b(?:no|{_NOT}\s+have)\s+access to\s+{_PICTURE}",
    rf"\b{_NOT}\s+(?:actually\s+)?(?:have|see|get)\s+{_PICTURE}{_ENDS}",
    rf"\b{_PICTURE}\s+(?:is|was|are|were)(?:n['’]?t|\s+not)\s+(?:actually\s+)?{_SHOWN}",
    rf"\b{_PICTURE}\s+(?:did|does)(?:n['’]?t|\s+not)\s+(?:load|come through|seem to be {_SHOWN})",
    rf"\b(?:no|missing)\s+{_PICTURE}\s+(?:is|was|has been|were)\s+(?:actually\s+)?{_SHOWN}",
    r"\bas an? (?:text-based|text-only|language)\s*(?:ai|model)\b",
    rf"{_CANNOT_ZH}{_SEE_ZH}(?:到)?{_WHICH_ZH}{_PICTURE_ZH}",
    rf"(?:看不到|看不见|看不了){_WHICH_ZH}{_PICTURE_ZH}",
    rf"(?:没有|并未|未|没)(?:提供|附上|给出|上传|看到|收到|显示){_WHICH_ZH}{_PICTURE_ZH}",
    rf"{_PICTURE_ZH}(?:并)?(?:没有|未|无法)(?:被)?(?:提供|附上|给出|显示|加载|上传|查看)(?:出来)?"
    r"(?=[，。,.；;！!？?\s）)]|$)",
)


def blind_phrase(thought: str, further: Sequence[str] = ()) -> str | None:
    """The passage in which a thought says that it cannot see the picture; None where it does not.

    Args:
        further: regular expressions of one's own.
    """
    for phrase in (*PHRASES, *further):
        found = re.search(phrase, thought, re.IGNORECASE)
        if found is not None:
            return found[0]
    return None
