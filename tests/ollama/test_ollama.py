"""A real Ollama server: `ollama create` and `qcat deploy`, the same prompt and the same answers.

`make test-ollama` installs the server (tests/ollama/install.sh) and runs what is marked here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error

import numpy as np
import pytest
from conftest import EXAMPLE, REAL_TOKENIZER, ROOT
from ollama_server import (
    PROGRAM,
    QCAT,
    Server,
    command,
    create,
    free_port,
    get,
    needs_ollama,
    ollama_server,
    post,
)

from qcat import Classifier
from qcat.backends.llama import LlamaModel
from qcat.classifier import DEFAULT_MODEL
from qcat.data.dataset import read_examples
from qcat.encoding.encoded import EncodedTask
from qcat.errors import ExportError, QuestionError
from qcat.gguf.bundle import Bundle
from qcat.workflows.deploy import deploy

TIE = 0.1  # by how much Ollama's flash attention moves a probability, at most

pytestmark = needs_ollama


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server that computes as llama.cpp does here (no flash attention)."""
    with ollama_server(tmp_path_factory.mktemp("server"), OLLAMA_FLASH_ATTENTION="0") as found:
        yield found


@pytest.fixture(scope="session")
def household_run(tmp_path_factory):
    """The household model, trained anew for one epoch."""
    folder = tmp_path_factory.mktemp("household") / "run"
    args = [EXAMPLE / "questions.jsonl", "-t", EXAMPLE / "task.toml", "-o", folder]
    recipe = (
        "--method lora --epochs 1 --batch-size 32 --learning-rate 5e-4 --rank 32 --train-embeddings"
    )
    base = ROOT / "examples" / "base" / "model"
    subprocess.run([QCAT, "train", *args, "--base", base, *recipe.split()], check=True)
    return folder


@pytest.fixture(scope="session")
def dist(server, household_run):
    """Its bundle, deployed as `house` by `qcat export --ollama`; and what that printed."""
    folder = household_run.with_name("dist")
    done = command(
        server,
        QCAT,
        "export",
        household_run,
        "-o",
        folder,
        "--quant",
        "q4_k_m",
        "--max-flips",
        0.1,
        "--ollama",
        "house",
    )
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="session")
def test_split(household_run, household):
    """Questions that the model was not trained on, and their labels."""
    labels = list(household.labels)
    rows = read_examples(household_run / "test.jsonl", household)
    return [(row.text, labels[row.label]) for row in rows]


def expected_ids(gguf, question):
    """The training prompt's token ids."""
    bundle = Bundle.read(gguf)
    with LlamaModel(gguf, vocab_only=True) as model:
        encoded = EncodedTask.served(bundle.task, model, str(gguf))
        return [*encoded.prefix, *encoded.ids(question)]


def ids_of(gguf, text):
    """Token ids of a whole prompt, special tokens obeyed, as Ollama reads it."""
    with LlamaModel(gguf, vocab_only=True) as model:
        return model.encode(text, special=True)


QUESTIONS = (
    "When was the pool pump replaced?",
    "12 'é'… \"{{ .Prompt }}\" {% x %} \\n",
    "水泵什么时候换的？",
)


def test_export_deploys_and_says_so(dist, server):
    _, done = dist
    assert "house on http://" in done.stdout
    assert "prompts equal to the training prompt, token for token" in done.stdout
    names = [model["name"] for model in get(server, "/api/tags")["models"]]
    assert names == ["house:latest"]  # and nothing of the trial


def test_ollama_create_then_run_prints_the_label(dist, server, test_split):
    create(server, "by-hand", dist[0])
    said = []
    for question, label in test_split[:80]:
        done = command(server, PROGRAM, "run", "by-hand", question)
        assert done.returncode == 0, done.stderr
        said.append((done.stdout.strip(), label))
    assert sum(answer == label for answer, label in said) >= 50
    known = set(Bundle.read(dist[0] / "household.gguf").task.labels)
    assert sum(answer in known for answer, _ in said) >= 78


def test_here_and_there_agree_on_every_label(dist, server, test_split):
    questions = [question for question, _ in test_split]
    assert len(questions) > 700
    with Classifier.open(dist[0] / "household.gguf") as here, Classifier.open("ollama:house") as o:
        own, other = [here.ask(q) for q in questions], list(o.ask_many(questions))
    assert [p.label for p in other] == [p.label for p in own]
    exact = [(p, q) for p, q in zip(own, other, strict=True) if q.exact]
    assert len(exact) > 20
    for p, q in exact:
        assert q.probabilities == pytest.approx(p.probabilities, abs=1e-2)
        assert q.label_mass == pytest.approx(p.label_mass, abs=1e-2)
        assert (q.margin, q.entropy) == pytest.approx((p.margin, p.entropy), abs=1e-2)
    for p, q in zip(own, other, strict=True):
        # What is not known is bounded: a label seen has at least this, one not seen at most.
        assert q.confidence == pytest.approx(p.confidence, abs=0.1)
        assert q.confidence <= p.confidence + 1e-3
        assert q.label_mass <= p.label_mass + 1e-3
        assert next(iter(q.probabilities)) == q.label


def test_the_truth_is_within_the_bounds(dist, server, test_split):
    labels = list(Bundle.read(dist[0] / "household.gguf").task.labels)
    with (
        Classifier.open(dist[0] / "household.gguf", calibrated=False) as here,
        Classifier.open("ollama:house") as o,
    ):
        questions = [question for question, _ in test_split[::8]]
        found = o._scorer.score([o._encode(question)[0] for question in questions])
        for question, bounds in zip(questions, found, strict=True):
            truth = np.array([here.ask(question).probabilities[label] for label in labels])
            assert (bounds.lower <= truth + 1e-3).all()
            assert (bounds.upper >= truth - 1e-3).all()
            assert np.median(bounds.upper - bounds.lower) < 0.05  # and they say something


def test_a_server_as_it_is_started_agrees_but_for_near_ties(dist, tmp_path, test_split):
    """By default Ollama's attention sums in float16, which moves what is nearly even."""
    questions = [question for question, _ in test_split[:400]]
    with ollama_server(tmp_path / "default") as server:
        create(server, "house", dist[0])
        gguf = dist[0] / "household.gguf"
        with Classifier.open(gguf) as here, Classifier.open("ollama:house") as there:
            pairs = list(zip(map(here.ask, questions), there.ask_many(questions), strict=True))
    assert all(p.margin < TIE for p, q in pairs if p.label != q.label)
    assert sum(p.label != q.label for p, q in pairs) <= 8
    assert max(abs(p.confidence - q.probabilities[p.label]) for p, q in pairs) < TIE


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "gemma3"])
@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("verbalizer", ["name", "code"])
def test_every_prompt_is_the_training_prompt(
    kind, style, verbalizer, server, bundle_file, household
):
    """For /api/generate and /api/chat by rendering, and by the tokens that the server counted."""
    task = household.replace(
        style=style, verbalizer=verbalizer, name=f"{kind}-{style}-{verbalizer}"
    )
    gguf = bundle_file(task, kind)
    create(server, task.name, gguf.parent)
    for question in QUESTIONS:
        expected = expected_ids(gguf, question)
        _, generate = post(
            server, "/api/generate", model=task.name, prompt=question, _debug_render_only=True
        )
        assert ids_of(gguf, generate["_debug_info"]["rendered_template"]) == expected
        message = {"role": "user", "content": question}
        before = [
            [],
            [{"role": "system", "content": "Be brief."}],
            [{"role": "user", "content": "pool?"}, {"role": "assistant", "content": " pool"}],
        ]
        for earlier in before:  # what was said before is not what is asked
            messages = [*earlier, message]
            _, chat = post(
                server, "/api/chat", model=task.name, messages=messages, _debug_render_only=True
            )
            assert ids_of(gguf, chat["_debug_info"]["rendered_template"]) == expected
        _, answer = post(server, "/api/generate", model=task.name, prompt=question)
        assert answer["context"][: len(expected)] == expected
        _, v1 = post(server, "/v1/chat/completions", model=task.name, messages=[message])
        assert v1["usage"]["prompt_tokens"] == len(expected)


def test_the_openai_endpoint_sees_the_training_prompt(dist, server):
    """It shows no prompt, but its log-probabilities are those of the training prompt."""
    gguf = dist[0] / "household.gguf"
    for question in QUESTIONS[:2]:
        with LlamaModel(gguf, vocab_only=True) as model:
            text = model.decode(expected_ids(gguf, question))
        top = {"logprobs": True, "top_logprobs": 5}
        _, raw = post(server, "/api/generate", model="house", prompt=text, raw=True, **top)
        messages = [{"role": "user", "content": question}]
        _, v1 = post(server, "/v1/chat/completions", model="house", messages=messages, **top)
        found = v1["choices"][0]["logprobs"]["content"][0]
        assert [t["token"] for t in found["top_logprobs"]] == [
            t["token"] for t in raw["logprobs"][0]["top_logprobs"]
        ]
        # It sets temperature 1 where none is sent: greedy all the same.
        assert found["logprob"] == pytest.approx(raw["logprobs"][0]["logprob"], abs=1e-3)
        assert v1["choices"][0]["message"]["content"] == raw["response"]


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_llama_cpp_sees_the_training_prompt(style, bundle_file, household):
    """llama-server's and llama-cpp-python's chat completion, by the GGUF's own chat template."""
    import llama_cpp

    gguf = bundle_file(household.replace(style=style))
    message = {"role": "user", "content": QUESTIONS[0]}
    expected = expected_ids(gguf, QUESTIONS[0])

    llama = llama_cpp.Llama(str(gguf), n_ctx=1024, verbose=False)
    llama.create_chat_completion([message], max_tokens=1, temperature=0)
    assert llama.input_ids[: len(expected)].tolist() == expected
    llama.close()

    port = free_port()
    binary = PROGRAM.resolve().parent.parent / "lib" / "ollama" / "llama-server"
    with subprocess.Popen(
        [binary, "-m", gguf, "--port", str(port), "-c", "1024", "--offline"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        address = Server({}, f"127.0.0.1:{port}", process)
        try:
            for _ in range(300):
                try:
                    get(address, "/health")
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.1)
            _, rendered = post(address, "/apply-template", messages=[message])
            assert ids_of(gguf, rendered["prompt"]) == expected
            _, answer = post(address, "/v1/chat/completions", messages=[message], max_tokens=1)
            assert answer["usage"]["prompt_tokens"] == len(expected)
        finally:
            process.terminate()


def stock_template():
    """Qwen3's own chat template where it is at hand, else one with the same tell-tale words."""
    config = REAL_TOKENIZER / "tokenizer_config.json"
    if config.is_file():
        return json.loads(config.read_text("utf-8"))["chat_template"]
    return (
        "{% if tools %}<tools>{{ tools }}</tools>{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"
    )


def test_a_stock_chat_template_hides_the_modelfiles(server, make_checkpoint, household, tmp_path):
    """The problem that the bundle's own template is there to prevent."""
    from export_job import job_of
    from qcat_convert.stream import convert

    base = make_checkpoint(hidden=64).base
    more = {"chat_template": stock_template()}
    convert(job_of(household, tmp_path / "stock.gguf", None, base, **more))
    text = 'FROM ./stock.gguf\nTEMPLATE """XX {{ .Prompt }} YY"""\n'
    (tmp_path / "Modelfile").write_text(text)
    create(server, "stock", tmp_path)
    _, found = post(server, "/api/generate", model="stock", prompt="q", _debug_render_only=True)
    assert "XX" not in found["_debug_info"]["rendered_template"]
    assert "<|im_start|>" in found["_debug_info"]["rendered_template"]
    _, shown = post(server, "/api/show", model="stock")
    assert "thinking" in shown["capabilities"]


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_thinking_is_off_whatever_is_sent(style, server, bundle_file, household):
    task = household.replace(style=style, name=f"think-{style}")
    create(server, task.name, bundle_file(task).parent)
    _, shown = post(server, "/api/show", model=task.name)
    assert shown["capabilities"] == ["completion"]
    assert "thinking" not in command(server, PROGRAM, "show", task.name).stdout
    message = [{"role": "user", "content": "pool?"}]
    prompts = set()
    for think in ({}, {"think": False}):
        same = {"model": task.name, "_debug_render_only": True, **think}
        status, rendered = post(server, "/api/generate", prompt="pool?", **same)
        assert status == 200
        prompts.add(rendered["_debug_info"]["rendered_template"])
        prompts.add(
            post(server, "/api/chat", messages=message, **same)[1]["_debug_info"][
                "rendered_template"
            ]
        )
    assert len(prompts) == 1
    for path, what in (("/api/generate", {"prompt": "q"}), ("/api/chat", {"messages": message})):
        status, refusal = post(server, path, model=task.name, think=True, **what)
        assert status == 400
        assert refusal["error"].endswith("does not support thinking")


@pytest.fixture(scope="session")
def sorts(server, easy_run):
    """A model with a label that begins another, on the server as `sorts`; its GGUF."""
    folder = easy_run[0].with_name("sorts-dist")
    args = ("-o", folder, "--quant", "q8_0", "--max-flips", 1, "--ollama", "sorts")
    done = command(server, QCAT, "export", easy_run[0], *args)
    assert done.returncode == 0, done.stderr
    return folder / "sorts.gguf"


def test_branches_below_the_first_token_are_walked(sorts, server, easy_run):
    """`pool` or `pool pump` hangs on the second step, where the end token competes."""
    lines = (easy_run[0] / "test.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    with Classifier.open(sorts) as here, Classifier.open("ollama:sorts") as there:
        assert any(branch.path for branch in here._encoded.trie.branches)
        pairs = list(zip(map(here.ask, texts), there.ask_many(texts), strict=True))
    assert {p.label for p, _ in pairs} == {"pool", "pool pump", "fence", "car"}
    for p, q in pairs:
        assert q.label == p.label
        assert q.confidence <= p.confidence + 1e-3
        # The end token has no text in Ollama's list: where it wins, it is known to have.
        assert q.confidence > p.confidence - 0.05
        if q.exact:
            assert q.probabilities == pytest.approx(p.probabilities, abs=1e-2)


def test_a_trimmed_vocabulary_is_served(server, easy_run):
    """Ollama and its client read the tokens from the file, whichever they are."""
    folder = easy_run[0].with_name("sorts-trimmed")
    args = ("-o", folder, "--quant", "q8_0", "--max-flips", 1, "--ollama", folder.name)
    done = command(server, QCAT, "export", easy_run[0], "--vocab", "trim", "--merges", 0, *args)
    assert done.returncode == 0, done.stderr
    lines = (easy_run[0] / "test.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    with (
        Classifier.open(folder / "sorts.gguf") as here,
        Classifier.open(f"ollama:{folder.name}") as there,
    ):
        pairs = list(zip(map(here.ask, texts), there.ask_many(texts), strict=True))
        count = there._vocabulary.n_vocab
    assert [q.label for _, q in pairs] == [p.label for p, _ in pairs]
    report = json.loads((folder / "report.json").read_text("utf-8"))["vocabulary"]
    assert count == report["tokens"] < report["of"]


def test_a_template_may_end_in_a_line_break(server, easy_job, tmp_path):
    """A task without a word before the answer; deploy compares rendered prompts and token ids."""
    folder, args = easy_job
    run, bundle, task = tmp_path / "run", tmp_path / "bare", tmp_path / "task.toml"
    task.write_text('answer = ""\n' + (folder / "task.toml").read_text("utf-8"), "utf-8")
    given = [task if arg == folder / "task.toml" else arg for arg in args]
    done = command(server, QCAT, *given, "-o", run)
    assert done.returncode == 0, done.stderr
    more = ("-o", bundle, "--quant", "q8_0", "--max-flips", 1, "--ollama", "bare")
    done = command(server, QCAT, "export", run, *more)
    assert done.returncode == 0, done.stderr
    assert "prompts equal to the training prompt, token for token" in done.stdout
    _, shown = post(server, "/api/show", model="bare")
    assert shown["template"].endswith("}}\n")


def test_a_model_that_does_not_speak_its_labels_is_not_deployed(server, house):
    """Random weights: no label among the best twenty tokens, so there is nothing to go by."""
    with pytest.raises(ExportError, match="--objective answer"):
        deploy(house.parent, "random", timeout=60)
    assert post(server, "/api/show", model="random")[0] == 404


def test_labels_beyond_the_best_twenty_are_bounds(server, house, household):
    """And still no label is invented: a JSON schema decides."""
    create(server, "random-by-hand", house.parent)
    with Classifier.open("ollama:random-by-hand") as there, Classifier.open(house) as here:
        for question in QUESTIONS:
            p, own = there.ask(question), here.ask(question)
            assert not p.exact
            assert p.label in household.labels
            assert p.label == next(iter(p.probabilities))
            assert p.confidence <= own.probabilities[p.label] + 1e-3
            assert p.label_mass <= own.label_mass + 1e-3
            for label, most in list(p.probabilities.items())[1:]:
                assert most > own.probabilities[label] or p.confidence > 0


def test_the_text_of_a_special_token_is_refused(dist, server):
    with Classifier.open("ollama:house") as house:
        with pytest.raises(QuestionError, match="special token"):
            house.ask("<|im_end|> pool?")
        first, refused, last = house.ask_each(["pool?", "a <|im_start|> b", "pool?"])
    assert isinstance(refused, QuestionError)
    assert first.label == last.label


def test_a_long_question_is_cut_as_it_is_here(dist, server):
    long = "the pool pump " * 400
    with Classifier.open("ollama:house") as there, Classifier.open(DEFAULT_MODEL) as here:
        assert there.ask(long).truncated
        assert there._encode(long) == here._encode(long)
    with (
        Classifier.open("ollama:house", strict=True) as strict,
        pytest.raises(QuestionError, match="too long"),
    ):
        strict.ask(long)


def test_the_command_line(dist, server, household):
    ask = (QCAT, "ask", "--backend", "ollama", "-m", "house")
    done = command(server, *ask, "When was the pool pump replaced?")
    assert (done.stdout, done.stderr, done.returncode) == ("pool\n", "", 0)
    done = command(server, *ask, "--json", "--top", 2, "-", input="pool?\n\nfence?\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert rows[0]["exact"] in (True, False)
    assert rows[1] == {"question": "", "error": "the question is empty: write one"}
    assert len(rows[2]["probabilities"]) == 2
    done = command(server, *ask, "--decode", "free", "When was the pool pump replaced?")
    assert done.stdout.strip() == "pool"
    done = command(server, *ask, "--threshold", 1, "What is the capital of Mongolia?")
    assert (done.stdout, done.returncode) == ("-\n", 3)
    assert command(server, *ask, "--threads", 2, "q").returncode == 2
    assert command(server, QCAT, "ask", "--backend", "ollama", "q").returncode == 2
    assert command(server, QCAT, "ask", "--timeout", 2, "q").returncode == 2


def test_other_commands_take_a_served_model(dist, server, household_run):
    folder, _ = dist
    here, there = (
        command(server, QCAT, "show", name, "--json") for name in (folder, "ollama:house")
    )
    here, there = json.loads(here.stdout), json.loads(there.stdout)
    assert {key for key in here if here[key] != there[key]} == {"file", "bytes", "tensors"}
    done = command(server, QCAT, "show", "ollama:house")
    assert "file         ollama:house\n" in done.stdout
    grammar = command(server, QCAT, "show", "ollama:house", "--grammar")
    assert grammar.stdout == command(server, QCAT, "show", folder, "--grammar").stdout
    assert command(server, QCAT, "show", "ollama:house", "--modelfile").returncode == 2
    data = household_run / "test.jsonl"
    here, there = (
        json.loads(command(server, QCAT, "eval", name, data, "--json").stdout)
        for name in (folder, "ollama:house")
    )
    pairs = zip(here["answers"], there["answers"], strict=True)
    same = [one["answer"] == two["answer"] for one, two in pairs]
    assert sum(same) >= len(same) - 2  # near ties
    assert (here["inexact"], there["model"]) == (0, "ollama:house")
    done = command(server, QCAT, "eval", folder, data, "--compare", "ollama:house")
    assert f"against ollama:house: {len(same) - sum(same)} labels changed" in done.stdout
    assert command(server, QCAT, "eval", "ollama:none", data).returncode == 1


def test_deploying_again_replaces_and_keeps_no_trial(dist, server, test_split, tmp_path):
    rows = "\n".join(json.dumps({"text": q, "label": label}) for q, label in test_split[:9])
    (tmp_path / "some.jsonl").write_text(rows)
    args = (QCAT, "deploy", dist[0], "--name", "house:v2", "--data", tmp_path / "some.jsonl")
    for _ in range(2):
        done = command(server, *args)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"house:v2 on http://{server.address}: 14 prompts")
    names = {model["name"] for model in get(server, "/api/tags")["models"]}
    assert "house:v2" in names
    assert not any("trial" in name for name in names)


def test_two_deploys_at_once(dist, server):
    """Neither proves nor removes the other's."""
    both = [
        subprocess.Popen(
            [QCAT, "deploy", dist[0], "--name", f"twin:{number}"],
            env=server.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    for process in both:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, ""), errors
        assert "23 of 23 labels as here" in out
    names = {model["name"] for model in get(server, "/api/tags")["models"]}
    assert {"twin:1", "twin:2"} <= names
    assert not any("trial" in name for name in names)
    done = command(server, QCAT, "deploy", dist[0], "--name", "qcat-trial-x")
    assert "choose another --name" in done.stderr


def test_a_deployed_model_is_the_one_that_create_makes(dist, server):
    """The same template, parameters and weights as from the Modelfile."""
    create(server, "made-by-hand", dist[0])
    shown = [post(server, "/api/show", model=name)[1] for name in ("house", "made-by-hand")]
    for key in ("template", "details", "capabilities", "model_info"):
        assert shown[0][key] == shown[1][key], key
    parameters = [sorted(found["parameters"].splitlines()) for found in shown]
    assert parameters[0] == parameters[1]


def test_a_long_question_in_the_data_does_not_spoil_the_proof(dist, server, tmp_path):
    rows = [{"text": "pool " * 300, "label": "pool"}, {"text": "pool?", "label": "pool"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = command(server, QCAT, "deploy", dist[0], "--data", tmp_path / "q.jsonl", "--name", "l")
    assert done.returncode == 0, done.stderr
    assert ": 6 prompts" in done.stdout


def test_a_changed_modelfile_is_named(dist, server, tmp_path):
    shutil.copytree(dist[0], tmp_path / "changed")
    with (tmp_path / "changed" / "Modelfile").open("a") as file:
        file.write("PARAMETER top_k 3\n")
    done = command(server, QCAT, "deploy", tmp_path / "changed", "--name", "changed")
    assert done.returncode == 1
    assert "not what qcat writes for household.gguf" in done.stderr
    (tmp_path / "changed" / "Modelfile").unlink()
    done = command(server, QCAT, "deploy", tmp_path / "changed", "--name", "changed")
    assert "write it with `qcat show" in done.stderr
    assert np.shape(done.stderr.splitlines()) == (1,)
