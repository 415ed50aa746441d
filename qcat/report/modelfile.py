"""A task and its prompt as an Ollama Modelfile, and as the minimal chat template of the GGUF.

Pure text. Ollama's Modelfile parser drops what Go does not count as printable, ends a quoted text
at three quotes, and reads TEMPLATE as a Go text/template (Ollama 0.32: parser/parser.go,
template/template.go); all three are escaped here. Ollama prefers the GGUF's chat template when it
finds the words of tools or thinking in it (server/images.go), so those are broken up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qcat.encoding.encoded import EncodedTask
from qcat.encoding.prompt import QUESTION_ROOM, Prompt, Vocabulary
from qcat.errors import ExportError
from qcat.task import Task

_CTX_STEP = 256  # llama.cpp rounds contexts up to this
_RUNS = re.compile(r'\{+|"{2,}')
_CAPABILITY_WORDS = re.compile(r"(?<=t)(?=ools|ool_call)|(?<=<t)(?=hink>)|(?<=</t)(?=hink>)")
_TEMPLATE = re.compile(r'^TEMPLATE """(.*?)"""$', re.DOTALL | re.MULTILINE)
# The last message alone: with {{ .Prompt }} Ollama would put what was said before in front of it.
_QUESTION = (
    "{{ range $i, $m := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}"
    "{{ $m.Content }}{{ end }}{{ end }}"
)
_ACTION = re.compile(rf'({re.escape(_QUESTION)})|\{{\{{ ("(?:[^"\\]|\\.)*") \}}\}}')


def parameters(encoded: EncodedTask, vocabulary: Vocabulary) -> dict[str, Any]:
    """Ollama's parameters for a task in a model's vocabulary, by name."""
    trie = encoded.trie
    n_answer = max(len(sequence) for sequence in trie.sequences)
    # In quotes, as qcat may have it written under a JSON schema, an answer takes more.
    answers = [vocabulary.decode(sequence) for sequence in trie.sequences]
    spelled = max(len(vocabulary.encode(json.dumps(a), special=False)) for a in answers)
    cells = len(encoded.prefix) + QUESTION_ROOM + 2 * spelled
    return {
        "temperature": 0,
        # Ollama's /v1 endpoints set temperature 1 where the client sends none; this they leave.
        "top_k": 1,
        # Ollama's penalty would look at the prompt's end, where the labels stand.
        "repeat_penalty": 1,
        "num_predict": n_answer + 1,
        "num_ctx": -(-cells // _CTX_STEP) * _CTX_STEP,
        "stop": [vocabulary.decode([trie.end])],
    }


def modelfile(
    task: Task,
    prompt: Prompt,
    *,
    gguf: str,
    parameters: Mapping[str, Any],
    base: str | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        task: the task, for its name.
        prompt: its prompt.
        gguf: file name of the GGUF beside the Modelfile.
        parameters: as `parameters` gives them.
        base: where the GGUF is an adapter: what it lies beside, a path or a model's name in Ollama.
    """
    source = [f"FROM ./{gguf}"] if base is None else [f"FROM {base}", f"ADAPTER ./{gguf}"]
    return "\n".join(
        [
            f"# Task {task.name}, made by qcat. Create the model, then ask:",
            f"#   ollama create {task.name} -f Modelfile",
            f'#   ollama run {task.name} "…"',
            *source,
            f'TEMPLATE """{go_template(prompt)}"""',
            *(
                f'PARAMETER {name} "{value[0]}"'
                if isinstance(value, list)
                else f"PARAMETER {name} {value}"
                for name, value in parameters.items()
            ),
            "",
        ]
    )


def go_template(prompt: Prompt) -> str:
    """The prompt as a Go template: the last message is the question, the rest ignored."""
    before, after = _around(prompt)
    return f"{_go_text(before)}{_QUESTION}{_go_text(after)}"


def chat_template(prompt: Prompt) -> str:
    """The prompt as a Jinja chat template: the last message is the question, the rest ignored."""
    before, after = _around(prompt)
    return f"{_jinja_text(before)}{{{{ messages[-1]['content'] }}}}{_jinja_text(after)}"


def render(text: str, question: str) -> str:
    """What Ollama makes of a Modelfile and a question: its TEMPLATE, carried out.

    Only the actions that `go_template` writes are known, so that a slip in it is an error here
    and not another prompt there.

    Raises:
        ExportError: no TEMPLATE, or an action that is not one of these.
    """
    found = _TEMPLATE.search(text)
    if not found:
        raise ExportError("the Modelfile has no TEMPLATE")
    pieces, at = [], 0
    for action in _ACTION.finditer(found[1]):
        pieces += [found[1][at : action.start()], question if action[1] else _unquoted(action[2])]
        at = action.end()
    pieces.append(found[1][at:])
    if any("{{" in piece for piece in (found[1][at:], *pieces[:-1:2])):
        raise ExportError("the Modelfile's TEMPLATE holds an unknown action")
    return "".join(pieces)


def _around(prompt: Prompt) -> tuple[str, str]:
    prefix = "".join(segment.text for segment in prompt.prefix)
    return prefix + prompt.before, "".join(segment.text for segment in prompt.after)


def _go_text(text: str) -> str:
    text = _RUNS.sub(lambda run: _go_string(run[0]), text)
    return "".join(
        char if char.isprintable() or char == "\n" else _go_string(char) for char in text
    )


def _unquoted(text: str) -> str:
    """The value of a Go string that `_go_string` wrote."""
    return re.sub(
        r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|(.))",
        lambda escape: escape[3] or chr(int(escape[1] or escape[2], 16)),
        text[1:-1],
    )


def _go_string(text: str) -> str:
    escaped = "".join(
        char
        if char.isprintable() and char not in '"\\'
        else f"\\{char}"
        if char in '"\\'
        else f"\\u{ord(char):04x}"
        if ord(char) < 0x10000
        else f"\\U{ord(char):08x}"
        for char in text
    )
    return f'{{{{ "{escaped}" }}}}'


def _jinja_text(text: str) -> str:
    text = re.sub(r"\{+", lambda run: f"{{{{ '{run[0]}' }}}}", text)
    text = _CAPABILITY_WORDS.sub("{{ '' }}", text)
    if text.endswith("\n"):  # Jinja drops a template's last line break
        bare = text.rstrip("\n")
        text = bare + "{{ '" + "\\n" * (len(text) - len(bare)) + "' }}"
    return text
