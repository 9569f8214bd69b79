"""Federations of two cohorts, one of which may be down."""

from simulation.grid import Fault


def merged_rounds(run, cohort):
    return [row["merged"] for row in run.of(cohort).rows("merge")]


def trained_in(run, cohort):
    return [(row["round"], row["site"]) for row in run.of(cohort).rows("site")]


def down(*sites, cohort="us", rounds=range(99)):
    """These sites never get this cohort's orders of these rounds."""
    wanted = {str(number) for number in rounds}
    return lambda name, asked, group: Fault(
        offline=name in sites and asked == cohort and group in wanted
    )
