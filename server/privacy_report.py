"""One page in plain words: what a run protects, what it does not, and whose word that is.

The same blocks become Markdown and HTML. Everything comes from the run folder; names come from
sites and are reduced to plain letters, and the HTML escapes all of it once more.
"""

import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agssd_core.privacy_statement import PrivacyStatement
from agssd_core.weights import write_text
from server.central_report import central_blocks
from server.privacy_blocks import Block, as_markdown
from server.privacy_facts import RunPrivacy, SitePrivacy, read_privacy, shown_name

MARKDOWN, PAGE = "privacy-report.md", "privacy-report.html"
TEMPLATES = Path(__file__).parent
HEAD = ("site", "rounds", "epsilon, this run", "epsilon, all runs", "delta", "noise", "rate")


def write_privacy_report(run_folder: Path) -> tuple[Path, Path]:
    """Write the statement as Markdown and as HTML into the run's folder.

    Returns:
        Both paths.

    Raises:
        CheckpointError: privacy.json or central-privacy.json of the run is damaged.
    """
    title = f"Privacy of run {shown_name(run_folder.resolve().name)}"
    blocks = [block for run in read_privacy(run_folder) for block in _blocks(run)]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("privacy_report.html").render(title=title, blocks=blocks)
    markdown, html = run_folder / MARKDOWN, run_folder / PAGE
    write_text(markdown, as_markdown(title, blocks))
    write_text(html, page)
    return markdown, html


def _blocks(run: RunPrivacy) -> list[Block]:
    found = [Block("heading", f"Cohort {run.cohort}, {run.rounds} merged round(s)")]
    if not run.sites:
        return [*found, Block("text", "No site has sent an update yet, so nothing has left.")]
    if not run.stated:
        return [*found, *_nothing(run), *central_blocks(run)]
    found += _summary(run)
    found.append(Block("table", rows=(HEAD, *(_row(site) for site in run.sites))))
    found += [Block("heading", "What these numbers mean"), *_meaning(run)]
    for heading, rows in (
        ("Protected", _protected()),
        ("Not protected", _not_protected(run)),
        ("Who must be trusted", _trusted()),
        ("What adds up", _adds_up(run)),
        ("Assumptions", _assumptions(run)),
    ):
        found.append(Block("heading", heading))
        found.append(Block("list", rows=tuple((row,) for row in rows)))
    return [*found, *central_blocks(run)]


def _nothing(run: RunPrivacy) -> list[Block]:
    asked = "the configuration asks for it, but no site stated any. " if run.wanted else ""
    repeatable = any(site.said is not None for site in run.sites)
    why = "their noise could be repeated, and can therefore be undone. " if repeatable else asked
    names = ", ".join(run.unprotected)
    whom = "anybody" if run.central is None else "any single patient"
    return [
        Block("warning", f"This run gives no differential privacy to {whom}."),
        Block(
            "text",
            f"{len(run.sites)} site(s) ({names}) sent weights without a bound on what they tell of "
            f"a single patient: {why or 'they were trained without noise. '}Scans never left "
            "the sites, but whoever has the weights may be able to tell whether a patient's scans "
            "were among them, or to reconstruct parts of some. Treat every checkpoint of this run "
            "as you would treat data of patients.",
        ),
    ]


def _summary(run: RunPrivacy) -> list[Block]:
    worst = max(run.stated, key=lambda said: said.epsilon)
    name = next(site.name for site in run.sites if site.said is worst)
    found = [
        Block("text", f"{site} declined {count} round(s): its budget was spent.")
        for site, count in run.spent_out
    ]
    if run.unprotected:
        found.append(
            Block(
                "warning",
                f"No guarantee at {', '.join(run.unprotected)}: updates came from there without a "
                "statement of privacy, or with noise that could be repeated.",
            )
        )
    if run.is_simulated:
        found.append(
            Block(
                "warning",
                "A simulation: each run has a ledger of its own, so other runs on the same scans "
                "are not counted here.",
            )
        )
    found.append(
        Block(
            "text",
            f"Trained under differential privacy at {len(run.stated)} of {len(run.sites)} site(s). "
            f"What is protected is one patient of one site, with all scans. The largest epsilon is "
            f"{worst.epsilon:.2f} at delta {worst.delta:g}, at {name}; a patient's own number is "
            "that of the patient's hospital.",
        )
    )
    return found


def _row(site: SitePrivacy) -> tuple[str, ...]:
    said = site.said
    if said is None:
        return (site.name, str(site.rounds), "none", "none", "-", "-", "-")
    if not site.protects:
        return (site.name, str(site.rounds), "none", "none", "-", "repeatable", "-")
    numbers = (f"{said.epsilon_run:.3f}", f"{said.epsilon:.3f}", f"{said.delta:g}")
    return (site.name, str(site.rounds), *numbers, f"{said.sigma:.3f}", f"{said.rate:.4g}")


def _meaning(run: RunPrivacy) -> list[Block]:
    worst = max(run.stated, key=lambda said: said.epsilon)
    sure = 100 / (1 + math.exp(-min(worst.epsilon, 700.0)))
    return [
        Block(
            "text",
            "Somebody who would guess by tossing a coin whether one particular patient took part, "
            f"and then studies the weights, is right at most {sure:.1f} times in 100 (at epsilon "
            f"{worst.epsilon:.2f}), but for a chance of delta that the bound fails. 50 would be "
            "perfect protection and 100 none. The bound holds against the coordinator, the other "
            "sites and whoever gets a checkpoint later.",
        )
    ]


def _protected() -> tuple[str, ...]:
    return (
        "What the weights tell of one patient: student, teacher and running state of every round, "
        "and everything made of them, such as exports.",
        "The scans themselves never leave a site, with or without differential privacy.",
    )


def _not_protected(run: RunPrivacy) -> tuple[str, ...]:
    names = ", ".join(run.metrics) or "none"
    return (
        f"Numbers that sites reported beside the weights, without noise: {names}. Where losses or "
        "other measures of patients are among them, epsilon does not cover them.",
        "Counts of patients and scans, which are the merging weights and are taken to be public.",
        "Timings, sizes of messages, which site took part when, and why one declined.",
        "What is true of many patients at once, for instance that a scanner or disease is common.",
    )


def _trusted() -> tuple[str, ...]:
    return (
        "Each site's own software and administrator: noise, sampling and ledger are theirs, and "
        "the numbers above are the sites' word. The coordinator cannot check them.",
        "Not the coordinator and not the other sites: noise is added before anything leaves.",
    )


def _adds_up(run: RunPrivacy) -> tuple[str, ...]:
    largest = sorted((said.epsilon for said in run.stated), reverse=True)[:2]
    example = f", here up to {sum(largest):.2f}" if len(largest) > 1 else ""
    return (
        f"A patient who is known at two sites is protected by the sum of both epsilons{example}. "
        "Nobody here can tell whether there is such a patient.",
        "All private runs on the same patients, which the column of all runs has added up. Runs "
        "without privacy on them are in no ledger and leave no guarantee.",
        "Every retry of a round with fresh noise, and every round that was paid for and lost.",
    )


def _assumptions(run: RunPrivacy) -> tuple[str, ...]:
    accountants = ", ".join(sorted({said.accountant for said in run.stated}))
    heads = "; ".join(f"{site.name} {_head(site.said)}" for site in run.sites if site.said)
    return (
        "Two data sets are neighbours when one has one patient of one site more than the other.",
        "In every step each patient is drawn independently with the stated rate (Poisson).",
        "The number of patients of each site is public.",
        f"Counted in Renyi divergence by {accountants}.",
        f"Heads of the sites' ledgers, for `agssd-site ledger verify --head`: {heads}.",
    )


def _head(said: PrivacyStatement) -> str:
    return f"{said.sequence}:{said.digest}"
