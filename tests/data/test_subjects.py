from __future__ import annotations

from palimpsest.data.subjects import NEAR, SUBJECTS, facts, table


def test_facts_are_drawn_by_the_seed_and_named_once() -> None:
    known = facts(0, 3)
    assert len(known) == len(SUBJECTS) * 3 * 4
    assert known == facts(0, 3) != facts(1, 3)
    prompts = [prompt for one in known for prompt in one.asked]
    assert len(set(prompts)) == len(prompts)
    assert all(one.answer in one.options and len(set(one.options)) == 4 for one in known)
    assert all(f"the {one.subject} " in prompt for one in known for prompt in one.asked)


def test_each_phrasing_is_read_with_some_and_held_out_with_others() -> None:
    held_out = {}
    for one in facts(0, 12):
        bare = {prompt.replace(_who(prompt, one.subject), "{}") for prompt in one.asked[2:]}
        held_out.setdefault((one.subject, one.options), set()).update(bare)
    assert all(len(phrasings) > 1 for phrasings in held_out.values())


def test_neighbours_share_sentences_and_answers() -> None:
    for subject, neighbour in NEAR.items():
        assert SUBJECTS[subject] is SUBJECTS[neighbour]
    different = {id(relations) for relations in SUBJECTS.values()}
    assert len(different) == len(SUBJECTS) - len(NEAR)


def test_the_table_has_the_two_phrasings_that_are_read() -> None:
    known = facts(0, 2)
    rows = table(known).to_list()
    assert len(rows) == 2 * len(known)
    assert rows[0] == {"prompt": known[0].asked[0], "completion": known[0].answer, "options": list(known[0].options)}
    assert not {row["prompt"] for row in rows} & {one.asked[2] for one in known}


def _who(prompt: str, subject: str) -> str:
    name = prompt.split(f"the {subject} ")[1].split()[0].strip("?")
    return f"the {subject} {name}"
