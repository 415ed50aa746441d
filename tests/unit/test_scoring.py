"""Label probabilities against brute force, and against llama.cpp's grammar over all tokens."""

from __future__ import annotations

import ctypes
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcat.backends.llama import LlamaModel
from qcat.backends.llama_scorer import LlamaScorer
from qcat.classifier import Classifier
from qcat.encoding.encoded import EncodedTask
from qcat.encoding.grammar import grammar
from qcat.encoding.prompt import QUESTION_ROOM, encode_segments
from qcat.encoding.scoring import (
    contenders,
    entropy,
    label_bounds,
    label_log_probabilities,
    label_mass,
    log_softmax,
)
from qcat.encoding.trie import LabelTrie, ToBranch
from qcat.errors import ModelError, QuestionError
from qcat.gguf.bundle import Bundle
from qcat.task import Task

SETS = {
    "distinct": ["pool", "fence", "car", "hvac"],
    "shared": ["garden lights", "garden hose", "garden gnome", "gutters", "water heater", "water"],
    "prefixes": ["pool", "pool pump", "pool pump filter", "poolhouse", "po", "p"],
    "all one stem": ["the pool", "the pool pump", "the fence"],
}
END = 9
BATCH_BOUND = 0.02  # of the difference that another batch shape makes to a probability


class Walk:
    """A plain llama.cpp context that evaluates one token list at a time: the reference."""

    def __init__(self, model):
        import llama_cpp

        self.lib, self.model, self.ids = llama_cpp, model, []
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = 768
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(model.handle, params)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def logits(self, ids):
        """Logits after the last token, shape (n_vocab,); only what is new is evaluated."""
        pairs = zip(ids[:-1], self.ids, strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        kept = min(len(ids) - 1, len(self.ids)) if same is None else same
        self.lib.llama_memory_seq_rm(self.memory, 0, kept, -1)
        self.ids = list(ids)
        new = ids[kept:]
        tokens = (self.lib.llama_token * len(new))(*new)
        batch = self.lib.llama_batch_get_one(tokens, len(new))
        assert self.lib.llama_decode(self.context, batch) == 0
        pointer = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab,)).copy()

    def sampler(self, text):
        return self.lib.llama_sampler_init_grammar(self.model.vocab, text.encode(), b"root")

    def masked(self, sampler, row):
        """The row with everything -inf that the grammar, over the whole vocabulary, forbids."""
        data = np.zeros(row.size, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        data["id"], data["logit"] = np.arange(row.size), row
        array = self.lib.llama_token_data_array(
            data=data.ctypes.data_as(self.lib.llama_token_data_p),
            size=row.size,
            selected=-1,
            sorted=False,
        )
        self.lib.llama_sampler_apply(sampler, ctypes.byref(array))
        out = np.full(row.size, -np.inf, np.float32)
        out[data["id"]] = data["logit"]
        return out

    def close(self):
        self.lib.llama_free(self.context)


def task_of(labels):
    return Task("some", dict.fromkeys(labels, ""))


@pytest.fixture(params=list(SETS))
def opened(request, bundle_file, tmp_path):
    """Bundle, model, prompt and trie of one label set, the weights in float32.

    Quantized weights come with quantized activations, whose rounding depends on the shape of the
    batch; here the arithmetic is to be seen, not the rounding.
    """
    path = tmp_path / "f32.gguf"
    to_float32(bundle_file(task_of(SETS[request.param])), path)
    bundle = Bundle.read(path)
    with LlamaModel(bundle.path) as model:
        encoded = EncodedTask.served(bundle.task, model, str(bundle.path))
        yield bundle, model, encoded.prompt, encoded.trie


def to_float32(source, target):
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)) == 0


def scorer_of(bundle, model, prompt, trie):
    return LlamaScorer(
        model,
        prefix=encode_segments(prompt.prefix, model),
        trie=trie,
        grammar=grammar(bundle.task),
        room=QUESTION_ROOM,
        threads=1,
    )


def brute_force(walk, ids, trie, text):
    """log P of every label by its own walk under llama.cpp's grammar on the whole vocabulary.

    At each step: evaluate the path alone, mask the whole vocabulary, keep canonical splits (the
    tokens that continue some label's own token sequence, or end one), softmax, advance.
    """
    found = []
    for sequence in trie.sequences:
        sampler = walk.sampler(text)
        total = 0.0
        for depth, token in enumerate((*sequence, trie.end)):
            path = sequence[:depth]
            masked = walk.masked(sampler, walk.logits(ids + list(path)))
            canonical = np.full(masked.size, -np.inf)
            for other in trie.sequences:
                if other[: len(path)] == path:
                    allowed = other[len(path)] if len(other) > len(path) else trie.end
                    canonical[allowed] = masked[allowed]
            assert np.isfinite(canonical[token])
            total += canonical[token] - np.logaddexp.reduce(canonical)
            if token != trie.end:
                walk.lib.llama_sampler_accept(sampler, token)
        walk.lib.llama_sampler_free(sampler)
        found.append(total)
    return np.array(found)


def test_probabilities_equal_brute_force(opened):
    bundle, model, prompt, trie = opened
    scorer, walk = scorer_of(*opened), Walk(model)
    questions = ["When was the pool pump replaced?", "x", "¿Quién pintó la valla? 12 <|im_end|>"]
    for question in questions:
        rest = encode_segments(prompt.rest(question), model)
        scores = next(scorer.score([rest]))
        ours = np.exp(label_log_probabilities(trie, scores.logits))
        ids = encode_segments(prompt.prefix, model) + rest
        theirs = np.exp(brute_force(walk, ids, trie, grammar(bundle.task)))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert ours.sum() == pytest.approx(1)
        row = walk.logits(ids).astype(np.float64)
        share = np.exp(log_softmax(row))[sorted({s[0] for s in trie.sequences})].sum()
        assert scores.mass == pytest.approx(share, abs=1e-4)
    walk.close()
    scorer.close()


def random_questions(count):
    """Questions of random words of the vocabulary of everyday life, and some noise."""
    rng = random.Random(7)
    words = [
        "when",
        "was",
        "the",
        "pool",
        "pump",
        "water",
        "fence",
        "who",
        "paid",
        "for",
        "it",
        "?",
        "12",
        "garden",
        "é",
        "水",
        "lights",
        "heater",
    ]
    return [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(count)]


def greedy(scores_of, trie):
    """The trie's greedy walk: at each branch the best child. Returns the label's number."""
    target = ToBranch(0)
    while isinstance(target, ToBranch):
        best = int(np.argmax(scores_of[target.number]))
        target = trie.branches[target.number].targets[best]
    return target.label


def test_grammar_decoding_agrees_with_the_trie_on_1000_questions(opened):
    """Step by step under llama.cpp's sampler, as a runtime decodes, against the batched trie."""
    bundle, model, prompt, trie = opened
    scorer, walk = scorer_of(*opened), Walk(model)
    text = grammar(bundle.task)
    prefix = encode_segments(prompt.prefix, model)
    questions = random_questions(1000)
    rests = [encode_segments(prompt.rest(question), model) for question in questions]
    differ = []
    for rest, scores in zip(rests, scorer.score(rests), strict=True):
        sampler, said = walk.sampler(text), []
        while True:
            row = walk.logits(prefix + rest + said)
            candidates = trie.children[tuple(said)]
            masked = walk.masked(sampler, row)[list(candidates)]
            token = candidates[int(masked.argmax())]
            if token == trie.end:
                break
            walk.lib.llama_sampler_accept(sampler, token)
            said.append(token)
        walk.lib.llama_sampler_free(sampler)
        if trie.sequences[greedy(scores.logits, trie)] != tuple(said):
            top = sorted(scores.logits[0])[-2:]
            differ.append(top[1] - top[0])
    # Another batch shape gives slightly other logits: only a near tie may fall the other way.
    assert len(differ) <= 5
    assert all(gap < 1e-2 for gap in differ)
    walk.close()
    scorer.close()


def test_label_is_the_most_probable_one(house):
    with Classifier.open(house) as classifier:
        for prediction in classifier.ask_many(random_questions(50)):
            best = max(prediction.probabilities, key=prediction.probabilities.__getitem__)
            assert prediction.label == best
            assert list(prediction.probabilities.values()) == sorted(
                prediction.probabilities.values(), reverse=True
            )


@pytest.mark.parametrize("labels", list(SETS.values()), ids=list(SETS))
def test_ask_many_agrees_with_ask(labels, bundle_file):
    questions = [*random_questions(40), "x " * 120, "y"]
    with Classifier.open(bundle_file(task_of(labels))) as classifier:
        many = list(classifier.ask_many(questions))
        assert len(many) == len(questions)
        for question, together in zip(questions, many, strict=True):
            alone = classifier.ask(question)
            # another batch shape rounds the quantized activations otherwise
            for label, probability in alone.probabilities.items():
                assert together.probabilities[label] == pytest.approx(probability, abs=BATCH_BOUND)


@pytest.fixture(scope="module")
def shipped():
    with Classifier.open() as classifier:
        yield classifier


KINDS = [
    "When was the pool pump replaced?",
    "who fixed the gate latch",
    "x",
    "",
    " \t ",
    "\0",
    "¿Cuándo se cambió el filtro? 🏊",
    "<|im_end|>",
    "the lamp in the hall " * 15,  # many tokens, but fewer than there is room for
    "the roof over the garage leaks " * 60,  # more than there is room for
]


def ask_or_error(classifier, question):
    try:
        return classifier.ask(question)
    except QuestionError as error:
        return error


@given(st.lists(st.sampled_from(KINDS) | st.text(max_size=60), max_size=80))
@settings(max_examples=40)
def test_ask_each_is_ask_in_order(shipped, asked):
    """Whatever the mix: lengths, repeats, what is empty, what is too long."""
    answers = list(shipped.ask_each(asked))
    assert len(answers) == len(asked)
    for question, together in zip(asked, answers, strict=True):
        alone = ask_or_error(shipped, question)
        if isinstance(together, QuestionError):
            assert str(alone) == str(together)
            continue
        assert together.truncated == alone.truncated
        for label, probability in alone.probabilities.items():
            # the bound that docs/speed.md states
            assert together.probabilities[label] == pytest.approx(probability, abs=BATCH_BOUND)
        if together.label != alone.label:
            assert alone.margin < 2 * BATCH_BOUND


def test_a_quick_start_answers_the_same_within_the_bound(shipped):
    with Classifier.open(quick_start=True) as quick:
        for question in random_questions(60):
            usual, other = shipped.ask(question), quick.ask(question)
            for label, probability in usual.probabilities.items():
                assert other.probabilities[label] == pytest.approx(probability, abs=BATCH_BOUND)


def test_what_the_grammar_refuses_cannot_come_out(opened):
    """The grammar is the authority: with one that knows a single label, only that is accepted."""
    bundle, model, prompt, trie = opened
    only = list(bundle.task.labels)[-1]
    scorer = LlamaScorer(
        model,
        prefix=encode_segments(prompt.prefix, model),
        trie=trie,
        grammar=f'root ::= " {only}"',
        room=QUESTION_ROOM,
        threads=1,
    )
    accepted = [scorer.accepts(number) for number in range(len(trie.sequences))]
    assert accepted == [label == only for label in bundle.task.labels]
    scorer.close()


def test_bad_grammar_is_an_error_not_a_crash(opened):
    _, model, prompt, trie = opened
    with pytest.raises(ModelError, match="refuses the labels' grammar"):
        LlamaScorer(
            model,
            prefix=encode_segments(prompt.prefix, model),
            trie=trie,
            grammar='root ::= "un"balanced"',
            room=64,
            threads=1,
        )


def test_predict_as_scikit_learn_has_it(house):
    texts = ["who fixed the pool pump?", "the fence?", "when was it?"]
    with Classifier.open(house, threshold=1) as classifier:
        predictions = list(classifier.ask_many(texts))
        assert classifier.predict(texts) == [p.label for p in predictions]
        assert [p.answer for p in predictions] == [None] * 3  # every one under the threshold
        shares = classifier.predict_proba(iter(texts))
        assert shares.shape == (3, len(classifier.labels))
        np.testing.assert_allclose(shares.sum(1), 1)
        best = [classifier.labels[column] for column in shares.argmax(1)]
        assert best == classifier.predict(texts)
        assert classifier.predict_proba([]).shape == (0, len(classifier.labels))
        with pytest.raises(QuestionError, match="question 2"):
            classifier.predict(["fine?", " "])
    with Classifier.open(house, threshold=0) as classifier:
        answer = classifier.ask("the fence?")
        assert answer.answer == answer.label == answer.to_dict()["answer"]


def test_use_after_close_is_an_error(house):
    classifier = Classifier.open(house)
    classifier.close()
    classifier.close()
    for use in (classifier.ask, classifier.say):
        with pytest.raises(ModelError, match="closed"):
            use("anything?")


def test_close_while_another_thread_asks(house):
    """An error in that thread, not a crash of the process."""
    import threading

    for _ in range(5):
        classifier = Classifier.open(house, threads=1)
        begun, ended = threading.Event(), []

        def ask(classifier=classifier, begun=begun, ended=ended):
            try:
                while True:
                    for _ in classifier.ask_many(random_questions(500)):
                        begun.set()
            except ModelError as error:
                ended.append(str(error))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        assert begun.wait(60)
        classifier.close()
        thread.join(60)
        assert not thread.is_alive()
        (message,) = ended
        assert "closed: open it again" in message


def test_native_layouts_are_the_ones_used():
    import llama_cpp

    from qcat.backends.llama_scorer import _CANDIDATE

    assert ctypes.sizeof(llama_cpp.llama_token_data) == _CANDIDATE.itemsize


def test_why_a_file_cannot_be_loaded_is_said(house, tmp_path):
    data = house.read_bytes()
    assert data.count(b"blk.1.attn_q.weight") == 1
    broken = tmp_path / "renamed.gguf"
    broken.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(ModelError, match=r"attn_q\.weight"):
        Classifier.open(broken)


def test_many_labels_with_many_branches(bundle_file):
    """More branches than fit into one forward pass; the same probabilities one by one."""
    words = ["pool", "fence", "car", "gutters", "hvac", "doorbell", "fountain", "electric"]
    labels = [f"{a} {b} {c}" for a in words for b in words for c in words[:5]]
    with Classifier.open(bundle_file(task_of(labels))) as classifier:
        assert len(classifier._encoded.trie.deep_branches) > 64
        prediction = classifier.ask("When was the pool pump replaced?")
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        together = list(classifier.ask_many(["When was the pool pump replaced?"] * 3))
        assert together[2].label == prediction.label


# The pure parts


def test_label_probabilities_by_hand():
    trie = LabelTrie.build([(1,), (1, 2), (3, 4), (3, 5)], END)
    assert [branch.path for branch in trie.branches] == [(), (1,), (3,)]
    assert trie.branches[1].tokens.tolist() == [END, 2]
    logits = [np.log([0.6, 0.4]), np.log([0.5, 0.5]), np.log([0.9, 0.1])]
    found = np.exp(label_log_probabilities(trie, logits))
    np.testing.assert_allclose(found, [0.3, 0.3, 0.36, 0.04])
    # the most probable label need not lie behind the most probable first token
    assert found.argmax() == 2


def test_a_common_stem_costs_nothing():
    trie = LabelTrie.build([(7, 1), (7, 2)], END)
    assert trie.root_branch is None
    assert [branch.path for branch in trie.deep_branches] == [(7,)]
    assert trie.first_tokens.tolist() == [7]


@pytest.mark.parametrize("bad", [[(1,), ()], [(1,), (1,)], [(1, END), (2,)]])
def test_unusable_sequences(bad):
    with pytest.raises(ModelError):
        LabelTrie.build(bad, END)


SEQUENCES = st.lists(
    st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple),
    min_size=2,
    max_size=30,
    unique=True,
)


@settings(max_examples=300)
@given(SEQUENCES, st.randoms(use_true_random=False))
def test_any_trie_gives_a_distribution(sequences, rng):
    trie = LabelTrie.build(sequences, END)
    for number, branch in enumerate(trie.branches):
        assert len(branch.tokens) > 1
        assert (branch.to_branches.targets > number).all()
    logits = [
        np.array([rng.uniform(-20, 20) for _ in branch.tokens], np.float32)
        for branch in trie.branches
    ]
    found = np.exp(label_log_probabilities(trie, logits))
    assert found.sum() == pytest.approx(1)
    assert len(found) == len(sequences)
    # by definition: the product over every node on the label's path
    table = {
        branch.path: dict(zip(branch.tokens.tolist(), np.exp(log_softmax(row)), strict=True))
        for branch, row in zip(trie.branches, logits, strict=True)
    }
    for sequence, probability in zip(sequences, found, strict=True):
        product = 1.0
        for depth, token in enumerate((*sequence, END)):
            product *= table.get(sequence[:depth], {}).get(token, 1.0)
        assert probability == pytest.approx(product)


@settings(max_examples=300)
@given(SEQUENCES, st.randoms(use_true_random=False))
def test_bounds_hold_whatever_is_known(sequences, rng):
    """Of what a model gives each child some is known, some within bounds: the truth is within."""
    trie = LabelTrie.build(sequences, END)
    truth, children = [], []
    for branch in trie.branches:
        share = np.exp([rng.uniform(-12, 0) for _ in branch.tokens])
        share *= rng.uniform(0.01, 1) / share.sum()  # the rest of the vocabulary has the rest
        known = np.array([rng.random() < 0.7 for _ in share])
        low = np.where(known, share, share * rng.uniform(0, 1) * (rng.random() < 0.5))
        high = np.where(known, share, np.minimum(1, share * rng.uniform(1, 50)))
        truth.append(np.log(share))
        children.append((low, high))
    found = np.exp(label_log_probabilities(trie, truth))
    lower, upper = label_bounds(trie, children)
    assert (lower <= found + 1e-12).all()
    assert (upper >= found - 1e-12).all()
    possible = contenders(trie, children)
    assert found[possible].max() == pytest.approx(found.max())
    known = [(np.exp(row), np.exp(row)) for row in truth]
    np.testing.assert_allclose(label_bounds(trie, known), [found, found], rtol=1e-9)
    assert [found[label] for label in contenders(trie, known)] == [pytest.approx(found.max())]


def test_siblings_are_compared_whatever_else_is_unknown():
    """Half the mass is unknown, so the bounds overlap; which of the first two wins is known."""
    trie = LabelTrie.build([(1,), (2,), (3,)], END)
    children = [([0.4, 0.3, 0.0], [0.4, 0.3, 0.35])]
    lower, upper = label_bounds(trie, children)
    assert upper[1] > lower[0]
    assert contenders(trie, children) == [0]
    assert contenders(trie, [([0.4, 0.3, 0.0], [0.4, 0.3, 0.5])]) == [0, 2]


def test_mass_and_entropy():
    row = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    assert label_mass(row, np.array([1, 3], np.int32)) == pytest.approx(0.6)
    assert entropy(np.array([0.5, 0.5, 0.0])) == pytest.approx(np.log(2))
    assert entropy(np.array([1.0, 0.0])) == 0


def test_prediction_is_plain_data(house):
    with Classifier.open(house, threshold=1.0) as classifier:
        row = json.loads(json.dumps(classifier.ask("anything?").to_dict()))
    assert row["abstained"] is True
    assert set(row) == {
        "answer",
        "label",
        "confidence",
        "abstained",
        "reason",
        "probabilities",
        "exact",
        "label_mass",
        "energy",
        "on_topic",
        "prediction_set",
        "margin",
        "entropy",
        "truncated",
    }


def test_room_for_a_long_question_is_made_when_it_comes(house):
    import llama_cpp

    def cells(classifier):
        return llama_cpp.llama_n_ctx(classifier._scorer._context)

    with Classifier.open(house) as classifier, Classifier.open(house) as other:
        usual, short = cells(classifier), classifier.ask("When was the pool pump replaced?")
        list(classifier.ask_many(random_questions(40)))
        assert cells(classifier) == usual
        long = classifier.ask("who fixed the gate latch " * 40)
        assert cells(classifier) > usual
        assert classifier.ask("When was the pool pump replaced?") == short
        assert other.ask("who fixed the gate latch " * 40) == long


def test_without_repacking_the_file_is_mapped(shipped, monkeypatch):
    """As on a processor with AMX, where llama.cpp's own layout would crash."""
    from qcat.backends import llama

    def info():
        return b"CPU : AVX2 = 1 | AMX_INT8 = 1 | REPACK = 1 | "

    monkeypatch.setattr(llama.llama_cpp, "llama_print_system_info", info)
    assert not llama.repacks()
    question = "When was the pool pump replaced?"
    with Classifier.open() as classifier:
        assert not classifier._vocabulary.repacked
        assert classifier.ask(question).label == shipped.ask(question).label == "pool"
