import re
import sys
from pathlib import Path

import pytest

from bench import Bench
from icrouting.config import HIDDEN
from ways import WAYS

DOCS = Path(__file__).parents[1] / "docs"


# Where it matters when and from what a routing is read, both kinds of features are tried.
TRIED = [(way, "encoder") for way in WAYS if way.check]
TRIED += [(way, HIDDEN) for way, _ in TRIED if way.group in ("Padding", "Decoding", "Caches")]


@pytest.fixture(scope="module")
def benches(encoder_folder):
    return {"encoder": Bench(encoder_folder), HIDDEN: Bench(HIDDEN)}


@pytest.mark.parametrize(
    ("way", "features"), TRIED, ids=[f"{way.group}: {way.name}: {kind}" for way, kind in TRIED]
)
@pytest.mark.slow
def test_a_way_of_running_does_what_the_support_page_says(way, features, benches):
    bench = benches[features]
    if way.raises:
        with pytest.raises((ValueError, RuntimeError), match=re.escape(way.raises)) as error:
            way.check(bench)
        assert "\n" not in str(error.value)
    else:
        way.check(bench)
    assert not {"generate", "forward"} & set(vars(bench.model))
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in bench.model.modules()
    )


def test_every_way_has_a_name_of_its_own_and_a_reason_where_it_is_untested():
    assert len({(way.group, way.name) for way in WAYS}) == len(WAYS)
    assert all(way.note for way in WAYS if way.outcome == "untested")


def test_the_support_page_is_current():
    sys.path.append(str(DOCS))
    import support

    assert (DOCS / "support.md").read_text() == support.page(), "run python docs/support.py"
