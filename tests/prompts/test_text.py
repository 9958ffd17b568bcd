"""The wrapping of text prompts."""

import pytest

from finetune.prompts.text import wrap_system_prompt


@pytest.mark.parametrize("text, wrapped", [
    (" You are Ada. ", "<system> You are Ada. <system>"),
    (" <system> You are Ada. <system>\n", "<system> You are Ada. <system>"),
    ("<system> half", "<system> <system> half <system>"),
    ("half <system>", "<system> half <system> <system>"),
    ("  ", ""),
])  # fmt: skip
def test_text_is_wrapped_once(text, wrapped):
    assert wrap_system_prompt(text) == wrap_system_prompt(wrapped) == wrapped
