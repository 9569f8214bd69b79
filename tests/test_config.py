"""Configuration: every fault at once, with a remedy; round trip; presets."""

from pathlib import Path

import pytest

from agssd_core.config import config_from_json, dump_config, load_config, parse_config
from agssd_core.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_a_preset_is_complete_and_survives_json(preset):
    config = parse_config({"preset": preset})
    assert config_from_json(dump_config(config)) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_committed_config_is_valid(path):
    assert load_config(path).name


def test_all_faults_are_reported_at_once():
    content = {
        "preset": "tiny",
        "agssd": {"cvac": {"local_sise": 3}, "eaam": {"r0": 2.0}},
        "federaton": {},
        "training": {"batch_size": "many"},
        "federation": {"merge": {"student": "krum", "teacher": "server-ema"}},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(content)
    text = "\n".join(caught.value.problems)
    for part in (
        "agssd.cvac.local_sise is not a known key. Did you mean 'local_size'?",
        "eaam.r0 = 2 lies outside [0.05, 0.95]",
        "federaton is not a known key. Did you mean 'federation'?",
        "training.batch_size = 'many'",
        "merge.student = krum needs at least 5 sites",
    ):
        assert part in text


def test_a_crop_that_patches_do_not_tile_names_the_nearest_that_fits():
    with pytest.raises(ConfigError, match=r"Try \(48, 48, 48\)"):
        parse_config({"agssd": {"cvac": {"local_size": [40, 48, 48]}}})


@pytest.mark.parametrize("student", ["fedadam", "fedavgm", "median", "trimmed-mean", "l-dawa"])
def test_averaging_teachers_beside_a_non_linear_student_is_refused(student):
    merge = {"student": student, "teacher": "average"}
    with pytest.raises(ConfigError, match=r"merge\.teacher = server-ema"):
        parse_config({"federation": {"min_sites": 5, "merge": merge}})


def test_fedema_keeps_teachers_at_their_sites():
    with pytest.raises(ConfigError, match="teacher = local"):
        parse_config({"federation": {"merge": {"student": "fedema", "teacher": "server-ema"}}})


def test_overrides_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: tiny\nfederation:\n  rounds: 7\n  steps_per_round: 3\n")
    config = load_config(file, ["federation.rounds=9"])
    assert (config.federation.rounds, config.federation.steps_per_round) == (9, 3)
    assert config.agssd.model.width == 48


def test_a_python_path_in_yaml_stays_text(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(file)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words", "preset: tiny\npreset: base"])
def test_broken_files_get_a_message(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(file)


def test_a_missing_file_gets_a_message(tmp_path):
    with pytest.raises(ConfigError, match="Name a YAML file"):
        load_config(tmp_path / "none.yaml")


def test_sites_may_be_a_list_a_mapping_or_full_entries():
    listed = parse_config({}, ["data.sites=[/x/a,/x/b]"]).data.sites
    mapped = parse_config({"data": {"sites": {"a": "/x/a", "b": ["/x/b"]}}}).data.sites
    full = {"data": {"sites": [{"name": "a", "paths": ["/x/a"]}, {"name": "b", "paths": ["/x/b"]}]}}
    assert listed == mapped == parse_config(full).data.sites


def test_an_override_replaces_a_list_by_a_mapping():
    content = {"data": {"sites": [{"name": "a", "paths": ["/x/a"]}]}}
    sites = parse_config(content, ["data.sites={b: /x/b}"]).data.sites
    assert [site.name for site in sites] == ["b"]


def test_no_path_of_a_site_is_in_the_text_that_travels():
    assert "/x/a" not in dump_config(parse_config({}, ["data.sites=[/x/a]"]))


@pytest.mark.parametrize("cohorts", [[], ["ct-mr", "ct-mr"]], ids=str)
def test_cohorts_are_named_once(cohorts):
    with pytest.raises(ConfigError, match="cohorts names none, or one twice"):
        parse_config({"cohorts": cohorts})


def test_a_cohort_s_configuration_depends_on_its_own_method_alone():
    plain = parse_config({"preset": "tiny"})
    other_us = parse_config({"preset": "tiny", "anaus": {"loss": {"temperature": 0.2}}})
    other_ct = parse_config({"preset": "tiny", "agssd": {"loss": {"rec": 2.0}}})
    assert plain.for_cohort("ct-mr") == other_us.for_cohort("ct-mr") != other_ct.for_cohort("ct-mr")
    assert plain.for_cohort("us") == other_ct.for_cohort("us") != other_us.for_cohort("us")


def test_the_teacher_is_that_of_the_cohort():
    config = parse_config({"anaus": {"teacher": {"ema_momentum": 0.9}}})
    assert config.for_cohort("us").teacher.ema_momentum == 0.9
    assert config.for_cohort("ct-mr").teacher == config.agssd.teacher


def test_ultrasound_may_have_rounds_of_its_own():
    config = parse_config({"anaus": {"federation": {"rounds": 7}}})
    ours, theirs = config.for_cohort("us").federation, config.for_cohort("ct-mr").federation
    assert (ours.cohort, ours.rounds) == ("us", 7)
    assert (theirs.cohort, theirs.rounds) == ("ct-mr", 20)


@pytest.mark.parametrize(
    ("anaus", "remedy"),
    [
        ({"augment": {"size": 100}}, "Try 128"),
        ({"regions": {"scales": [7, 15]}}, r"Choose from \(7, 14, 28, 56\)"),
        ({"regions": {"scales": [14, 7]}}, "must ascend"),
        ({"backbone": {"norm": "group", "width": 12}}, "Choose groups that divide"),
        ({"backbone": {"norm": "group"}, "share_statistics": True}, "Leave it false"),
        ({"loss": {"align": 0, "context": 0}}, "Give one a weight"),
        ({"backbone": {"norm": "group"}, "head": {"hidden_projector": 20}}, "Choose a multiple"),
    ],
    ids=str,
)
def test_settings_of_anaus_that_cannot_work_name_a_remedy(anaus, remedy):
    with pytest.raises(ConfigError, match=remedy):
        parse_config({"anaus": anaus})


def test_frames_have_limits():
    with pytest.raises(ConfigError, match="Lower the first or raise the second"):
        parse_config({"data": {"frames": {"min_side": 600}}})
