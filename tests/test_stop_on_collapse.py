"""``monitor.stop_on_collapse``: one collapsed site keeps its update, the others go on."""

import numpy as np
import pytest

from agssd_core.config import dump_config, parse_config
from agssd_core.data.cache import SiteVolumes
from agssd_core.errors import CollapseError, OrderRefusedError
from agssd_core.weights import weights_digest
from client.site import Site
from client.workbench import AgssdWorkbench
from server.report import write_server_report
from server.rounds import site_config
from tests.support.federated import federated_config, started_run
from tests.support.orders import order_for
from tests.support.sealing import weights_in
from tests.support.sites import make_site
from tests.support.toy import Hospital, ToyBench


def collapse_of(site, step):
    def fail(name, first_step):
        if (name, first_step) == (site, step):
            raise CollapseError("the teacher's targets have collapsed. Raise the batch size.")

    return fail


def test_a_collapsed_site_declines_its_round_and_comes_back_in_the_next(tmp_path):
    hospital = Hospital(tmp_path / "with")
    hospital.bench = ToyBench(collapse_of("b", 4))  # at round 1
    hospital.run()
    assert hospital.reasons() == [(1, "b", "declined-collapsed")]
    merged = [(row["round"], sorted(row["shares"])) for row in hospital.rows("merge")]
    assert merged == [(0, ["a", "b", "c"]), (1, ["a", "c"]), (2, ["a", "b", "c"])]
    back = next(r for r in hospital.rows("site") if (r["round"], r["site"]) == (2, "b"))
    assert back["metrics"]["optimiser_reset"] == 0  # from its state of round 0
    page = write_server_report(hospital.store.folder).read_text()
    assert "declined-collapsed" in page
    assert "lower the EMA momentum" in page


def test_the_server_sends_the_option_to_its_sites():
    config = parse_config({"preset": "tiny", "monitor": {"stop_on_collapse": True}})
    assert site_config(config).monitor.stop_on_collapse
    assert '"stop_on_collapse": true' in dump_config(site_config(config)).replace('":t', '": t')


@pytest.mark.federation
@pytest.mark.parametrize("stops", [False, True])
def test_the_real_site_stops_only_where_the_plan_says_so(tmp_path, stops):
    # No model reaches I > 10 nat of at most ln 32, so the gate fails as soon as the window is full.
    changes = {"monitor": {"stop_on_collapse": stops, "gate_nat": 10.0}}
    site = make_site(tmp_path / "north")
    config = federated_config(
        tmp_path, **changes, federation={"rounds": 2, "steps_per_round": 8, "expected_sites": 1}
    )
    assert len(SiteVolumes.open(site, config.data)) > 0
    base = started_run(config, tmp_path / "run").load(0).weights
    client = Site(site, "north", AgssdWorkbench())
    order = order_for(base, 0, config)
    if not stops:
        update = client.train_round(order, base)
        assert update.header.metrics["collapsed"] == 1
        assert all(np.isfinite(array).all() for array in weights_in(update).values())
        return
    digest = weights_digest(base)
    with pytest.raises(OrderRefusedError, match="collapsed") as refused:
        client.train_round(order, base)
    assert refused.value.reason == "collapsed"
    assert weights_digest(base) == digest
    assert not list((site / "federation" / "run-1").glob("round-*"))
