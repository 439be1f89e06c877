"""A short part of the damage campaign: every class of input and kind of fault once or twice, each found and named."""

from pathlib import Path

from tests.campaigns import damage_campaign
from tests.support import damage_material


def test_damage_of_every_kind_is_found_before_a_step(tmp_path: Path) -> None:
    material = damage_material.make(tmp_path / "material")
    every_kind = sum(len(case.kinds) for case in material.cases)
    results = damage_campaign.campaign(material, every_kind, 1, tmp_path / "work")
    assert {(result.fault.case, result.fault.kind) for result in results} == {
        (case.name, kind) for case in material.cases for kind in case.kinds
    }
    missed = [result for result in results if not result.found]
    assert not missed, missed


def test_the_campaign_notices_what_is_not_found(tmp_path: Path) -> None:
    """With a check that finds nothing, nothing counts as found."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(bytes(range(100)))
    case = damage_material.Case("a case", source, ["file"], ("flip", "grow"), lambda damaged, out: "nothing was said")
    material = damage_material.Material([case])
    results = damage_campaign.campaign(material, 4, 1, tmp_path / "work")
    assert [result.found for result in results] == [False] * 4
    assert (source / "file").read_bytes() == bytes(range(100)), "the original was damaged"
