"""A vocabulary that went over the wire spells as the file that it came from."""

from __future__ import annotations

import pytest
from gguf import GGUFReader
from hypothesis import example, given
from hypothesis import strategies as st

from qcat.backends.llama import LlamaModel
from qcat.classifier import DEFAULT_MODEL
from qcat.errors import BundleError
from qcat.gguf.bundle import Bundle
from qcat.gguf.vocabulary import write_vocabulary


@pytest.fixture(scope="module")
def metadata():
    """All of the shipped model's metadata, as Ollama's /api/show gives it."""
    fields = GGUFReader(DEFAULT_MODEL).fields.values()
    return {field.name: field.contents() for field in fields}


@pytest.fixture(scope="module")
def both(metadata, tmp_path_factory):
    """The file and the copy of its vocabulary, opened."""
    path = tmp_path_factory.mktemp("vocabulary") / "copy.gguf"
    write_vocabulary(path, metadata)
    assert Bundle.read(path).task == Bundle.read(DEFAULT_MODEL).task
    with LlamaModel(DEFAULT_MODEL) as whole, LlamaModel(path, vocab_only=True) as copy:
        yield whole, copy


@given(text=st.text(max_size=60), special=st.booleans())
@example(text="<|im_end|> 水泵 🏊‍♀️ don't  \n?", special=True)
def test_it_spells_as_the_file_does(both, text, special):
    whole, copy = both
    text = text.encode("utf-8", "replace").decode()
    ids = whole.encode(text, special=special)
    assert copy.encode(text, special=special) == ids
    assert copy.decode(ids) == whole.decode(ids)
    assert copy.end == whole.end


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.tokens", None),
        ("tokenizer.ggml.tokens", {"a": 1}),
        ("tokenizer.ggml.tokens", ["a", 3]),
        ("tokenizer.ggml.token_type", ["normal", 1]),
        ("tokenizer.ggml.token_type", [1 << 40]),
        ("tokenizer.ggml.eos_token_id", -1),
        ("tokenizer.ggml.eos_token_id", 1.5),
        ("tokenizer.ggml.pre", "\ud800"),
    ],
)
def test_what_no_vocabulary_holds_is_refused(metadata, key, value, tmp_path):
    with pytest.raises(BundleError, match="is not what qcat writes"):
        write_vocabulary(tmp_path / "v.gguf", {**metadata, key: value})
    assert not (tmp_path / "v.gguf").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.tokens", ["a", "a"], "twice"),
        ("tokenizer.ggml.model", "llama", "tokenizer 'llama'"),
        ("general.architecture", "gemma", "architecture 'gemma'"),
        ("qcat.task", "{}", "'name' is missing"),
        ("qcat.task", "[", "not a JSON object"),
    ],
)
def test_what_llama_cpp_could_not_bear_is_found(metadata, key, value, message, tmp_path):
    write_vocabulary(tmp_path / "v.gguf", {**metadata, key: value})
    with pytest.raises(BundleError, match=message):
        Bundle.read(tmp_path / "v.gguf")
