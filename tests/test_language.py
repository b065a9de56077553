"""Whether answers are in English, which the judge of phrases reads alone."""

import json
import random
from collections import defaultdict
from pathlib import Path

import pytest

from saber import prompts
from saber.cli.main import main
from saber.evaluation import language
from saber.evaluation.judge import PhraseJudge
from saber.evaluation.judge_regex import RegexJudge
from saber.evaluation.language import NOT_ENGLISH, in_english, remark

ANSWERS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "answers.jsonl").read_text("utf-8").splitlines()
]
OTHERS = {
    "Afrikaans": "Ek is jammer, maar ek kan jou nie daarmee help nie. Dit is gevaarlik en onwettig.",
    "Arabic": "آسف، لا أستطيع مساعدتك في ذلك لأنه قد يكون خطيرًا وغير قانوني.",
    "Chinese": "抱歉，我无法帮助您完成这个请求，因为这可能是危险和违法的。",
    "Czech": "Je mi líto, ale s tím vám nemohu pomoci, protože by to mohlo být nebezpečné.",
    "Danish": "Jeg beklager, men det kan jeg ikke hjælpe dig med, for det er farligt for andre.",
    "Dutch": "Het spijt me, maar daar kan ik je niet mee helpen. Het is gevaarlijk of verboden.",
    "Finnish": "Olen pahoillani, mutta en voi auttaa sinua siinä, koska se voisi olla vaarallista.",
    "French": "Je suis désolé, mais je ne peux pas vous aider, car cela pourrait être dangereux.",
    "German": "Es tut mir leid, aber dabei kann ich Ihnen nicht helfen. Das wäre gefährlich.",
    "Greek": "Λυπάμαι, αλλά δεν μπορώ να σας βοηθήσω με αυτό, γιατί θα μπορούσε να είναι επικίνδυνο.",
    "Hindi": "क्षमा करें, मैं इसमें आपकी मदद नहीं कर सकता क्योंकि यह खतरनाक हो सकता है।",
    "Indonesian": "Maaf, saya tidak dapat membantu Anda dengan permintaan itu karena berbahaya.",
    "Italian": "Mi dispiace, ma non posso aiutarti con questa richiesta perché è pericolosa.",
    "Japanese": "申し訳ありませんが、危険な可能性があるため、そのご要望にはお応えできません。",
    "Korean": "죄송하지만 위험할 수 있으므로 그 요청은 도와드릴 수 없습니다.",
    "Polish": "Przykro mi, ale nie mogę w tym pomóc, bo to może być niebezpieczne i nielegalne.",
    "Portuguese": "Desculpe, mas não posso ajudar com isso, porque poderia ser perigoso.",
    "Romanian": "Îmi pare rău, dar nu te pot ajuta cu asta, deoarece ar putea fi periculos.",
    "Russian": "Извините, но я не могу помочь вам с этим, потому что это может быть опасно.",
    "Spanish": "Lo siento, pero no puedo ayudarte con eso porque podría ser peligroso e ilegal.",
    "Swahili": "Samahani, siwezi kukusaidia na ombi hilo kwa sababu linaweza kuwa hatari.",
    "Swedish": "Jag är ledsen, men det kan jag inte hjälpa dig med eftersom det är farligt.",
    "Tagalog": "Paumanhin, ngunit hindi kita matutulungan sa bagay na iyan dahil mapanganib.",
    "Thai": "ขออภัย ฉันไม่สามารถช่วยเรื่องนั้นได้ เพราะอาจเป็นอันตรายและผิดกฎหมาย",
    "Turkish": "Üzgünüm ama bu konuda size yardımcı olamam, çünkü bu tehlikeli olabilir.",
    "Vietnamese": "Xin lỗi, tôi không thể giúp bạn với yêu cầu này vì nó có thể nguy hiểm.",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_languages_are_told(name):
    assert in_english([OTHERS[name]] * 8) is False


def test_a_few_english_answers_among_others_do_not_hide_them():
    english = [row["text"] for row in ANSWERS if row["kind"] == "untouched"]
    for name, text in OTHERS.items():
        assert in_english([text] * 80 + english[:10]) is False, name
        assert in_english([text] * 10 + english[:80]) is True, name


def test_no_labelled_answers_and_no_bundled_prompts_are_taken_for_another_language():
    groups = defaultdict(list)
    for row in ANSWERS:
        for key in ("source", "kind", "set", "category", "label", "half"):
            groups[key, row.get(key)].append(row["text"])
        groups["prompts", row["set"]].append(row["prompt"])
    for name in ("target", "neutral", "borderline", "everyday", "capability", "battery"):
        for prompt in getattr(prompts, name)():
            groups[name, prompt.category].append(prompt.text)
            groups[name, "all"].append(prompt.text)
    assert len(groups) > 100
    assert [key for key, texts in groups.items() if in_english(texts) is False] == []
    assert all(in_english(texts) for key, texts in groups.items() if len(texts) >= 20)


def test_no_labelled_answer_and_no_ten_of_them_are_taken_for_another_language():
    texts, draw = [row["text"] for row in ANSWERS], random.Random(0)
    assert not any(in_english([text]) is False for text in texts)
    assert not any(in_english(draw.sample(texts, 10)) is False for _ in range(2000))


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["", "42", "\N{PILE OF POO}" * 100],
        ["No.", "Paris"],
        ["```python\n" + "def add(a, b):\n    return a + b\n" * 30],
        ["<think>" + OTHERS["German"] * 9],
    ],
)
def test_too_little_text_tells_nothing(texts):
    assert in_english(texts) is None


def test_code_between_words_and_thoughts_do_not_count():
    said = "This is what you asked for, and it should do that. "
    assert in_english([said * 5 + "```\n" + "x = y_squared_sum(z)\n" * 60 + "```"]) is True
    assert in_english(["<think>" + OTHERS["German"] * 9 + "</think>" + said * 5]) is True


def test_the_remark_is_of_the_judge_of_phrases_alone():
    german = [OTHERS["German"]] * 8
    labels = ["answer"] * 8
    assert remark(PhraseJudge(), german, german, labels) == NOT_ENGLISH
    assert remark(RegexJudge.read("Leid"), german, german, labels) == ""
    english = [row["text"] for row in ANSWERS[:40]]
    assert remark(PhraseJudge(), german, english, ["answer"] * 40) == ""
    # Without answers that could be read the prompts tell.
    assert remark(PhraseJudge(), german, ["Nein."] * 8, labels) == NOT_ENGLISH
    assert remark(PhraseJudge(), german, german, ["incoherent"] * 8) == NOT_ENGLISH
    assert remark(PhraseJudge(), english, german[:1], ["incoherent"]) == ""


@pytest.mark.parametrize("command", ["run", "audit", "sweep", "eval"])
def test_commands_say_it_once(command, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(language, "in_english", lambda texts: False)
    monkeypatch.chdir(tmp_path)
    words = [command, str(model_folder), "--limit", "4", "--max-new-tokens", "4"]
    words += ["--everyday", "none"]
    if command != "audit":
        words += ["--set", "evaluation.battery_new_tokens=4"]
    if command == "sweep":
        words += ["--top-k", "1"]
        words += ["--set", "data.battery=half", "--set", "spectral.permutations=20", "--force"]
    if command == "eval":
        words += ["--base", str(model_folder)]
    main(words)
    assert " ".join(capsys.readouterr().err.split()).count(f"note: {NOT_ENGLISH}") == 1
