r"""Writes `pairs.jsonl`: completions, expected answers, and by our own reading whether they agree.

    python tests/golden/answers/make.py

The forms are those of GSM8K (a number, `####`), MATH (LaTeX in a box), DAPO (`Answer:`, whole numbers) and
Countdown (an expression in `<answer>`). Numbers are multiplied out over the ways in which they are
written; what has a form of its own stands in a list. `right` is decided here, by hand, and by no program.
`compare.py` says where math-verify decides otherwise, and why.
"""

import json
from collections.abc import Iterator
from pathlib import Path

Row = tuple[str, str, str, bool]
"""Family, completion, expected answer, whether it is right."""

# How one number is written: what is expected, writings that are right, and some that are not.
NUMBERS: list[tuple[str, list[str], list[str]]] = [
    (
        "18",
        [
            "18",
            r"\$18",
            "$18",
            "18.0",
            "18.00",
            "+18",
            r"\text{18}",
            "18.",
            r"18\text{ cm}",
            "18 apples",
            r"\$18.00",
        ],
        ["81", "-18", "180", "1.8", "18.5", r"\$19", "17"],
    ),
    ("-7", ["-7", "−7", "-7.0", r"\left(-7\right)", "-7 degrees", r"-\frac{14}{2}"], ["7", "-7.5", "70"]),
    (
        r"\$32,\!348",
        [
            "32348",
            "32,348",
            r"32,\!348",
            r"\$32,\!348",
            r"32{,}348",
            r"32\,348",
            "32 348",
            "$32,348.00",
            "32'348",
            r"\$32{,}348",
        ],
        ["32.348", "3,2348", "32,384", "32"],
    ),
    (
        "1234567",
        [
            "1,234,567",
            r"1{,}234{,}567",
            r"1,\!234,\!567",
            "1 234 567",
            "1.234.567",
            "1234567.0",
            "1_234_567",
            r"1.234567 \times 10^6",
        ],
        ["1,234,568", "1.234567", "1234,567"],
    ),
    (
        r"\frac{3}{4}",
        [
            r"\frac{3}{4}",
            r"\dfrac{3}{4}",
            r"\tfrac34",
            r"\frac34",
            "3/4",
            "0.75",
            ".75",
            r"\frac{6}{8}",
            "¾",
            r"75\%",
        ],
        [r"\frac{4}{3}", "3.4", "0.7", "3", "4"],
    ),
    (
        "3.5",
        ["3.5", r"3\frac{1}{2}", "3 1/2", "7/2", r"\frac{7}{2}", "3½", "3.50", r"3.5\text{ hours}"],
        ["35", "3.05", r"\frac{31}{2}", "3"],
    ),
    (
        r"50\%",
        [r"50\%", "50%", "50", "50.0%", "50 percent", r"50\text{ percent}", "0.5"],
        ["5%", "500%", "0.05", "51"],
    ),
    (
        "120000",
        [
            "1.2e5",
            r"1.2 \times 10^5",
            r"1.2\times10^{5}",
            r"1.2 \cdot 10^{5}",
            "1.2*10^5",
            "1.2 × 10⁵",
            "120,000",
            r"120\,000",
            "120 thousand",
        ],
        ["1.2e4", "12000", r"1.2 \times 10^6", "1.2"],
    ),
    (
        r"90^\circ",
        ["90", r"90^\circ", r"90^{\circ}", "90°", "90 degrees", r"90\text{ degrees}", r"90\degree"],
        ["9", "180", r"\frac{\pi}{2}"],
    ),
    (
        "72",
        [
            "72",
            r"72\text{ clips}",
            "72 clips",
            r"\mathbf{72}",
            r"\textbf{72}",
            r"\mathrm{72}",
            "７２",
            r"72\ \text{cm}^2",
            r"72 \text{ square inches}",
        ],
        ["27", "7.2", "72,5"],
    ),
]

FRAMES: list[tuple[str, str]] = [
    ("MATH", r"Let us see. So it is \boxed{%s}."),
    ("MATH", r"$\boxed{%s}$"),
    ("tags", "<think>first 3, then 4</think><answer>%s</answer>"),
    ("GSM8K", "She has 3 and then 4 of them.\n#### %s"),
    ("DAPO", "First 3, then 4.\n\nAnswer: %s"),
    ("sentence", "We begin with 3. The answer is %s."),
]

GOLDS = ["%s", r"\boxed{%s}", "#### %s", "<answer>%s</answer>", "So 3 and 4 are added.\n#### %s"]
"""Markup around the expected answer, as datasets have it."""

MATH: list[tuple[str, list[str], list[str]]] = [
    ("x=5", ["5", "x=5", "x = 5", r"x=5.0", r"x = \frac{10}{2}"], ["6", "x=6", "y=5", "x=-5"]),
    ("5", ["x=5", "x = 5", r"\text{Total} = 5", r"f(x) = 5", "3+2=5", r"x_1 = 5"], ["x=6", "5=6", "3+2=6"]),
    ("y = 2x + 3", ["2x+3", "y=2x+3", "y = 3 + 2x"], ["y=2x-3", "2x", "y=3x+2"]),
    (
        r"2\sqrt{2}",
        [r"2\sqrt{2}", r"\sqrt{8}", r"2 \sqrt 2", r"2\cdot\sqrt{2}"],
        [r"\sqrt{2}", "2", r"4\sqrt{2}", r"2\sqrt{3}"],
    ),
    (r"\pi", [r"\pi", "π"], ["3", r"2\pi", "3.14"]),
    (
        r"\frac{\sqrt{3}}{2}",
        [r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt3}{2}", r"\sqrt{3}/2"],
        [r"\frac{3}{2}", r"\frac{\sqrt{2}}{3}"],
    ),
    ("(x+1)^2", ["(x+1)^2", "x^2+2x+1", "x^{2}+2x+1", r"\left(x+1\right)^2"], ["x^2+2x", "x^2+1", "(x-1)^2"]),
    (
        "(1, 2)",
        ["(1,2)", r"\left(1, 2\right)", r"\left( 1,\, 2 \right)", "(1.0, 2)", r"(\frac{2}{2}, 2)"],
        ["(2,1)", "(1,2,3)", "(1,3)", "[1,2]", "12"],
    ),
    (
        r"\left( \frac{3}{5}, \frac{8}{3} \right)",
        [r"(\frac35, \frac83)", "(3/5, 8/3)", "(0.6, 8/3)"],
        ["(8/3, 3/5)", "(3/5, 3/8)"],
    ),
    (
        r"\{1, 2, 3\}",
        [r"\{1,2,3\}", r"\{3, 2, 1\}", r"\left\{1, 2, 3\right\}", "1, 2, 3"],
        [r"\{1,2\}", r"\{1,2,4\}", "(1,2,3)"],
    ),
    (
        "1, -2",
        [
            "1, -2",
            "-2, 1",
            "1,-2",
            r"1 \text{ and } -2",
            "x=1, x=-2",
            r"x = 1 \text{ or } x = -2",
            r"\{1, -2\}",
        ],
        ["1", "-2", "1, 2", "-1, 2"],
    ),
    (
        "[0, 1)",
        ["[0,1)", r"\left[0, 1\right)", "[0, 1.0)", r"x \in [0,1)"],
        ["(0,1)", "[0,1]", "(0,1]", "[0,2)"],
    ),
    (
        r"(-\infty, 1) \cup (2, \infty)",
        [r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1) \cup (2,+\infty)", "(-∞,1)∪(2,∞)"],
        [r"(-\infty,1)", r"(-\infty,1]\cup(2,\infty)", r"(-\infty,2)\cup(1,\infty)"],
    ),
    (r"\pm 3", [r"\pm 3", "3, -3", r"x = \pm 3", "±3"], ["3", "-3"]),
    (
        r"1 \pm \sqrt{2}",
        [r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}", r"1 - \sqrt 2, 1 + \sqrt 2"],
        [r"1+\sqrt{2}", r"1 \pm \sqrt{3}"],
    ),
    (
        r"\text{Paris}",
        ["Paris", r"\text{Paris}", "paris", r"\textbf{Paris}", r"\text{ Paris }"],
        ["Pairs", "London", r"\text{Lyon}"],
    ),
    (
        r"\text{(C)}",
        ["C", "(C)", r"\text{C}", r"\text{(C)}", r"\textbf{(C)}", r"\mathrm{C}"],
        ["D", "(B)", "c+1"],
    ),
    (r"\text{even}", ["even", r"\text{even}", "Even"], ["odd", "never"]),
    (r"5:00 \text{ p.m.}", [r"5:00\text{ p.m.}", "5:00 pm", "5:00 PM"], ["5:00 am", "6:00 pm"]),
    (
        r"12\text{ cm}",
        ["12", "12 cm", r"12\,\text{cm}", r"12 \mathrm{cm}", "12 centimeters", "12cm"],
        ["12 m", r"12\text{ km}", "1.2 cm"],
    ),
    (r"6\text{ square units}", ["6", r"6\text{ square units}", r"6 \text{ units}^2"], ["36", "3"]),
    ("16", ["2^4", "2^{4}", r"4 \times 4", "8+8", r"\frac{32}{2}"], ["2^5", "4^4", r"\sqrt{16}+1"]),
    (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"],
        [r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"],
    ),
    ("x > 3", ["x > 3", "x>3", "3 < x"], ["x < 3", r"x \ge 3", "3"]),
    (r"3x^2 - 5", ["3x^2-5", "3x^{2} - 5", "-5 + 3x^2"], ["3x^2+5", "3x-5"]),
    ("2+3i", ["2+3i", "3i+2", "2 + 3i"], ["2-3i", "3+2i", "5"]),
    ("3:4", ["3:4", "3 : 4"], ["4:3", "34"]),
    (r"\frac{a}{b}", [r"\frac{a}{b}", "a/b", r"\dfrac{a}{b}"], [r"\frac{b}{a}", "ab"]),
    ("0", ["0", "0.0", "-0", r"\$0"], ["1", "", "none"]),
    (r"10^{-3}", [r"10^{-3}", "0.001", "1/1000", "1e-3"], ["0.01", "1000"]),
    (r"2^{100}", ["2^{100}", "1267650600228229401496703205376"], ["2^{101}", "9^{9^{9^9}}"]),
]

# A whole completion: how it ends, several marks, thoughts, prose.
WHOLE: list[Row] = [
    ("cut off", r"So it is \boxed{7", "7", False),
    ("cut off", r"First 7. So it is \boxed{", "7", False),
    ("cut off", r"So it is \boxed{\frac{1}{2}", r"\frac{1}{2}", False),
    ("cut off", r"Is it \boxed{7}? No, \boxed{7", "7", False),
    ("cut off", "<answer>7", "7", False),
    ("cut off", "<answer>7</answer> or <answer>7", "7", False),
    ("cut off", r"<answer>\boxed{7}", "7", False),
    ("cut off", "<think>it must be 7", "7", False),
    ("cut off", r"<think>it must be \boxed{7}", "7", False),
    ("cut off", "<think>7</think>", "7", False),
    ("cut off", "It is 7.\nAnswer:", "7", False),
    ("cut off", "It is 7.\n####", "7", False),
    ("several", r"\boxed{6}, no: \boxed{7}", "7", True),
    ("several", r"\boxed{7}, no: \boxed{6}", "7", False),
    ("several", "<answer>6</answer><answer>7</answer>", "7", True),
    ("several", "#### 6\n#### 7\n", "7", True),
    ("several", r"There are 7 of them, so \boxed{6}", "7", False),
    ("several", r"There are 6 of them, so \boxed{7}. Check: 3 + 4", "7", True),
    ("several", "<answer>6 or 7</answer>", "7", False),
    ("several", r"\boxed{6 \text{ or } 7}", "7", False),
    ("several", r"<think>\boxed{6}</think> It is \boxed{7}.", "7", True),
    ("several", r"<think>\boxed{7}</think> It is \boxed{6}.", "7", False),
    ("several", r"<think>6</think> It is 7.", "7", True),
    ("several", r"<answer>\boxed{7}</answer>", "7", True),
    ("several", r"\boxed{\boxed{7}}", "7", True),
    ("several", r"\fbox{7}", "7", True),
    ("several", r"\boxed 7", "7", True),
    ("several", r"Answer: $\boxed{7}$", "7", True),
    ("several", r"**Answer:** 7", "7", True),
    ("several", "**Final Answer**: $7$", "7", True),
    ("several", "Final Answer: The final answer is 7. I hope it is correct.", "7", True),
    ("several", "答案：7", "7", True),
    ("several", "所以答案是 7。", "7", True),
    ("several", "#### Step 1\nWe add.\n#### Step 2\nSo it is 7.", "7", True),
    ("several", "#### Step 7\nSo it is 6.", "7", False),
    ("prose", "So she has 7.", "7", True),
    ("prose", "So she has 7 apples.", "7", True),
    ("prose", "So she pays $7.", "7", True),
    ("prose", r"So she pays \$7.", "7", True),
    ("prose", "So it is 50%.", "50", True),
    ("prose", r"So it is 50\%.", r"50\%", True),
    ("prose", "So it weighs 12kg.", "12", True),
    ("prose", r"So the chance is $\frac{1}{2}$.", r"\frac{1}{2}", True),
    ("prose", r"So the chance is $\frac{1}{2}$.", "2", False),
    ("prose", r"So the side is $2\sqrt{3}$.", "3", False),
    ("prose", r"So the side is $2\sqrt{3}$.", "2", False),
    ("prose", r"So the side is $2\sqrt{3}$.", r"2\sqrt{3}", True),
    ("prose", "So it is 32,348 in all.", "32348", True),
    ("prose", r"So it is $32,\!348$ in all.", "32348", True),
    ("prose", "So it is 348 in all.", "32348", False),
    ("prose", "7 was the first, 6 the last", "7", False),
    ("prose", "12+7=19", "19", True),
    ("prose", "<answer>The total is 7 apples.</answer>", "7", True),
    ("prose", "<answer>The total is 6 apples.</answer>", "7", False),
    ("prose", "<answer>six</answer> 7", "7", False),
    ("prose", "so we find $x=3$", "x=3", True),
    ("prose", "so we find $x=3$", "3", True),
    ("prose", "", "7", False),
    ("prose", "   ", "7", False),
    ("prose", "I do not know.", "7", False),
    ("Countdown", "<think>3 and 5</think>\n<answer>(3 + 5) * 2</answer>", "16", True),
    ("Countdown", "<think>3 and 5</think>\n<answer>(3 + 5) * 2 = 16</answer>", "16", True),
    ("Countdown", "<think>3 and 5</think>\n<answer>3 + 5 * 2</answer>", "16", False),
    ("Countdown", "<answer>96 / (7 - 1)</answer>", "16", True),
    ("Countdown", "<answer>96 ÷ 6</answer>", "16", True),
    ("Countdown", r"<answer>8 \times 2</answer>", "16", True),
    ("Countdown", "<answer>8 x 2</answer>", "16", True),
    ("Countdown", "<answer>(44 - 19) + 35</answer>", "60", True),
    ("Countdown", "<answer>(44 - 19) + 36</answer>", "60", False),
    ("Countdown", "<answer>16 / 0</answer>", "16", False),
    ("Countdown", "<answer>44 - (19 + 35</answer>", "60", False),
    (
        "GSM8K",
        "She sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72",
        "72",
        True,
    ),
    ("GSM8K", "Natalia sold 48+24 = 72 clips.", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", True),
    ("GSM8K", "Natalia sold 48+24 = 73 clips.", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", False),
    (
        "MATH",
        r"Thus $\boxed{\frac{3}{4}}$.",
        r"We have $x = 3$, so the answer is $\boxed{\frac{3}{4}}$.",
        True,
    ),
]


def rows() -> Iterator[Row]:
    """All of them."""
    for expected, right, wrong in NUMBERS:
        for index, writing in enumerate([*right, *wrong]):
            for form, frame in FRAMES:
                yield form, frame % writing, expected, index < len(right)
    for gold in GOLDS[1:]:
        for expected, right, wrong in NUMBERS:
            yield "gold in markup", FRAMES[0][1] % right[1], gold % expected, True
            yield "gold in markup", FRAMES[3][1] % wrong[0], gold % expected, False
    for expected, right, wrong in MATH:
        for index, writing in enumerate([*right, *wrong]):
            yield "MATH", FRAMES[0][1] % writing, expected, index < len(right)
    yield from WHOLE


def main() -> None:
    """Write the table."""
    table = Path(__file__).with_name("pairs.jsonl")
    with table.open("w", encoding="utf-8") as lines:
        for form, completion, expected, right in rows():
            row = {"form": form, "completion": completion, "expected": expected, "right": right}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
