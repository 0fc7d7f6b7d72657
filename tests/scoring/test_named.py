"""Answers that are names, and answers in signs of typesetting: of each, ways to write it, and others that are wrong."""

import doctest

import pytest

from fusion_plugins.scoring import dates, named, signs, units
from fusion_plugins.scoring.math_worker import judge

#: gold answer, responses that are right, responses that are wrong
NAMES = [
    (
        r"\text{Evelyn}",
        [
            "It is **Evelyn**.",
            "The fastest runner is Evelyn.",
            r"\boxed{\text{Evelyn}}",
            r"Thus we get $\text{Evelyn}$.",
        ],
        ["It is **Debra**.", "The answer is Carla.", r"\boxed{\text{Angela}}"],
    ),
    (r"\text{IV}", ["Quadrant IV", r"\mathrm{IV}", "It is in quadrant **IV**."], ["III", "4", "Quadrant VI"]),
    (
        "星期二",
        [
            "答案是星期二",
            "答案是星期二。",
            "所以答案是：星期二",
            "周二",
            "答案是周二",
            "答案是礼拜二",
            "The answer is Tuesday.",
            "**星期二**",
            "\\boxed{星期二}",
            "\\boxed{\\text{Tuesday}}",
            "那一天是星期二。",
            "#### 星期二",
            "是周二。",
            "因此，那天是星期二。",
        ],
        [
            "答案是星期三",
            "答案是周日",
            "The answer is Thursday.",
            "**星期一**",
            "\\boxed{星期天}",
            "星期二是前天，所以答案是星期四。",
            "那天是星期五。",
        ],
    ),
    (
        "Tuesday",
        [
            "The answer is Tuesday.",
            "It is **Tuesday**.",
            "So the day is Tuesday.",
            "答案是星期二。",
            "**Tuesday**",
            "on Tuesday",
            "\\boxed{\\text{Tuesday}}",
            "Tuesday",
            "Tue",
            "It falls on a Tuesday.",
            "The final answer is: Tues.",
            "The meeting is on **Tuesday**.",
            "tuesday",
            "Answer: TUESDAY",
        ],
        [
            "The answer is Thursday.",
            "It is **Monday**.",
            "答案是星期三。",
            "So the day is Sunday.",
            "Not Tuesday but Friday.",
            "Today is Tuesday, so in three days it is **Friday**.",
            "Today is Tuesday, so in three days it is Friday.",
        ],
    ),
    (
        "Friday",
        [
            "In 3 days it will be Friday, since today is Tuesday.",
            "That day is Friday because the 1st of the month is a Monday.",
            "If today is Tuesday then in 3 days it's Friday.",
            "Today is Tuesday. Counting 3 days on gives Friday.",
            "The 15th falls on a Friday (not on a Saturday).",
            "Because 10 mod 7 is 3 the day is Friday.",
            "Yesterday was Thursday, so today is Friday.",
            "那天是星期五，因为今天是星期二。",
        ],
        [
            "It is Monday if the 1st is Friday.",
            "The party is on a Sunday, because today is Friday.",
            "Today is Friday, so in 3 days it's Monday.",
            "The 15th falls on a Saturday (not on a Friday).",
            "那天是星期日，因为前天是星期五。",
        ],
    ),
    (
        "True",
        [
            "The statement is true because if it were false, then 2 would be odd.",
            "So true.",
            "True. If it were false, 2 would be odd.",
        ],
        [
            "The statement is false because if it were true, then 2 would be odd.",
            "It is false as 3 is odd.",
            "So false.",
        ],
    ),
    (
        "No",
        ["Is 91 a prime? 91 = 7*13, so no.", "No because 9 is odd."],
        ["Is 97 a prime? It has no divisors, so yes.", "Yes since it is even.", "There is no rest, so yes."],
    ),
    (
        "II",
        ["It is in quadrant II, not in quadrant III.", "It is in quadrant II because its x is negative."],
        [
            "It is in quadrant III, not in quadrant II.",
            "Quadrant I and not II, so quadrant IV.",
            "It is in quadrant IV.",
        ],
    ),
    ("12月25日", ["12月25号", "答案是12月25号。", "December 25"], ["12月24号", "11月25日", "答案是12月5号。"]),
    ("星期日", ["星期天", "周日", "Sunday", "礼拜天", "答案是星期天"], ["星期一", "周六", "Monday"]),
    (
        "Paris",
        [
            "The capital is **Paris**.",
            "**Paris**",
            "The answer is Paris.",
            "The answer is **Paris**.",
            "\\boxed{\\text{Paris}}",
            "Paris",
            "It is Paris.",
            "The capital of France is **Paris**, which lies on the Seine.",
            "**Answer: Paris**",
            "__Paris__",
            "The answer is *Paris*.",
            "The capital of France is Paris.",
        ],
        [
            "The capital is **London**.",
            "**Rome**",
            "The answer is Berlin.",
            "\\boxed{\\text{Lyon}}",
            "**Paris** is what many say, but the answer is **Lyon**.",
            "It is not Paris, it is **Nice**.",
        ],
    ),
    (
        "March",
        ["The answer is March.", "**March**", "三月", "答案是3月", "答案是三月。", "Mar.", "It is in March"],
        ["April", "**May**", "答案是四月", "5月"],
    ),
    (
        "XIV",
        ["XIV", "The answer is XIV.", "**XIV**", "xiv", "ⅩⅣ", "\\boxed{\\text{XIV}}", "\\mathrm{XIV}"],
        ["XVI", "16", "**IV**", "The answer is XIII.", "XII", "14"],
    ),
    ("III", ["III", "Ⅲ", "The answer is III.", "**III**", "Statement III", "(III)"], ["II", "Ⅳ", "**I**", "2", "3"]),
    ("IV", ["Quadrant IV", "The answer is IV", "**IV**", "Ⅳ"], ["III", "VI", "The answer is II.", "4"]),
    ("yes", ["**Yes**", "Yes.", "The answer is yes."], ["**No**", "No.", "The answer is no."]),
    (
        "red",
        ["**red**", "The ball is **red**.", "The answer is red.", "It is red."],
        ["**blue**", "The answer is green.", "The ball is **white**."],
    ),
    (
        "小明",
        ["答案是小明。", "答案是：小明", "**小明**", "\\boxed{小明}", "答案是**小明**。"],
        ["答案是小红。", "**小刚**", "\\boxed{小华}"],
    ),
    (
        "New York",
        ["**New York**", "The answer is New York.", "The city is **New York**.", "\\boxed{\\text{New York}}"],
        ["**New Jersey**", "The answer is Boston.", "The city is **York**."],
    ),
    (
        "Saturday",
        [
            "Therefore, the event happens on Saturday.",
            "So it was a Saturday!",
            "**The answer is Saturday.**",
            "Saturday.",
            "3 days later, it is Saturday.",
            "周六",
            "答：那天是星期六。",
            "100 days after Thursday is a Saturday.",
            "$\\text{Saturday}$",
            "Final Answer: **Saturday**",
            "Day: Sat",
        ],
        [
            "It sat on Sunday.",
            "星期日",
            "100 days after Saturday is a Monday.",
            "The answer is Sunday, not Saturday.",
            "It is Sunday rather than Saturday.",
        ],
    ),
    (
        "星期五",
        ["所以今天是星期五", "再过三天是周五。", "**周五**", "星期五。", "答案：礼拜五", "\\boxed{\\text{星期五}}"],
        ["星期四", "今天是星期五，明天是星期六。", "三周五天"],
    ),
    (
        "May",
        ["It is in May.", "The month is **May**.", "5月", "五月份", "The answer is May.", "May"],
        ["June", "It may be July.", "The answer is March.", "In May it was cold, so the answer is April."],
    ),
    (
        "December",
        ["Dec.", "**December**", "12月", "十二月", "The birthday is in December."],
        ["November", "2月", "十月"],
    ),
    (
        "gold",
        ["The answer is gold.", "It is made of **gold**.", "**gold**", "The metal is gold.", "Answer: Gold"],
        ["silver", "The answer is iron.", "**copper** is better than gold", "The metal is **tin**."],
    ),
    (
        "Albert Einstein",
        [
            "It was **Albert Einstein**.",
            "The physicist was Albert Einstein.",
            "The answer is Albert Einstein.",
            "**Albert Einstein** wrote it.",
        ],
        ["Albert Schweitzer", "It was **Niels Bohr**.", "The answer is Isaac Newton."],
    ),
    (
        "北京",
        ["答案是北京。", "**北京**", "首都是北京。", "北京", "答案：**北京**", "\\boxed{北京}"],
        ["答案是上海。", "**南京**", "首都是东京。"],
    ),
    (
        "true",
        ["**True**", "The statement is true.", "True, because 2 is prime.", "The answer is true."],
        ["**False**", "False.", "The statement is false."],
    ),
    ("no", ["No, it does not.", "The answer is no.", "**No**"], ["Yes, it does.", "The answer is yes.", "**Yes**."]),
    (
        "VIII",
        ["Henry VIII", "King Henry **VIII**", "Ⅷ", "viii", "\\text{VIII}"],
        ["Henry VII", "The answer is IX", "**VI**"],
    ),
    (
        "east",
        ["He faces **east**.", "The answer is east.", "East."],
        ["west", "He faces **north**.", "The answer is south."],
    ),
    (
        "not enough information",
        ["There is not enough information.", "**Not enough information**", "The answer is not enough information."],
        ["5", "The answer is 7.", "**enough**"],
    ),
    ("B", ["**B**", "The answer is **B**.", "Option B", "B. Paris"], ["**C**", "A", "D. Rome"]),
]
FORMS = [
    ("y=2x+1", ["y = 2x + 1", "y=2x+1", "2x + 1", "The answer is y = 2x + 1."], ["y = 2x - 1", "y = x + 1", "1"]),
    ("x^2-1", ["f(x) = x^2 - 1", "f(x)=x²-1"], ["f(x) = x^2 + 1", "f(x) = x - 1", "-1"]),
    (
        "36\\pi",
        ["The area is 36π.", "The area is 36π square cm.", "It is 18π*2", "The area is (72π)/2."],
        ["The area is 36.", "The area is 6π.", "The area is 36π ≈ 113.04"],
    ),
    (
        "36",
        ["√36 = 6 and 6*6 = 36", "The area is 36."],
        ["The area is 36π.", "The length is √36.", "The sum is 1 + √36"],
    ),
    ("2\\sqrt{3}", ["The length is 2√3 cm.", "x is √3*2"], ["The length is 3√2.", "It is √3.", "It is 2 + √3."]),
    (
        "540",
        ["60*3=180 and 180*3=540", "He runs 60 x 3 = 180 meters a day and 180*3 = 540 meters a week."],
        ["180*3=540 and 540/3=180", "180 and 540", "60*3=180 and 180*3=5400"],
    ),
    ("3月", ["March", "三月", "3月份", "答案是三月份"], ["4月", "April", "三"]),
    ("25", ["5²", "The answer is 5^2", "\\boxed{5^{2}}", "２５", "The answer is 5²=25"], ["5³", "2⁵", "52", "5²+1"]),
    (
        "x^2+1",
        ["x²+1", "\\boxed{x²+1}", "The answer is x²+1.", "**x² + 1**", "$x^{2}+1$", "1 + x²", "x^2 + 1", "x**2 + 1"],
        ["x³+1", "x2+1", "x²-1", "2x+1", "x²+2"],
    ),
    ("x²+1", ["x^2+1", "\\boxed{x^{2}+1}", "x²+1", "$x^2+1$"], ["x^3+1", "x^2-1", "2x+1"]),
    (
        "0.001",
        ["10⁻³", "10^{-3}", "The answer is 10⁻³.", "1×10⁻³", "1/1000", "**10⁻³**", "1e-3", "0.1%"],
        ["10³", "10⁻²", "103", "10-3"],
    ),
    ("10^{-3}", ["0.001", "10⁻³", "1 × 10⁻³", "1*10^-3"], ["10^3", "10⁻⁴", "0.01"]),
    ("10⁻³", ["0.001", "10^{-3}", "\\boxed{10^{-3}}"], ["10^3", "10⁻⁴", "0.01"]),
    ("6.02×10²³", ["6.02e23", "6.02 \\times 10^{23}", "6.02 × 10²³", "6.02*10^23"], ["6.02×10²²", "6.02e24", "6.02"]),
    (
        "1/2",
        [
            "½",
            "The answer is ½.",
            "0.5",
            "50%",
            "\\boxed{½}",
            "**½**",
            "１/２",
            "¹⁄₂",
            "1⁄2",
            "half",
            "one half",
            "二分之一",
        ],
        ["¼", "⅓", "2", "1½"],
    ),
    ("3/8", ["⅜", "The answer is ⅜", "0.375", "³⁄₈"], ["⅝", "⅞", "⅛"]),
    ("5/6", ["⅚"], ["⅙", "⅘", "⅗"]),
    ("2 1/2", ["2½", "2.5", "5/2", "二又二分之一", "2 ½"], ["2¼", "1½", "21/2"]),
    ("10", ["１０", "The answer is １０.", "ten", "十"], ["１", "１００", "０"]),
    ("14", ["14"], ["XVI", "IV", "X", "XIV"]),
    ("x_1", ["x₁", "$x_1$", "\\boxed{x_{1}}"], ["x₂", "x", "x1²"]),
    (
        "100 m²",
        ["100 m^2", "100 square meters", "100㎡", "100平方米", "**100 m²**", "100 m2"],
        ["10 m²", "100 m³", "1000 m²"],
    ),
    ("2^{10}", ["2¹⁰", "1024", "2^10"], ["2⁹", "10²", "210"]),
    ("√2", ["\\sqrt{2}", "√2", "2^{1/2}", "√(2)", "2^½"], ["√3", "2", "2²"]),
    ("∛2", ["\\sqrt[3]{2}", "2^{1/3}"], ["√2", "∛3", "2"]),
    ("100", ["10²", "10**2", "The answer is 10².", "So we get 10^2 = 100."], ["10³", "2^{10}", "102", "10*2"]),
    ("x^{-1}", ["x⁻¹", "1/x", "\\boxed{x⁻¹}", "\\frac{1}{x}"], ["x¹", "x⁻²", "-x"]),
    ("a^2b^3", ["a²b³", "\\boxed{a^2 b^3}", "**a²b³**"], ["a³b²", "a²b²", "ab"]),
    ("2^n", ["2ⁿ", "\\boxed{2^{n}}", "The answer is 2ⁿ."], ["2n", "n²", "2^{n+1}"]),
    ("5 m/s^2", ["5 m/s²", "5m/s^2", "The answer is 5 m/s²."], ["4 m/s²", "50 m/s²", "0.5 m/s²"]),
    (
        "12 cm²",
        ["12 cm^2", "12 square centimeters", "12平方厘米", "12 \\text{ cm}^2", "The area is 12 cm².", "12"],
        ["12 cm³", "12 cubic centimeters", "21 cm²", "120 cm²"],
    ),
    (
        "3.2×10⁻⁵",
        ["0.000032", "3.2e-5", "3.2 \\times 10^{-5}", "So it is 3.2 × 10⁻⁵.", "3.2·10⁻⁵"],
        ["3.2×10⁵", "3.2e-4", "3.2"],
    ),
    ("３４", ["34", "**３４**", "三十四", "34.0"], ["43", "３", "340"]),
    ("٤٢", ["42", "٤٢"], ["24", "4", "41"]),
    ("7/8", ["⅞", "**⅞**", "It is ⅞ of the cake.", "0.875"], ["⅝", "8/7", "⅛"]),
    ("-1/4", ["-¼", "−¼", "-0.25", "The answer is −¼."], ["¼", "-½", "4"]),
    ("1 3/4", ["1¾", "1 ¾", "7/4", "1.75"], ["¾", "13/4", "2¾"]),
    (
        "18",
        [
            "She makes **18** dollars every day.",
            "The answer is **18**",
            "**Answer: 18**",
            "Friday comes after Thursday. She has 18.",
            "In May she had 18.",
        ],
        ["**Step 1** 17", "19", "The total is **81**."],
    ),
    ("16", ["2⁴", "4²", "The answer is 2⁴ = 16", "2^4"], ["4³", "2⁵", "24"]),
]


def wrong_verdicts(gold, right, wrong):
    judged = [(text, judge(gold, text)["correct"], True) for text in right]
    judged += [(text, judge(gold, text)["correct"], False) for text in wrong]
    return [(text, verdict) for text, verdict, expected in judged if bool(verdict) is not expected]


@pytest.mark.parametrize(("gold", "right", "wrong"), NAMES, ids=[gold for gold, _, _ in NAMES])
def test_a_name_is_found_in_all_ways_to_say_it_and_no_other_name_is_right(gold, right, wrong):
    assert len(wrong) >= 3
    assert wrong_verdicts(gold, right, wrong) == []


@pytest.mark.parametrize(("gold", "right", "wrong"), FORMS, ids=[gold for gold, _, _ in FORMS])
def test_signs_of_typesetting_mean_what_they_mean_in_latex(gold, right, wrong):
    assert len(wrong) >= 3
    assert wrong_verdicts(gold, right, wrong) == []


def test_names_in_a_box_or_alone_count_where_only_marked_answers_do():
    assert judge("Paris", r"\\boxed{Paris}", marked_only=True)["correct"] is True
    assert judge("Paris", "It is **Paris**.", marked_only=True)["correct"] is False
    assert judge("Tuesday", "So it is on Tuesday.", marked_only=True)["correct"] is False


def test_a_response_that_was_cut_off_has_no_name_in_its_last_words():
    assert judge("Paris", "The capital is Paris", broken_off=True)["correct"] is False
    assert judge("Paris", "The capital is **Paris**, a city on the", broken_off=True)["correct"] is True


@pytest.mark.parametrize("module", [dates, named, signs, units], ids=lambda module: module.__name__)
def test_examples_in_docstrings_run(module):
    assert doctest.testmod(module).failed == 0
