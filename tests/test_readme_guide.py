"""README's guides are what the deployment demo does: the same commands in the same order."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_COMMAND = re.compile(r"^\s*(agssd-(?:site|server|sim)) ([a-z-]+(?: verify)?)(?=\s)(.*)", re.M)


def verbs(text, program):
    """Verbs of a program in the order in which they first stand; enrol counts twice."""
    found = []
    for name, verb, rest in _COMMAND.findall(text):
        told = f"{verb} --answer" if verb == "enrol" and "--answer" in rest else verb
        if name == program and told not in found:
            found.append(told)
    return found


def guide(heading):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return section.split("```", 2)[1]


def demo():
    return (ROOT / "deploy" / "demo.sh").read_text(encoding="utf-8")


def test_the_hospitals_guide_has_every_step_of_the_demo_in_order():
    told = verbs(guide("A hospital"), "agssd-site")
    done = verbs(demo(), "agssd-site")
    assert told == done


def test_the_coordinators_guide_has_every_step_of_the_demo():
    told = verbs(guide("A coordinator"), "agssd-server")
    done = verbs(demo(), "agssd-server")
    assert set(done) <= {*told, "sites"}
    assert [verb for verb in told if verb in done] == [verb for verb in done if verb in told]
