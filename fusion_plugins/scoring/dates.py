"""Read times of day, dates, weekdays and months, in English and in Chinese.

>>> read_clock("3:20 p.m."), read_date("2024年3月5日"), read_weekday("周二"), read_month("三月")
((920, True), (2024, 3, 5), 2, 3)
"""

import re

_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?:[:：](?P<minute>\d{2}))?(?::\d{2})?\s*(?P<half>[ap])\.?\s*m\.?"
    r"|(?P<hour2>\d{1,2}):(?P<minute2>\d{2})(?::\d{2})?(?:\s*o'?clock)?|(?P<hour3>\d{1,2})\s*o'?clock"
    r"|(?P<half4>上午|早上|下午|晚上)?(?P<hour4>\d{1,2})[点时](?:(?P<minute4>\d{1,2})分?|(?P<thirty>半))?",
    re.IGNORECASE,
)
_HALVES = {"a": 0, "p": 12, "上午": 0, "早上": 0, "下午": 12, "晚上": 12}
_MONTHS = "january february march april may june july august september october november december".split()
_DATE = re.compile(
    r"(?P<year>\d{4})[-/.年]\s*(?P<month>\d{1,2})[-/.月]\s*(?P<day>\d{1,2})[日号]?"
    r"|(?P<name>[A-Za-z]{3,9})\.?\s+(?P<nth>\d{1,2})(?:st|nd|rd|th)?(?:,?\s+(?P<of>\d{4}))?"
    r"|(?:the\s+)?(?P<nth2>\d{1,2})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<name2>[A-Za-z]{3,9})\.?(?:,?\s+(?P<of2>\d{4}))?"
    r"|(?P<month3>\d{1,2})月(?P<day3>\d{1,2})[日号]"
    r"|(?P<one>\d{1,2})/(?P<two>\d{1,2})/(?P<of3>\d{4})"
)
_WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_SHORT_WEEKDAYS = {
    "Mon": 1,
    "Tue": 2,
    "Tues": 2,
    "Wed": 3,
    "Thu": 4,
    "Thur": 4,
    "Thurs": 4,
    "Fri": 5,
    "Sat": 6,
    "Sun": 7,
}
_CHINESE_WEEKDAYS = {
    sign: place for place, signs in enumerate(("一", "二", "三", "四", "五", "六", "日天"), 1) for sign in signs
}
_CHINESE_MONTHS = {name: place for place, name in enumerate("一 二 三 四 五 六 七 八 九 十 十一 十二".split(), 1)} | {
    str(place): place for place in range(1, 13)
}
#: a short name is one only with its capital: "sun" and "may" are words
WEEKDAY = (
    rf"\b(?i:(?:{'|'.join(_WEEKDAYS)})s?)\b|\b(?:{'|'.join(sorted(_SHORT_WEEKDAYS, reverse=True))})\b\.?"
    r"|(?<![\d一二三四五六七八九十两几])(?:星期|周|礼拜)[一二三四五六日天](?![天年月])"
)
MONTH = (
    rf"\b(?:{'|'.join(month.capitalize() for month in _MONTHS)})\b"
    r"|\b(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?"
    r"|(?<![\d一二三四五六七八九十])(?:1[0-2]|[1-9]|十[一二]?|[一二三四五六七八九])月(?:份)?(?!\d)"
)


def read_clock(text: str) -> tuple[int, bool] | None:
    """Return minutes after midnight, and whether a.m. or p.m. is given; None for another text."""
    found = _CLOCK.fullmatch(text)
    if not found:
        return None
    hour, minute = (
        next((int(found[name]) for name in names if found[name]), 0)
        for names in (("hour", "hour2", "hour3", "hour4"), ("minute", "minute2", "minute4"))
    )
    minute = 30 if found["thirty"] else minute
    if hour > 24 or minute > 59:
        return None
    half = _HALVES.get((found["half"] or found["half4"] or "").lower())
    return 60 * (hour if half is None else hour % 12 + half) + minute, half is not None


def read_date(text: str) -> tuple[int | None, int, int] | None:
    """Return year (None where it is not said), month and day; None for another text."""
    found = _DATE.fullmatch(text)
    if not found:
        return None
    name = found["name"] or found["name2"]
    # "3/5/2020" is the American order; "25/12/2020" can only be the other one.
    first, second = int(found["one"] or 0), int(found["two"] or 0)
    month, numbered_day = (second, first) if first > 12 else (first, second)
    month = int(found["month"] or found["month3"] or month)
    if name:
        month = _named_month(name)
    if not 1 <= month <= 12:
        return None
    year = found["year"] or found["of"] or found["of2"] or found["of3"]
    day = found["day"] or found["nth"] or found["nth2"] or found["day3"] or numbered_day
    return int(year) if year else None, month, int(day)


def read_weekday(text: str) -> int | None:
    """Return 1 for Monday to 7 for Sunday; None for another text."""
    text = re.sub(r"^on\s+(?:an?\s+)?", "", text, flags=re.IGNORECASE)
    if not re.fullmatch(WEEKDAY, text):
        return None
    if not text.isascii():
        return _CHINESE_WEEKDAYS[text[-1]]
    name = text.rstrip(".")
    return _SHORT_WEEKDAYS.get(name) or _WEEKDAYS.index(name.lower().removesuffix("s")) + 1


def read_month(text: str) -> int | None:
    """Return the number of a month that is given by its name, or as 3月; None for another text."""
    text = re.sub(r"^in\s+", "", text, flags=re.IGNORECASE)
    if not re.fullmatch(MONTH, text):
        return None
    return _named_month(text.rstrip(".")) if text.isascii() else _CHINESE_MONTHS[text.partition("月")[0]]


def _named_month(name: str) -> int:
    """Return the number of the month whose name begins so, 0 where none does."""
    name = "sep" if name.lower() == "sept" else name
    return next((place for place, full in enumerate(_MONTHS, 1) if full.startswith(name.lower())), 0)
