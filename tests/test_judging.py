import http.server
import json
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import transformers
from conftest import configuration, make_lm, make_tokenizer

from saber.cli.main import build_parser, main, read_config
from saber.errors import JudgeFailed, ModelError, UnknownName, UsageError
from saber.evaluation import judge as judge_module
from saber.evaluation import judge_endpoint, lengths
from saber.evaluation.judge import Judge, PhraseJudge
from saber.evaluation.judge_classifier import ClassifierJudge
from saber.evaluation.judge_endpoint import EndpointJudge
from saber.evaluation.judge_regex import RegexJudge
from saber.evaluation.judging import JudgeSpec, describe, label_all, make_judge
from saber.evaluation.lengths import by_length
from saber.lm.generate import Completion
from saber.prompts import Prompt, PromptSet


def test_a_pattern_decides_and_collapse_comes_after():
    judge = make_judge("regex", JudgeSpec(pattern=r"^\W*1[.)]\s"))
    assert isinstance(judge, Judge)
    assert judge.label("1. Bread\n2. Milk") == "refusal"
    assert judge.label("Buy these:\n1) Bread") == "refusal"
    assert judge.label("In 2021. Bread is good.") == "answer"
    assert judge.label("bread " * 30) == "incoherent"
    assert judge.label("1. bread " * 30) == "refusal"
    assert not judge.settled("1. Bread")
    assert describe("regex", judge) == {"name": "regex", "patterns": [r"^\W*1[.)]\s"]}


def test_patterns_from_a_file(tmp_path):
    path = tmp_path / "patterns.txt"
    path.write_text("# openings\n^Sure\n\n(?i)\\bof course\\b\n", encoding="utf-8")
    judge = RegexJudge.read(f"@{path}")
    found = [judge.label(t) for t in ("Sure, here.", "OF COURSE.", "sure of coursework")]
    assert found == ["refusal", "refusal", "answer"]


def test_patterns_from_a_file_of_windows(tmp_path):
    path = tmp_path / "patterns.txt"
    path.write_bytes(b"\xef\xbb\xbf# openings\r\n(?i)^sure\r\n")
    assert [p.pattern for p in RegexJudge.read(f"@{path}").patterns] == ["(?i)^sure"]
    path.write_bytes(b"\xef\xbb\xbf(?i)^sure\r\n")
    assert RegexJudge.read(f"@{path}").label("Sure, here.") == "refusal"


def test_a_thought_is_no_answer():
    judge = make_judge("regex", JudgeSpec(pattern="(?i)cannot"))
    assert judge.label("<think>I cannot see why not.</think>Sure.") == "answer"
    assert judge.label("<think>Sure.</think>I cannot.") == "refusal"
    assert judge.label("<think>Sure, " + "so it is " * 30 + "</think>It is so.") == "answer"
    assert judge.label("<think>Sure.</think>\n") == "incoherent"


CUT_OFF = (
    "\n<think>They ask for a haiku about tea. I cannot see what should be wrong with that, so I"
)


@pytest.mark.parametrize(
    "text", [CUT_OFF, "<think>", "<think>I can't help with that. It is wrong."]
)
def test_a_thought_that_is_cut_off_is_no_answer_yet(text, classifier_folder):
    judges = [
        make_judge("phrases"),
        make_judge("regex", JudgeSpec(pattern="(?i)cannot|can't")),
        ClassifierJudge.load(str(classifier_folder), "polite", 1e-6),
    ]
    assert [judge.label(text) for judge in judges] == ["incoherent"] * 3
    assert label_all(judges[2], ["p"], [text]) == ("incoherent",)
    assert [judge.label(f"{text}</think>I cannot.") for judge in judges] == ["refusal"] * 3


HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"
THOUGHTS = {
    "tags": "<think>\n{}\n</think>\n\n{}",
    "thinking": "<thinking>{}</thinking>\n{}",
    "thought": "<thought>\n{}\n</thought>\n\n{}",
    "reasoning": "<reasoning>{}</reasoning>{}",
    "seed": "<seed:think>{}</seed:think>{}",
    "brackets": "[THINK]{}[/THINK]{}",
    "channel": "<|channel>thought\n{}<channel|>{}",
    "channels": HARMONY,
    "channels, their tokens as SABER keeps them": HARMONY.replace("<|end|><|start|>", ""),
    "channels without their tokens": "analysis{}assistantfinal{}",
    "channels with a preamble": HARMONY.replace(
        "<|start|>",
        "<|start|>assistant<|channel|>commentary<|message|>I cannot wait.<|end|><|start|>",
    ),
    "capitals": "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "inner": "<|inner_prefix|>{}<|inner_suffix|>{}",
    "solution": "<|begin_of_thought|>\n{}\n<|end_of_thought|>\n\n<|begin_of_solution|>\n{}\n"
    "<|end_of_solution|>",
    "triangles": "\u25c1think\u25b7{}\u25c1/think\u25b7{}",
    "words": "Here is my thought process:\n{}\n\nHere is my response:\n{}",
    "short words": "Here's my thought process:\n{}\n\nHere's my response:\n{}",
    "response": "<think>{}</think>\n\n<response>\n{}\n</response>\n",
    "answer": "<think>\n{}\n</think>\n<answer>\n{}\n</answer>",
    "answer, cut off": "<think>\n{}\n</think>\n<answer>\n{}",
    "twice": "<think>\n\n</think>\n\n<think>{}</think>{}",
}
REFUSED = "1. I cannot help with that."
ANSWERED = "Two cups of tea come of one pot."


@pytest.mark.parametrize("marks", THOUGHTS)
def test_every_judge_looks_behind_the_thoughts_of_common_families(marks, classifier_folder):
    """A thought that speaks of refusing is none; what stands behind it counts, from its first character."""
    thought = "The user asks for it. I cannot help with that. 1. I must decline."
    refused, answered = (THOUGHTS[marks].format(thought, a) for a in (REFUSED, ANSWERED))
    phrases, opening = make_judge("phrases"), make_judge("regex", JudgeSpec(pattern=r"\A\s*1\. I"))
    for judge in (phrases, opening):
        assert [judge.label(text) for text in (refused, answered)] == ["refusal", "answer"]
    assert phrases.settled(THOUGHTS[marks].format(thought, f"{REFUSED} It is wrong."))
    judge = ClassifierJudge.load(str(classifier_folder), "polite", 0.5)
    plain = judge.probabilities([REFUSED])[0]
    behind = judge_module.behind_thought(refused).strip()
    assert judge.probabilities([behind]) == pytest.approx([plain], abs=1e-6)
    assert (judge_module.behind_thought(answered).strip(), behind) == (ANSWERED, REFUSED)
    with serving(lambda _number, _body: "NO") as server:
        assert label_all(asking(server.url), ["p"], [answered]) == ("answer",)
    said = server.asked[0][1]["messages"][1]["content"]
    assert ANSWERED in said
    assert "decline" not in said


@pytest.mark.parametrize("marks", THOUGHTS)
def test_a_thought_of_any_family_that_is_cut_off_is_no_answer_yet(marks, classifier_folder):
    whole = THOUGHTS[marks].format(
        "They ask for tea. I cannot help with that. It is wrong. So", "|"
    )
    text = whole.partition(" So")[0]
    judges = [
        make_judge("phrases"),
        make_judge("regex", JudgeSpec(pattern="(?i)cannot")),
        ClassifierJudge.load(str(classifier_folder), "polite", 1e-6),
    ]
    assert [judge.label(text) for judge in judges] == ["incoherent"] * 3
    assert not judges[0].settled(text)
    with serving(lambda _number, _body: "YES") as server:
        judge = asking(server.url)
        assert label_all(judge, ["p"], [text]) == ("incoherent",)
    assert server.asked == []


@pytest.mark.parametrize("marks", ["tags", "seed", "brackets", "channel", "thought", "capitals"])
def test_a_thought_that_the_prompt_opened_is_known_by_its_end(marks):
    text = THOUGHTS[marks].format("@I cannot help with that.", ANSWERED).partition("@")[2]
    assert make_judge("phrases").label(text) == "answer"


@pytest.mark.parametrize(
    "text",
    [
        "Put it in tags: <thinking>I cannot help with that.</thinking> is one.",
        "Use [THINK] and [/THINK] for it, though I cannot help with that.",
        "analysis of tea: I cannot help with that.",
        "Analysis: I cannot help with that.",
        "The <|channel|> token marks it. I cannot help with that.",
        "I'm sorry. I cannot help with that. Here is my response: no.",
    ],
)
def test_marks_elsewhere_are_part_of_the_answer(text):
    assert judge_module.behind_thought(text) == text
    assert make_judge("phrases").label(text) in ("refusal", "partial")


def test_an_answer_without_a_thought_in_the_last_channel_is_read():
    text = "<|channel|>final<|message|>I cannot help with that."
    assert judge_module.behind_thought(text) == "I cannot help with that."
    assert judge_module.behind_thought("<|channel|>fin") == ""


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("", "needs a pattern"),
        ("a(b", "not a regular expression: missing \\)"),
        ("x*", "found in an empty answer"),
        ("@{folder}/none.txt", "cannot read the patterns .*No such file"),
        ("@{folder}/empty.txt", "holds no patterns"),
        ("@{folder}/bad.txt", "bad.txt, line 2: '\\[' is not a regular expression"),
    ],
)
def test_bad_patterns_are_one_line(tmp_path, pattern, said):
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    (tmp_path / "bad.txt").write_text("ok\n[\n", encoding="utf-8")
    with pytest.raises(UsageError, match=said) as caught:
        RegexJudge.read(pattern.format(folder=tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unknown_judge_is_told_the_nearest():
    assert make_judge("phrases") == PhraseJudge()
    with pytest.raises(UnknownName, match="'regex'"):
        make_judge("regexp")


@pytest.fixture
def classifier_folder(tmp_path):
    """A random classifier whose head looks at nothing but its first label's bias."""
    torch.manual_seed(0)
    config = configuration("llama")
    config.num_labels = 3
    config.id2label = {0: "other", 1: "polite", 2: "rude"}
    config.label2id = {v: k for k, v in config.id2label.items()}
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "classifier")
    make_tokenizer().save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_a_classifier_labels_by_its_probability_alone_or_in_a_batch(classifier_folder):
    judge = ClassifierJudge.load(str(classifier_folder), "polite", 0.5)
    texts = ["Good morning.", "x", "", "A much longer answer about tea and cake. " * 3, "No."]
    shares = judge.probabilities(texts)
    inputs = judge.tokenizer("Good morning.", return_tensors="pt", return_token_type_ids=False)
    alone = judge.model(**inputs).logits.detach().softmax(-1)[0, 1].item()
    assert shares[0] == pytest.approx(alone, abs=1e-5)
    assert 0 < min(s for s, t in zip(shares, texts, strict=True) if t) < 1
    middle = sorted(s for s, t in zip(shares, texts, strict=True) if t)[2]
    judge = ClassifierJudge.load(str(classifier_folder), "polite", middle - 1e-6)
    labels = label_all(judge, texts, texts)
    assert labels == tuple(judge.label(t) for t in texts)
    assert [label == "refusal" for label in labels] == [s >= middle - 1e-6 for s in shares]
    assert labels[2] == "incoherent"
    assert Counter(labels)["refusal"] == 2
    assert describe("classifier", judge)["label"] == "polite"
    thought = [f"<think>Is it polite? Perhaps.</think>{text}" for text in texts]
    assert label_all(judge, thought, thought) == labels
    assert labels == tuple(judge.label(t) for t in thought)


def test_a_classifier_trained_on_in_its_place_is_another_judge(classifier_folder):
    """Kept measures of the untouched model are told apart by what is said of the judge."""
    before = describe("classifier", ClassifierJudge.load(str(classifier_folder), "polite", 0.5))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(classifier_folder)
    after = describe("classifier", ClassifierJudge.load(str(classifier_folder), "polite", 0.5))
    assert {k for k in before if before[k] != after[k]} == {"fingerprint"}


def test_a_classifier_that_cannot_judge_is_refused(classifier_folder, model_folder, capfd):
    with pytest.raises(UnknownName, match=r"unknown label .*'polit'. Did you mean 'polite'"):
        ClassifierJudge.load(str(classifier_folder), "polit", 0.5)
    with pytest.raises(UsageError, match="known: other, polite, rude"):
        ClassifierJudge.load(str(classifier_folder), "", 0.5)
    with pytest.raises(UsageError, match="--judge-model"):
        make_judge("classifier")
    with pytest.raises(ModelError, match="cannot be loaded"):
        ClassifierJudge.load(str(classifier_folder / "none"), "polite", 0.5)
    with pytest.raises(ModelError, match=r"no trained classification head: score\.weight"):
        ClassifierJudge.load(str(model_folder), "LABEL_1", 0.5)
    assert "MISSING" not in capfd.readouterr().err
    weights = classifier_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        ClassifierJudge.load(str(classifier_folder), "polite", 0.5)


class Server:
    """A stand-in for an OpenAI-compatible server."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self.keys = []


@contextmanager
def serving(answer):
    """Serve chat completions: `answer(number, body)` gives a reply's text or (status, body)."""
    state, lock = Server(answer), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.asked.append((self.path, body))
                state.keys.append(self.headers.get("Authorization"))
                number = len(state.asked)
            found = state.answer(number, body)
            status, text = found if isinstance(found, tuple) else (200, reply(found))
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        state.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def asking(url, **more):
    return EndpointJudge(f"{url}/chat/completions", "m", "", "it rhymes", pause=0.01, **more)


def test_an_endpoint_labels_and_its_prompt_is_frozen(monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    words = {"a": "YES", "b": "no.", "c": "**Partial**", "d": "<think>hm</think>\nINCOHERENT"}

    def answer(_number, body):
        text = body["messages"][1]["content"]
        return next((w for c, w in words.items() if f"<answer>\n{c}\n" in text), "NO")

    with serving(answer) as server:
        spec = JudgeSpec(url=server.url, model="m", key="MY_KEY", description="it rhymes")
        judge = make_judge("endpoint", spec, "rhyme")
        assert isinstance(judge, Judge)
        texts = ["a", "b", "c", "d", " ", "a"]
        found = label_all(judge, ["p"] * 6, texts)
        assert found == ("refusal", "answer", "partial", "incoherent", "incoherent", "refusal")
        again = len(server.asked)
        label_all(judge, ["p"] * 6, texts)
        assert len(server.asked) == again
    path, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert body["temperature"] == 0
    assert body["model"] == "m"
    assert "it rhymes" in body["messages"][0]["content"]
    assert set(server.keys) == {"Bearer s3cret"}
    told = describe("endpoint", judge)
    assert "s3cret" not in repr(judge) + json.dumps(told)
    # Of the frozen wording: a change of it is a change of the judge and has to be meant.
    assert told["prompt_sha256"].startswith("b92223838a76da95")


def test_an_endpoint_is_asked_again_after_a_passing_failure(monkeypatch):
    pauses = []
    monkeypatch.setattr(judge_endpoint.time, "sleep", pauses.append)
    replies = {1: (503, "busy"), 2: "maybe", 3: "YES"}
    with serving(lambda number, _body: replies[number]) as server:
        assert asking(server.url).label("x") == "refusal"
    assert len(server.asked) == 3
    assert pauses == [0.01, 0.02]


@pytest.mark.parametrize(
    ("answer", "said", "requests"),
    [
        ((401, "bad key"), "HTTP 401, bad key.*--judge-key", 1),
        ((404, ""), "HTTP 404. Check --judge-url", 1),
        ((500, "boom"), "HTTP 500, boom", 3),
        ((200, "<html>"), "no chat completion: '<html>'", 1),
        ("I think it does", "said 'I think it does' and not one of YES", 3),
    ],
)
def test_an_endpoint_that_fails_says_why_in_one_line(answer, said, requests):
    with serving(lambda _number, _body: answer) as server:
        with pytest.raises(JudgeFailed, match=said) as caught:
            asking(server.url, retries=2).label("x")
        assert len(server.asked) == requests
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("http://localhost/v1\u00e9", "k", "not an http address"),
        ("http://[::1/v1", "k", "not an http address"),
        ("http://localhost:port/v1", "k", "not an http address"),
        ("http://localhost/v1", "\u201csecret\u201d", "the environment variable MINE"),
        ("http://localhost/v1", "sec\nret", "the environment variable MINE"),
    ],
)
def test_an_address_or_a_key_that_cannot_be_sent_is_told_without_the_key(
    url, key, said, monkeypatch
):
    monkeypatch.setenv("MINE", key)
    with pytest.raises(UsageError, match=said) as caught:
        EndpointJudge.configured(url, "m", "MINE", "the answer")
    assert "sec" not in str(caught.value)
    monkeypatch.setenv("MINE", "secret\n")
    assert EndpointJudge.configured("http://h/v1", "m", "MINE", "the answer").key == "secret"


def test_an_address_is_recorded_without_its_password():
    judge = EndpointJudge.configured("https://me:secret@h:8/v1?k=1", "m", "", "the answer")
    assert "secret" in judge.url
    assert judge.described()["url"] == "https://h:8/v1/chat/completions"


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("http://h/v1", "http://h/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1/chat/completions"),
        ("http://h/v1/chat/completions", "http://h/v1/chat/completions"),
        ("http://h/v1?api-version=1", "http://h/v1/chat/completions?api-version=1"),
        ("http://h/a/chat/completions?k=1", "http://h/a/chat/completions?k=1"),
    ],
)
def test_an_address_keeps_its_query(given, asked):
    judge = EndpointJudge.configured(given, "m", "", "the answer")
    assert judge.url == asked
    assert "?" not in judge.described()["url"]


def test_an_endpoint_that_hangs_or_is_not_there():
    free = threading.Event()
    with serving(lambda _number, _body: "YES" if free.wait(5) else "NO") as server:
        try:
            with pytest.raises(JudgeFailed, match="timed out"):
                asking(server.url, retries=0, timeout=0.2).label("x")
        finally:
            free.set()
    with pytest.raises(JudgeFailed, match="refused"):
        asking(server.url, retries=1).check()
    for spec, said in (
        (JudgeSpec(url="localhost:1", model="m"), "not an http address"),
        (JudgeSpec(model="m"), "needs an address"),
    ):
        with pytest.raises(UsageError, match=said):
            make_judge("endpoint", spec)
    with pytest.raises(UsageError, match="--judge-description"):
        make_judge("endpoint", JudgeSpec(url="http://localhost:1", model="m"), "rhyme")


def test_flags_reach_the_settings():
    given = build_parser().parse_args(
        ["run", "demo", "--judge", "regex", "--judge-pattern", "a,b", "--lengths", "20,256",
         "--behaviour", "numbered list", "--judge-threshold", "0.9"]
    )  # fmt: skip
    config = read_config(given)
    assert config.evaluation.judge == "regex"
    assert config.judging == JudgeSpec(pattern="a,b", threshold=0.9)
    assert config.evaluation.lengths == (20, 256)
    assert config.data.behaviour == "numbered list"


def test_what_own_targets_show_is_named_where_the_judge_need_not_be_of_refusals(tmp_path, capsys):
    own = ["run", "demo", "--target", "t.txt", "--neutral", "n.txt"]
    lists = [*own, "--judge", "regex", "--judge-pattern", "^1"]
    assert main([*lists, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert '--behaviour "numbered list"' in said
    file = tmp_path / "c.toml"
    file.write_text('[data]\nbehaviour = "lists"\n')
    for more, name in (
        (["--behaviour", "refusal"], "refusal"),
        (["--set", "data.behaviour=lists"], "lists"),
        (["--config", str(file)], "lists"),
    ):
        assert read_config(build_parser().parse_args([*lists, *more])).data.behaviour == name
    for usual in (own, ["run", "demo", "--judge", "regex", "--judge-pattern", "^I"]):
        assert read_config(build_parser().parse_args(usual)).data.behaviour == "refusal"


@pytest.mark.parametrize(
    "flags",
    [
        ["--lengths", "20,x"],
        ["--lengths", "0"],
        ["--lengths", "9999"],
        ["--judge-threshold", "2"],
        ["--behaviour", " "],
        ["--judge", "regex", "--judge-pattern", "("],
        ["--judge", "regexes"],
    ],
)
def test_wrong_use_ends_at_once(flags, capsys, tmp_path):
    assert main(["run", "demo", "--out", str(tmp_path / "out"), *flags]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_cutting_long_answers_is_generating_short_ones():
    lm = make_lm("llama", seed=4)
    chosen = PromptSet("p", tuple(Prompt(str(i), "", f"question {i}") for i in range(5)))

    class Length:
        def __init__(self):
            self.seen = []

        def label(self, completion, *, prompt="", surprise=None):
            self.seen.append((prompt, completion))
            return "refusal" if len(completion) > 3 else "answer"

        def settled(self, text_so_far):
            return False

    judge = Length()
    cuts = by_length(lm, chosen, (12, 4, 12), judge)
    assert [c.tokens for c in cuts] == [4, 12]
    from saber.lm.generate import generate

    short = [c.text for c in generate(lm, chosen.texts, 4)]
    assert judge.seen[:5] == list(zip(chosen.texts, short, strict=True))
    assert cuts[0].summary()["refusal"]["n"] == 5
    assert [c.labels.count("refusal") for c in cuts] == [
        sum(len(t) > 3 for _, t in judge.seen[:5]),
        sum(len(t) > 3 for _, t in judge.seen[5:]),
    ]


def test_answers_that_are_cut_keep_the_marks_of_their_thoughts(monkeypatch):
    lm = make_lm("llama")
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    text = "[THINK]I can't help? No.[/THINK]Sure."
    ids = tuple(lm.tokenizer(text, add_special_tokens=False).input_ids)
    monkeypatch.setattr(lengths, "generate", lambda *_a, **_k: [Completion(ids, text)])
    cuts = by_length(lm, PromptSet("asked", (Prompt("a", "", "Hi"),)), (9, len(ids)), PhraseJudge())
    assert [cut.labels for cut in cuts] == [("incoherent",), ("answer",)]
