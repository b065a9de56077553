import re
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peers_abliterated
import peers_common
import peers_heretic
import peers_ruler
from conftest import make_tokenizer
from peers_common import Cost, Outcome, Workplace

MENU = """
Which trial do you want to use?
[1] [Trial   1] Refusals:  9/32, KL divergence: 0.0100
Enter number: 1
Optimization finished!

Which trial do you want to use?
[1] [Trial  12] Refusals:  0/32, KL divergence: 1.2345
[2] [Trial   3] Refusals:  4/32, KL divergence: 0.0412
[3] [Trial 117] Refusals: 30/32, KL divergence: 0.0001
[4] Run additional trials
[5] Exit program
Enter number: """


def test_the_readme_quotes_the_measured_tables():
    root = Path(__file__).resolve().parent.parent
    readme, tables = ((root / n).read_text("utf-8") for n in ("README.md", "docs/benchmarks.md"))
    peers = [line.split(" | ") for line in tables.splitlines() if "| heretic" in line]
    (best,) = [row for row in peers if len(row) == 11 and row[8] == "0.0105"]
    (ours,) = [
        r.split(" | ") for r in tables.splitlines() if r.startswith("| SABER 0.1.0 | defaults")
    ]
    told = f"leaves {best[4].partition('/')[0]} at {best[8]}"
    assert (
        f"{told}, with {best[5].partition('/')[0]} incoherent answers against {ours[5].partition('/')[0]}"
        in readme
    )
    # What over-refusal mode did, of 105 right refusals.
    found = re.search(r"harmful requests fall by [\d.]+ points\*\* \((\w+) lost, (\w+) gained", tables)
    assert found
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
    lost, gained = map(words.index, found.groups())
    assert f"{105 - lost} of 105 right ones stay and {gained} others are new" in readme


def test_the_last_menu_is_read_in_its_order_and_without_what_is_no_trial():
    offered = peers_heretic.menu_trials(MENU)
    assert [(t.choice, t.trial, t.refusals, t.prompts) for t in offered] == [
        (1, 12, 0, 32),
        (2, 3, 4, 32),
        (3, 117, 30, 32),
    ]
    assert offered[1].kl == pytest.approx(0.0412)
    with pytest.raises(ValueError, match="substring"):
        peers_heretic.menu_trials("no menu at all")


def test_fewest_refusals_and_the_balanced_trial_are_picked_and_one_only_where_they_agree():
    offered = peers_heretic.menu_trials(MENU)
    assert {name: t.trial for name, t in peers_heretic.picks(offered).items()} == {
        "fewest": 12,
        "balanced": 3,
    }
    assert list(peers_heretic.picks(offered[1:])) == ["fewest"]


def test_trials_fill_what_is_left_in_two_looks():
    assert peers_heretic.more_trials(left=400.0, per_trial=8.0) == 45
    assert peers_heretic.more_trials(left=20.0, per_trial=8.0) == 2
    assert peers_heretic.more_trials(left=7.0, per_trial=8.0) == 0
    assert peers_heretic.more_trials(left=-50.0, per_trial=8.0) == 0


# Asks what heretic 1.4.0 asks, in its words, and burns time for each trial.
STAND_IN = """#!{python}
import pathlib, time
def burn(trials):
    for _ in range(trials):
        print("Running trial")
        end = time.process_time() + 0.05
        while time.process_time() < end: pass
    print("Optimization finished!")
burn(2)
done = 2
while True:
    print("Which trial do you want to use?")
    print("[1] [Trial   1] Refusals:  0/32, KL divergence: 0.9000")
    print("[2] [Trial   2] Refusals:  3/32, KL divergence: 0.0100")
    print("[3] Run additional trials")
    print("[4] Exit program")
    choice = input("Enter number: ")
    if choice == "3":
        more = int(input("How many additional trials do you want to run?: "))
        burn(more); done += more
        continue
    assert choice in "12", choice
    while input("Enter number: ") == "1":
        folder = pathlib.Path(input("Path to the folder:: "))
        folder.mkdir(parents=True); (folder / "trial").write_text(choice + " of " + str(done))
"""


@pytest.mark.slow
def test_one_session_serves_all_budgets_and_saves_both_picks_of_each(tmp_path, monkeypatch):
    place = saved_tokenizer(tmp_path, TURNS)
    program = tmp_path / "environments/heretic/bin/heretic"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    (tmp_path / "environments/heretic/ready").touch()
    monkeypatch.setattr(peers_heretic, "version_of", lambda folder, package: "9")
    ask = peers_heretic.Session.ask

    def late(session, line=None):
        # The first trials are over before their beginning is read, as on a machine with much to do.
        if line is None:
            time.sleep(0.5)
        ask(session, line)

    monkeypatch.setattr(peers_heretic.Session, "ask", late)
    found = list(peers_heretic.run(place, [4.0, 1.6], "torch"))
    assert [o.budget for o in found] == [1.6, 1.6, 4.0, 4.0]
    made = [(tmp_path / o.model / "trial").read_text().split(" of ") for o in found]
    assert [choice for choice, _ in made] == ["1", "2", "1", "2"]
    assert 2 < int(made[0][1]) == int(made[1][1]) < int(made[2][1]) == int(made[3][1])
    assert f"{made[3][1]} trials" in found[3].settings
    assert all(0.3 * o.budget < o.cpu_seconds < 1.2 * o.budget for o in found)
    assert all(0.5 < o.search_share <= 1 for o in found)


def test_every_stretch_of_interleaved_prompts_holds_all_categories():
    texts = [f"{c}{i}" for c in "abcd" for i in range(12)]
    mixed = peers_common.interleaved(texts, [t[0] for t in texts])
    assert sorted(mixed) == sorted(texts)
    assert all({t[0] for t in mixed[i : i + 4]} == set("abcd") for i in range(0, 48, 4))
    assert peers_common.one_line("two\n lines\tof it ") == "two lines of it"


def saved_tokenizer(tmp_path, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    place = Workplace(tmp_path)
    tokenizer.save_pretrained(place.model)
    (place.model / "config.json").write_text('{"model_type": "llama"}')
    return place


TURNS = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}[system]Be brief.[end]"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
)


def test_the_templates_own_system_text_is_told_from_its_output(tmp_path):
    assert peers_common.system_prompt(saved_tokenizer(tmp_path, TURNS)) == "Be brief."


def test_a_template_that_puts_in_nothing_ends_with_a_message(tmp_path):
    place = saved_tokenizer(
        tmp_path, "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(SystemExit, match="cannot be told"):
        peers_common.system_prompt(place)


def test_a_run_that_fails_names_its_log_and_one_that_does_not_is_timed(tmp_path):
    log = tmp_path / "log.txt"
    with pytest.raises(SystemExit, match="failed with 3"):
        peers_common.timed([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, log)
    work = "import os; sum(range(3_000_000)); print(os.environ['HF_HUB_OFFLINE'])"
    cost = peers_common.timed([sys.executable, "-c", work], tmp_path, log)
    assert log.read_text() == "1\n"
    assert 0 < cost.cpu_seconds < 60
    assert 0 < cost.seconds < 60


RECORD = {
    "attempts": 31,
    "budget_stopped": True,
    "search_seconds": 101.5,
    "best_metrics": {"kl": 0.02},
    "final_refusal_full_generation": 0.01,
    "kl_final": 0.02,
    "candidates": [],
}


def test_an_outcome_is_read_from_the_tools_record_and_comes_back_from_its_file(tmp_path):
    made = peers_abliterated.outcome("1.1.1", 200.0, Cost(203.0, 198.0), 101.5, RECORD, "a/model")
    assert made.settings == "31 trials, its own pick, unverified: none passed its gate"
    checked = {**RECORD, "candidates": [{}, {}]}
    assert "of 2 that it verified" in peers_abliterated.pick(checked)
    assert (made.model, made.seconds, made.cpu_seconds) == ("a/model", 203.0, 198.0)
    assert made.search_share == 0.5
    made.save(tmp_path / "x.json")
    assert Outcome.load(tmp_path / "x.json") == made


def measured(refused):
    rate = {"rate": refused / 112, "low": 0.01, "high": 0.0625, "n": 112}
    return {
        "refusal": rate,
        "incoherent": {**rate, "rate": 0.0},
        "over_refusal": {"borderline": {**rate, "rate": 0.5, "n": 48}},
        "kl": {"first_token": 0.1234, "sequence": 0.01234},
        "accuracy": {"overall": 0.42},
    }


def test_the_table_has_a_cell_for_every_column_and_counts_with_intervals():
    row = {
        "tool": "a tool",
        "settings": "as it comes",
        "cpu_seconds": 351.0,
        "search_share": 0.25,
        "edited": measured(3),
        "comparison": {"perplexity_ratio": {"estimate": 1.01, "low": 1.0, "high": 1.02}},
    }
    lines = peers_ruler.table(measured(105), [row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 105/112 (1.0-6.2%) |" in lines[2]
    assert "| as it comes | 351 | 88 | 3/112 (1.0-6.2%) | 0/112" in lines[3]
    assert "| 24/48 " in lines[3]
    assert "| 0.1234 | 0.0123 | 1.010 (1.000-1.020) | 42% |" in lines[3]
