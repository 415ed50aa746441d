"""Texts on which tokenizers differ, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

PIECES = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>",
        "<think>",
        "</think>",
        "<|endoftext|>",
        "?\n",
        "'s",
        "'RE",
        "  ",
        "\r\n",
        "123",
        "…",
        "e\u0301",
        "한국어",
        "שלום",
        "👩\u200d🔧",
        "Å",
        "\u00a0",
        "\t",
        "!?",
        "\ufeff",
        "ﬁ",
    ]
)
TEXT = st.lists(st.one_of(PIECES, st.text(max_size=12)), max_size=8).map("".join)
