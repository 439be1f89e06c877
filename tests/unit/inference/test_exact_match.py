"""The final answer of a text."""

import pytest

from megatron.sft.inference.exact_match import final_answer


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("<short> Ada  Tom\n", "Ada Tom"),
        ("<think> Tom. </think> Ada Tom", "Ada Tom"),
        ("<think> a </think> b </think>\n\nc", "c"),
        ("<think> Tom. Add Ada", ""),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_final_answer_is_what_comes_after_the_thinking(text, final):
    assert final_answer(text, ["<short>", "<think>", "</think>"]) == final
