"""What export would have `convert` do, for tests that look at its parts."""

from __future__ import annotations

from qcat_convert.source import locate
from qcat_convert.stream import Job
from qcat_convert.vocab import read_vocabulary

from qcat.encoding.prompt import build_prompt, encode_answers, encode_segments
from qcat.encoding.tokenization import HubTokenizer
from qcat.encoding.trie import LabelTrie


def job_of(task, target, adapter, base=None, training=(), held_out=(), **more):
    """A job with these questions; `more` takes the place of what it would say."""
    source = locate(adapter, base and str(base))
    tokenizer = HubTokenizer(source.tokenizer_folder)
    prompt = build_prompt(task, tokenizer)

    def rests(questions):
        return [encode_segments(prompt.rest(text), tokenizer) for text in questions]

    said = {
        "source": source,
        "target": target,
        "precision": "f16",
        "task": task,
        "vocabulary": read_vocabulary(tokenizer, source.vocabulary_rows),
        "rows": None,
        "chat_template": "",
        "made_from": {},
        "prefix": encode_segments(prompt.prefix, tokenizer),
        "trie": LabelTrie.build(encode_answers(task, tokenizer), tokenizer.end),
        "training": rests(training),
        "held_out": rests(held_out),
    }
    return Job(**said | more)
